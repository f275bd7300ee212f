"""A deleted adapter leaves nothing behind: no tensor of it lives on, whatever was done with it before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lorakit
from lorakit import PeftModel, hotswap_adapter, prepare_model_for_compiled_hotswap
from models import another, bits, config, ids, logits, randomise, registry_of, tiny, tiny_llama, with_adapter
from zoo import KINDS, adapted_zoo, zoo, zoo_config

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def alive():
    """Every plain tensor there is; compilers leave others behind, which have no memory."""
    gc.collect()
    # by type: `isinstance` would ask objects for their class, and some warn of being asked
    tensors = [thing for thing in gc.get_objects() if type(thing) in {torch.Tensor, torch.nn.Parameter}]
    return [tensor for tensor in tensors if tensor.layout is torch.strided]


def storages():
    """How many tensors are alive, and how many bytes they hold, each storage once."""
    tensors = alive()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(found.values())


def watched(model, name):
    """Weak references to every tensor of an adapter, and to the modules that hold them."""
    items = [item.tensor for item in registry_of(model).tensors(name) if item.state_name]
    modules = [m for layer in registry_of(model).layers.values() for m in layer.modules_of(name)]
    assert items
    return [weakref.ref(thing) for thing in (*items, *modules)]


def assert_gone(references):
    gc.collect()
    left = [reference() for reference in references if reference() is not None]
    assert not left, [type(thing).__name__ for thing in left]


def forward(model):
    logits(model)


def train(model):
    model.train()
    model(ids()).square().mean().backward()
    model.eval()


def merge(model):
    model.merge_adapter()
    logits(model)
    model.unmerge_adapter()


def mixed(model):
    with torch.no_grad():
        model(ids(), adapter_names=["default", "other"])


def mixed_in_training(model):
    model(ids(), adapter_names=["default", "other"]).square().mean().backward()


def mixed_alone(model):
    """Both adapters beside each other, then the doomed one by itself."""
    with torch.no_grad():
        model(ids(), adapter_names=["other", "__base__"])
        model(ids(), adapter_names=["default", "other"])


def chosen(model):
    with torch.no_grad(), model.base_model.use_adapter(["default", "other"]):
        model(ids())


def disabled(model):
    with model.disable_adapter():
        logits(model)


def prepared(model):
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    logits(model)


def compiled(model):
    block = next(iter(registry_of(model).layers.values()))
    call = torch.compile(block, backend="eager")
    with torch.no_grad():
        call(ids() if isinstance(block.get_base_layer(), torch.nn.Embedding) else torch.ones(2, 8))
    del call
    torch._dynamo.reset()


USES = [forward, train, merge, mixed, mixed_in_training, mixed_alone, chosen, disabled, prepared, compiled]
MODELS = {
    "linears": lambda: with_adapter(tiny(), target_modules=["q_proj", "v_proj", "c_fc"]),
    "every module": lambda: adapted_zoo(target_modules=KINDS, target_parameters=None),
}


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize(("kind", "doomed"), [("linears", "default"), ("every module", "other")])
def test_no_tensor_of_a_deleted_adapter_survives(kind, doomed, use):
    model = MODELS[kind]()
    model.add_adapter("other", model.peft_config["default"])
    randomise(model, "other", seed=6)
    model.set_adapter(["default", "other"])
    use(model)
    model.set_adapter("other" if doomed == "default" else "default")
    dead = watched(model, doomed)
    model.delete_adapter(doomed)
    assert_gone(dead)
    logits(model)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_nor_a_copy_of_one(build):
    """Stacks of factors for mixed batches, merged weights and the like are tensors of their own."""
    model = build()
    settings = model.peft_config["default"]
    forward(model)
    before = storages()
    model.add_adapter("other", settings)
    for use in USES[:-2]:  # preparing is meant to stay, and the compiler keeps things of its own
        model.set_adapter(["default", "other"])
        use(model)
    model.zero_grad(set_to_none=True)
    model.set_adapter("default")
    model.delete_adapter("other")
    after = storages()
    assert after == before


OWNED = {
    "parameters and attention": ({}, adapted_zoo),
    "whole modules and biases": ({"modules_to_save": ["head"], "bias": "all"}, lambda **c: with_adapter(tiny(), **c)),
    "token rows": ({"trainable_token_indices": {"embed": [1, 3]}}, lambda **c: with_adapter(tiny(), **c)),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, lambda **c: with_adapter(tiny(), **c)),
    "tied factors": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        lambda **c: with_adapter(tiny_llama(tie=True), **c),
    ),
    "tied rows": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3], "ensure_weight_tying": True},
        lambda **c: with_adapter(tiny_llama(tie=True), **c),
    ),
    "tied whole modules": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        lambda **c: with_adapter(tiny_llama(tie=True), **c),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OWNED)
@pytest.mark.parametrize("use", [forward, merge, disabled], ids=lambda use: use.__name__)
def test_nothing_else_that_an_adapter_owns_survives(what, use):
    changes, build = OWNED[what]
    model = build(**changes)
    use(model)
    dead = watched(model, "default")
    model.delete_adapter("default")
    assert_gone(dead)
    logits(model)


@pytest.mark.parametrize("names", [["default", "other"], ["default", "__base__"]], ids="+".join)
def test_a_mixed_batch_over_tied_factors(names):
    """The head computes with the embedding's tensors, so it must not keep them when they go."""
    model = with_adapter(
        tiny_llama(tie=True), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    another(model, "other", target_modules=["q_proj", "lm_head", "embed_tokens"], ensure_weight_tying=True)
    model.set_adapter(["default", "other"])
    with torch.no_grad():
        model(ids(), adapter_names=names)
    dead = watched(model, "default")
    model.set_adapter("other")
    model.delete_adapter("default")
    assert_gone(dead)


def test_taking_off_the_last_adapter_gives_the_base_back():
    base = zoo()
    before = {name: (id(p), bits(p)) for name, p in base.named_parameters()}
    model = lorakit.get_peft_model(base, zoo_config())
    forward(model)
    model.delete_adapter("default")
    assert {name: (id(p), bits(p)) for name, p in base.named_parameters()} == before


def test_swapping_leaves_nothing_of_the_former(tmp_path):
    with_adapter(tiny(), seed=8, r=2).save_pretrained(tmp_path / "small")
    with_adapter(tiny(), seed=9, r=6).save_pretrained(tmp_path / "large")
    model = with_adapter(tiny())
    for name in ("small", "large"):  # the parameters grow once
        hotswap_adapter(model, tmp_path / name, "default")
    before = storages()
    for _ in range(10):
        for name in ("small", "large"):
            hotswap_adapter(model, tmp_path / name, "default")
    assert storages() == before


def load_and_delete(model, folder):
    model.load_adapter(folder, "guest")
    with torch.no_grad():
        model(ids(), adapter_names=["default", "guest"])
    model.delete_adapter("guest")


def add_and_delete(model, _folder):
    model.add_adapter("guest", config(r=3))
    model.set_adapter("guest")
    model(ids()).square().mean().backward()
    model.set_adapter("default")
    model.delete_adapter("guest")


def replace(model, folder):
    model.load_adapter(folder, "default", replace=True)
    logits(model)


def fail(model, folder):
    for wrong in ({"strikt": True}, {"config": config(r=7)}):
        with pytest.raises((TypeError, lorakit.KeyMismatchError)):
            model.load_adapter(folder, "guest", **wrong)


def fail_to_swap(model, folder):
    with pytest.raises(lorakit.KeyMismatchError):
        hotswap_adapter(model, folder, "default", config=config(r=7))


@pytest.mark.parametrize(
    "cycle", [load_and_delete, add_and_delete, replace, fail, fail_to_swap], ids=lambda c: c.__name__
)
def test_sixty_cycles_hold_as_much_as_one(tmp_path, cycle):
    with_adapter(tiny(), seed=8).save_pretrained(tmp_path)
    model = with_adapter(tiny())
    for _ in range(2):
        cycle(model, tmp_path)
    before = storages()
    for _ in range(60):
        cycle(model, tmp_path)
    assert storages() == before


def test_sixty_loads_onto_a_base_and_off_again(tmp_path):
    with_adapter(tiny(), seed=8, modules_to_save=["head"], bias="all").save_pretrained(tmp_path)
    base = tiny()
    counts = []
    for _ in range(60):
        model = PeftModel.from_pretrained(base, tmp_path)
        logits(model)
        assert model.unload() is base
        del model
        counts.append(storages() if len(counts) in {1, 59} else None)
    assert counts[1] == counts[59]
