"""Arrow and GenKnowSub against a loop over tokens and experts on dense deltas."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lorakit import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from lorakit.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    PlanError,
    UnsupportedError,
)
from lorakit.variants.arrow import prototype
from models import Snapshot, bits, ids, logits, randomise, registry_of, tiny

TARGETS = ["q_proj", "c_fc", "down"]
ROUTER = "arrow_router"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved adapters: three experts of different ranks and scalings, two general ones, and some that do not fit."""
    root = tmp_path_factory.mktemp("experts")
    options = {
        "one": {"r": 4, "lora_alpha": 6},
        "two": {"r": 4, "lora_alpha": 10},
        "three": {"r": 4, "lora_alpha": 2},
        "small": {"r": 2, "lora_alpha": 4},
        "general_a": {"r": 4},
        "general_b": {"r": 4},
        "elsewhere": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "whole": {"r": 4, "modules_to_save": ["norm"]},
        "embedding": {"r": 4, "target_modules": ["embed", *TARGETS]},
        "biased": {"r": 4, "lora_bias": True},
        "dora": {"r": 4, "use_dora": True},
    }
    for seed, (name, changes) in enumerate(options.items()):
        model = get_peft_model(tiny(), LoraConfig(**{"target_modules": TARGETS, **changes}))
        randomise(model, seed=seed, scale=0.4)
        model.save_pretrained(root / name)
    return root


def arrow(folders, names=("one", "two", "three"), general=(), top_k=2, temperature=0.3):
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, use_gks=bool(general))
    return create_arrow_model(
        tiny(), [folders / name for name in names], config, [folders / name for name in general] or None
    )


def naive(model, x, layer, top_k, temperature, general=()):
    """(tokens, in) -> (tokens, out): what the router adds, token by token, on dense deltas in fp64."""
    experts = [name for name in layer.r if name not in layer.variants and name not in general]
    means = [
        sum(layer.stored(name)[part].detach().double() for name in general) / len(general) if general else 0
        for part in (0, 1)
    ]
    deltas = []
    for name in experts:
        A, B, _ = layer.stored(name)
        deltas.append((B.detach().double() - means[1]) @ (A.detach().double() - means[0]))
    directions = [torch.linalg.svd(delta).Vh[0] for delta in deltas]
    found = []
    for token in x.double():
        likeness = torch.tensor([abs(float(direction @ token)) for direction in directions])
        best = likeness.argsort(descending=True)[:top_k]
        weights = torch.softmax(likeness[best] / temperature, dim=0)
        found.append(
            sum(
                weight * layer.scaling[experts[number]] * deltas[number] @ token
                for weight, number in zip(weights, best.tolist(), strict=True)
            )
        )
    return torch.stack(found)


def check_layers(model, top_k=2, temperature=0.3, general=()):
    """Every layer's output, for whatever it is given in one call of the model."""
    seen, handles = [], []
    for path, layer in registry_of(model).layers.items():
        hook = lambda layer, args, y: seen.append((layer, args[0].detach(), y.detach()))  # noqa: E731
        handles.append(layer.register_forward_hook(hook))
        assert ROUTER in layer.variants, path
    logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(registry_of(model).layers)
    for layer, x, y in seen:
        wanted = naive(model, x.reshape(-1, x.shape[-1]), layer, top_k, temperature, general)
        found = (y - layer.base_layer(x)).reshape(len(wanted), -1).double()
        assert wanted.abs().max() > 1e-2
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- the maths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (3, 0.05)])
def test_forward(folders, top_k, temperature):
    check_layers(arrow(folders, top_k=top_k, temperature=temperature), top_k, temperature)


def test_experts_of_different_ranks(folders):
    model = arrow(folders, ("one", "small", "three"))
    assert {layer.r["task_1"] for layer in registry_of(model).layers.values()} == {2}
    check_layers(model)


@pytest.mark.parametrize("general", [("general_a",), ("general_a", "general_b")])
def test_general_knowledge_is_taken_off(folders, general):
    model = arrow(folders, general=general)
    plain = logits(arrow(folders))
    names = [f"gks_{number}" for number in range(len(general))]
    check_layers(model, general=names)
    assert (logits(model) - plain).abs().max() > 1e-3
    registry = registry_of(model)
    loaded = PeftModel.from_pretrained(tiny(), folders / "one")
    for item, other in zip(registry.tensors("task_0"), registry_of(loaded).tensors("default"), strict=True):
        assert torch.equal(item.tensor, other.tensor)  # the experts stay what they are


@pytest.mark.parametrize("shape", [(2, 9, 7), (4, 6, 20), (1, 5, 5), (5, 3, 4)])
def test_the_prototype_is_the_first_right_singular_vector(shape):
    r, out, width = shape
    A, B = torch.randn(r, width), torch.randn(out, r)
    found, wanted = prototype(A, B), torch.linalg.svd(B.double() @ A.double()).Vh[0]
    torch.testing.assert_close(found.double().abs(), wanted.abs(), rtol=1e-3, atol=1e-5)
    assert prototype(A.bfloat16(), B.bfloat16()).dtype == torch.float32
    assert not prototype(A, torch.zeros_like(B)).any()


def test_an_untrained_expert_changes_no_choice_of_the_others(folders):
    model = arrow(folders, ("one", "two"), top_k=1)
    wanted = logits(model)
    model.add_adapter("fresh", LoraConfig(r=3, target_modules=TARGETS))
    torch.testing.assert_close(logits(model), wanted)


# ---- what is kept ---------------------------------------------------------------------------------------


def test_experts_that_come_go_and_change(folders, monkeypatch):
    from lorakit.variants import arrow as module

    made = []
    monkeypatch.setattr(module, "prototype", lambda A, B: made.append(1) or prototype(A, B))
    model = arrow(folders)
    layers = len(registry_of(model).layers)
    first = logits(model)
    assert len(made) == 3 * layers
    assert torch.equal(logits(model), first)
    assert len(made) == 3 * layers  # once
    model.load_adapter(folders / "general_a", "later")
    check_layers(model)
    model.delete_adapter("later")
    assert torch.equal(logits(model), first)
    model.delete_adapter("task_2")
    check_layers(model)
    with torch.no_grad():
        for item in registry_of(model).tensors("task_0"):
            item.tensor.copy_(torch.randn_like(item.tensor))
    made.clear()
    check_layers(model)
    assert len(made) == 2 * layers
    for layer in registry_of(model).layers.values():
        layer.scaling["task_1"] *= 3
    check_layers(model)
    assert len(made) == 2 * layers  # a scaling is no direction


def test_switching_to_an_expert_and_back(folders):
    model = arrow(folders)
    wanted = logits(model)
    model.set_adapter("task_1")
    alone = PeftModel.from_pretrained(tiny(), folders / "two")
    assert torch.equal(logits(model), logits(alone))
    model.set_adapter(ROUTER)
    assert torch.equal(logits(model), wanted)


def test_experts_can_be_trained_behind_the_router(folders):
    """The router has nothing to train; the gradients of the experts are those of the composition."""
    model = arrow(folders)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.set_requires_grad(["task_0", "task_1", "task_2"])
    layer = registry_of(model).layers["layers.1.down"]
    for _ in range(2):  # with experts made anew, and with kept ones
        x = torch.randn(2, 5, 12, requires_grad=True)
        weights = torch.randn(2, 5, 8)
        (layer(x) * weights).sum().backward()
        experts = [layer.stored(f"task_{number}") for number in range(3)]
        directions = torch.stack([prototype(A, B) for A, B, _ in experts])
        trained = [factor for A, B, _ in experts for factor in (A, B)]
        found = [x.grad, *(factor.grad for factor in trained)]
        likeness = (x @ directions.T).abs()
        least = likeness.topk(2).values[..., -1:]
        chosen = torch.softmax(likeness.masked_fill(likeness < least, -torch.inf) / 0.3, dim=-1)
        added = sum(
            chosen[..., number : number + 1] * layer.scaling[f"task_{number}"] * (x @ A.T @ B.T)
            for number, (A, B, _) in enumerate(experts)
        )
        wanted = torch.autograd.grad(((layer.base_layer(x) + added) * weights).sum(), [x, *trained])
        for one, other in zip(found, wanted, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        model.zero_grad(set_to_none=True)
    assert all(p.grad is None for name, p in model.named_parameters() if ROUTER in name)


def test_copies(folders):
    model = arrow(folders, general=("general_a",))
    wanted = logits(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(made), wanted)
        randomise(made, "task_0", 5)
        assert not torch.equal(logits(made), wanted)
    assert torch.equal(logits(model), wanted)


# ---- calls ----------------------------------------------------------------------------------------------


def test_mixed_batches(folders):
    model = arrow(folders)
    wanted = {ROUTER: logits(model)}
    with model.disable_adapter():
        wanted["__base__"] = logits(model)
    assert torch.equal(wanted["__base__"], logits(tiny()))
    model.set_adapter("task_0")
    wanted["task_0"] = logits(model)
    for names in ([ROUTER, "__base__"], ["task_0", ROUTER]):
        with torch.no_grad():
            found = model(ids(), adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(found[row], wanted[name][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_half_precision(folders, base):
    """A weight of an expert is computed in fp32; that of a token near a tie may still change sides."""
    paths = [folders / name for name in ("one", "two", "three")]
    model = create_arrow_model(tiny(dtype=base), paths, ArrowConfig(top_k=3))
    reference = create_arrow_model(tiny(dtype=base).float(), paths, ArrowConfig(top_k=3))
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        found = logits(model)
    torch.testing.assert_close(found.float(), logits(reference), rtol=0.05, atol=0.05)
    layer = registry_of(model).layers["layers.0.q_proj"]
    assert layer.kept[ROUTER]["experts"].prototypes.dtype == torch.float32


def test_dropout_of_the_router(folders):
    model = arrow(folders)
    model.set_adapter("task_0")
    model.delete_adapter(ROUTER)
    options = ArrowConfig(top_k=2, router_temperature=0.3)
    model.add_adapter(ROUTER, LoraConfig(target_modules=TARGETS, arrow_config=options, lora_dropout=0.5))
    model.set_adapter(ROUTER)
    model.eval()
    wanted = logits(model)
    assert torch.equal(wanted, logits(arrow(folders)))
    model.train()
    assert not torch.equal(logits(model), wanted)


def test_compiled_in_one_graph(folders):
    torch._dynamo.reset()
    model = arrow(folders, general=("general_a",))
    wanted = logits(model)  # keeps the experts, which a graph cannot make
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), wanted)


def test_saved_and_loaded_it_is_the_same(folders, tmp_path):
    model = arrow(folders, general=("general_a", "general_b"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "task_0", "task_0")
    for name in ("task_1", "task_2", "gks_0", "gks_1", ROUTER):
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(ROUTER)
    options = loaded.peft_config[ROUTER].arrow_config
    assert options.task_adapter_names == ["task_0", "task_1", "task_2"]
    assert options.gks_adapter_names == ["gks_0", "gks_1"]
    assert torch.equal(logits(loaded), logits(model))


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "general", "options", "kind", "said"),
    [
        ((), (), {}, ConfigError, "wanted at least one adapter"),
        (("one", "two"), (), {"use_gks": True}, ConfigError, "general_adapter_paths: got none"),
        (("one", "two"), ("general_a",), {}, ConfigError, "use_gks is False"),
        (("one", "two"), (), {"top_k": 3}, PlanError, "top_k: got 3"),
        (("one", "elsewhere"), (), {}, PlanError, r"task_1: is on other modules than task_0.*v_proj.*c_fc"),
        (("one", "whole"), (), {}, PlanError, r"task_1: trained .*norm.* whole"),
        (("embedding", "embedding"), (), {}, PlanError, "embed: task_0 is on a Embedding"),
        (("one", "biased"), (), {}, PlanError, "task_1 is more than plain LoRA"),
        (("one", "dora"), (), {}, PlanError, "task_1 is more than plain LoRA"),
        (("one", "small"), ("general_a",), {"use_gks": True}, PlanError, "adapters of their rank"),
        (("one", "nowhere"), (), {}, AdapterNotFoundError, "nowhere"),
    ],
)
def test_what_does_not_go_together_leaves_the_model_as_it_was(folders, names, general, options, kind, said):
    base = tiny().train()
    base.layers[0].eval()
    before, modes = Snapshot(base), [module.training for module in base.modules()]
    config = ArrowConfig(**{"top_k": 1, **options})
    asked = copy.deepcopy(config)
    with pytest.raises(kind, match=f"(?s){said}"):
        create_arrow_model(
            base, [folders / name for name in names], config, [folders / name for name in general]
        )
    before.assert_same(base)
    assert [module.training for module in base.modules()] == modes
    assert config == asked


def test_too_few_experts_when_it_runs(folders):
    model = arrow(folders, ("one", "two"))
    model.delete_adapter("task_1")
    with pytest.raises(AdapterStateError, match=r"top_k=2 of the plain adapters.*task_0"):
        model(ids())
    model = arrow(folders, general=("general_a",))
    model.delete_adapter("gks_0")
    with pytest.raises(AdapterStateError, match=r"needs \['gks_0'\]"):
        model(ids())


def test_experts_that_came_later_and_do_not_fit(folders):
    model = arrow(folders)
    model.load_adapter(folders / "biased", "later")
    with pytest.raises(UnsupportedError, match=r"\['later'\] have lora_bias"):
        model(ids())
    model = arrow(folders, general=("general_a",))
    model.load_adapter(folders / "small", "later")
    with pytest.raises(UnsupportedError, match="adapters of their rank"):
        model(ids())


def test_general_adapters_without_names_are_refused():
    config = LoraConfig(target_modules=TARGETS, arrow_config=ArrowConfig(use_gks=True))
    base = tiny()
    before = Snapshot(base)
    with pytest.raises(ConfigError, match="without gks_adapter_names"):
        get_peft_model(base, config)
    before.assert_same(base)


def test_merging_is_refused_by_name(folders):
    model = arrow(folders)
    before = [bits(p) for p in model.parameters()]
    for call in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: registry_of(model).layers["layers.0.q_proj"].get_delta_weight(ROUTER),
        lambda: model.base_model.add_weighted_adapter([ROUTER, "task_0"], [1.0, 1.0], "c", "cat"),
    ):
        with pytest.raises(UnsupportedError, match="for each token, which no weight does"):
            call()
    assert [bits(p) for p in model.parameters()] == before


def test_folders_of_hub_repositories():
    from lorakit.arrow import _Source

    assert _Source.of("user/repository") == ("user/repository", None)
    assert _Source.of("user/repository/a/b") == ("user/repository", "a/b")
    for local in ("/no/such/folder", "./no/such/folder", "../no/such/folder"):
        assert _Source.of(local) == (local, None)
