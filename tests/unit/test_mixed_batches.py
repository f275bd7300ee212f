"""Batches whose samples go through different adapters, and calls that choose their own: as if each ran alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError, UnsupportedError
from lorakit.layers.chosen import Live
from models import (
    Snapshot,
    another,
    config,
    ids,
    logits,
    randomise,
    tiny,
    tiny_bert,
    tiny_llama,
    with_adapter,
)

# said of grouped convolutions: what merging does to them
pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")

BATCH = ["a", "__base__", "b", "a", "c", "b"]


class Pictures(nn.Module):
    """Convolutions of every kind, then a head: (batch, 4, 6, 6) -> (batch, 5)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2, padding_mode="circular")
        self.line = nn.Conv1d(6, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4 * 17, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        return self.head(self.line(x.flatten(2)).flatten(1))


def pictures():
    torch.manual_seed(1)
    return Pictures().eval()


def image_batch(samples):
    return torch.randn(samples, 4, 6, 6, generator=torch.Generator().manual_seed(2))


def token_batch(samples):
    return torch.randint(11, (samples, 5), generator=torch.Generator().manual_seed(2))


MODELS = {
    "linear and conv1d": (tiny, token_batch, {"target_modules": ["q_proj", "v_proj", "c_fc"]}),
    "embedding": (tiny, token_batch, {"target_modules": ["embed", "q_proj"]}),
    "biased factors": (tiny, token_batch, {"target_modules": ["q_proj", "down"], "lora_bias": True}),
    "whole modules": (tiny, token_batch, {"target_modules": ["q_proj"], "modules_to_save": ["head", "norm"]}),
    "tokens": (
        tiny,
        token_batch,
        {"target_modules": ["embed"], "trainable_token_indices": {"embed": [1, 3], "head": [0, 7]}},
    ),
    "convolutions": (pictures, image_batch, {"target_modules": ["first", "grouped", "line", "head"]}),
    "llama": (tiny_llama, token_batch, {"target_modules": "all-linear"}),
    "tied llama": (
        lambda: tiny_llama(tie=True),
        token_batch,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "bert": (tiny_bert, token_batch, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
}
each = pytest.mark.parametrize("kind", list(MODELS))


def several(kind, **changes):
    """A model with adapters a, b, c of different ranks and scalings, and a batch for it."""
    make, batch, fields = MODELS[kind]
    fields = {**fields, **changes}
    peft = get_peft_model(make(), LoraConfig(**{"r": 2, "lora_alpha": 4, **fields}), "a")
    peft.add_adapter("b", LoraConfig(**{"r": 4, "lora_alpha": 4, **fields}))
    peft.add_adapter("c", LoraConfig(**{"r": 6, "lora_alpha": 30, "use_rslora": True, **fields}))
    for seed, name in enumerate("abc"):
        randomise(peft, name, seed=seed, scale=0.2)
    return peft.eval(), batch(len(BATCH))


def alone(peft, batch, name):
    """The whole batch through one adapter, by switching the model."""
    if name == "__base__":
        with peft.disable_adapter():
            return logits(peft, batch)
    before = peft.active_adapters
    peft.set_adapter(name)
    found = logits(peft, batch)
    peft.set_adapter(before)
    return found


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@each
def test_each_sample_goes_through_its_own(kind):
    peft, batch = several(kind)
    wanted = {name: alone(peft, batch, name) for name in {*BATCH}}
    before = Snapshot(peft)
    with torch.no_grad():
        out = peft(batch, adapter_names=BATCH)
    found = out if isinstance(out, torch.Tensor) else out.logits
    for row, name in enumerate(BATCH):
        close(found[row], wanted[name][row])
        assert name == "__base__" or (found[row] - wanted["__base__"][row]).abs().max() > 1e-3
    before.assert_same(peft)


@each
def test_the_base_alone_and_one_for_all(kind):
    peft, batch = several(kind)
    for name in ("__base__", "b"):
        with torch.no_grad():
            out = peft(batch, adapter_names=[name] * len(BATCH))
        close(out if isinstance(out, torch.Tensor) else out.logits, alone(peft, batch, name))


@each
def test_a_call_may_choose_one_adapter(kind):
    peft, batch = several(kind)
    for name in ("a", "b", "c", "__base__"):
        wanted = alone(peft, batch, name)
        with torch.no_grad():
            out = peft(batch, adapter_names=name)
        assert torch.equal(out if isinstance(out, torch.Tensor) else out.logits, wanted)
        with peft.use_adapter(name):
            assert torch.equal(logits(peft, batch), wanted)
    assert peft.active_adapters == ["a"]


def test_several_adapters_add_up_in_a_call():
    peft, batch = several("linear and conv1d")
    peft.set_adapter(["a", "c"])
    wanted = logits(peft, batch)
    peft.set_adapter("b")
    with peft.use_adapter(["a", "c"]):
        assert torch.equal(logits(peft, batch), wanted)
    with peft.use_adapter([]), torch.no_grad():
        assert torch.equal(logits(peft, batch), alone(peft, batch, "__base__"))


def test_adapters_that_are_not_on_every_layer():
    peft = get_peft_model(tiny(), config(target_modules=["q_proj"]), "a")
    peft.add_adapter("b", config(target_modules=["c_fc", "head"]))
    for name in "ab":
        randomise(peft, name, seed=ord(name))
    batch = token_batch(4)
    wanted = [alone(peft, batch, name) for name in ("a", "b")]
    found = logits_of(peft, batch, ["a", "b", "b", "a"])
    for row, who in enumerate((0, 1, 1, 0)):
        close(found[row], wanted[who][row])


def logits_of(peft, batch, names):
    with torch.no_grad():
        out = peft(batch, adapter_names=names)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_hooks_on_the_modules_of_an_adapter_run():
    peft, batch = several("biased factors")
    wanted = logits_of(peft, batch, BATCH)
    seen = []
    layer = peft.base_model.registry.layers["layers.0.q_proj"]
    layer.lora_A["a"].register_forward_hook(lambda module, args, y: seen.append(len(args[0])))
    close(logits_of(peft, batch, BATCH), wanted)
    assert seen == [BATCH.count("a")]
    layer.lora_B["b"].register_forward_hook(lambda module, args, y: y * 0)
    changed = logits_of(peft, batch, BATCH)
    moved = [row for row in range(len(BATCH)) if not torch.allclose(changed[row], wanted[row])]
    assert moved == [row for row, name in enumerate(BATCH) if name == "b"]


def halve_scaling(layer):
    layer.set_scale("a", 0.5)


def write_factor(layer):
    layer.lora_A["a"].weight.mul_(2.0)


def swap_data(layer):
    layer.lora_B["a"].weight.data = layer.lora_B["a"].weight * 2.0


def new_parameter(layer):
    layer.lora_A["a"].weight = nn.Parameter(layer.lora_A["a"].weight * 2.0)


def new_module(layer):
    layer.lora_B["a"] = nn.Linear(2, layer.lora_B["a"].out_features, bias=False)


def new_bias(layer):
    layer.lora_B["a"].bias = nn.Parameter(torch.ones(layer.lora_B["a"].out_features))


def scaling_by_hand(layer):
    layer.scaling["a"] = 7.0


def scaling_as_tensor(layer):
    layer.scaling["a"] = torch.tensor(7.0, dtype=torch.float64)


def own_forward(layer):
    layer.lora_A["a"].forward = lambda x: torch.nn.functional.linear(x, layer.lora_A["a"].weight) * 2.0


def parametrised(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    nn.utils.parametrize.register_parametrization(layer.lora_A["a"], "weight", Doubled())


def fused_step(layer):
    factor = layer.lora_B["a"].weight
    factor.grad = torch.ones_like(factor)
    torch.optim.AdamW([factor], lr=0.1, fused=True).step()


CHANGES = [
    fused_step,
    halve_scaling,
    write_factor,
    swap_data,
    new_parameter,
    new_module,
    new_bias,
    scaling_by_hand,
    scaling_as_tensor,
    own_forward,
    parametrised,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_changed_between_two_batches_is_seen(change):
    peft, batch = several("linear and conv1d")
    before = logits_of(peft, batch, BATCH)
    assert torch.equal(logits_of(peft, batch, BATCH), before)  # through what the first one kept
    with torch.no_grad():
        change(peft.base_model.registry.layers["layers.0.q_proj"])
    found = logits_of(peft, batch, BATCH)
    wanted = {name: alone(peft, batch, name) for name in {*BATCH}}
    for row, name in enumerate(BATCH):
        close(found[row], wanted[name][row])
        assert torch.allclose(found[row], before[row], atol=1e-6) == (name != "a")


def test_dropout_between_two_batches_is_seen():
    peft, batch = several("linear and conv1d", lora_dropout=0.5)
    before = logits_of(peft, batch, BATCH)
    assert torch.equal(logits_of(peft, batch, BATCH), before)
    peft.train()
    assert not torch.allclose(logits_of(peft, batch, BATCH), before)
    peft.eval()
    assert torch.equal(logits_of(peft, batch, BATCH), before)


# ---- training -----------------------------------------------------------------------------------------


def gradients(peft, run):
    """The gradients of all adapters' tensors after `run`, by adapter and name; None where there is none."""
    peft.set_requires_grad(["a", "b", "c"])
    peft.zero_grad(set_to_none=True)
    run()
    registry = peft.base_model.registry
    return {
        (name, item.file_name): None if item.tensor.grad is None else item.tensor.grad.clone()
        for name in registry.configs
        for item in registry.tensors(name)
        if item.tensor.is_leaf and item.tensor.is_floating_point()
    }


def loss(out, rows=slice(None)):
    out = out if isinstance(out, torch.Tensor) else out.logits
    return out[rows].square().sum()


# checkpointing is transformers': one of its models stands for all
@pytest.mark.parametrize(("kind", "checkpointed"), [*((kind, False) for kind in MODELS), ("llama", True)])
def test_each_adapter_gets_the_gradients_it_would_get_alone(kind, checkpointed):
    peft, batch = several(kind)
    peft.double()
    batch = batch.double() if batch.is_floating_point() else batch
    if checkpointed:
        peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peft.train()

    def together():
        loss(peft(batch, adapter_names=BATCH)).backward()

    def one_by_one():
        for name in {*BATCH} - {"__base__"}:
            rows = [row for row, other in enumerate(BATCH) if other == name]
            with peft.use_adapter(name):
                loss(peft(batch[rows])).backward()

    found, wanted = gradients(peft, together), gradients(peft, one_by_one)
    assert found.keys() == wanted.keys()
    assert any(grad is not None and grad.abs().max() > 1e-4 for grad in wanted.values())
    for key, grad in wanted.items():
        if grad is not None and grad.any():
            close(found[key] / grad.abs().max(), grad / grad.abs().max(), 1e-9)
        else:
            assert found[key] is None or not found[key].any(), key


def test_reentrant_checkpointing_keeps_the_choice_too():
    peft, batch = several("llama")
    wanted = gradients(peft, lambda: loss(peft(batch, adapter_names=BATCH)).backward())
    peft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    peft.train()
    found = gradients(peft, lambda: loss(peft(batch, adapter_names=BATCH)).backward())
    for key, grad in wanted.items():
        close(found[key], grad, 1e-4)


def test_unloading_gives_the_checkpointing_function_back():
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    own = [layer._gradient_checkpointing_func for layer in model.model.layers]
    peft = get_peft_model(model, config(target_modules=["q_proj"]), "a").train()
    peft(token_batch(2), adapter_names=["a", "__base__"]).logits.sum().backward()
    assert model.model.layers[0]._gradient_checkpointing_func is not own[0]
    peft.unload()
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == own


# ---- generate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several"],
)
def test_generate(how):
    peft, batch = several("llama")
    names = ["a", "b", "__base__", "c"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    found = peft.generate(input_ids=batch[:4], adapter_names=names, **options)
    copies = how.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        wanted = peft.generate(input_ids=batch[row : row + 1], adapter_names=name, **options)
        assert torch.equal(found[row * copies : (row + 1) * copies], wanted), name


# ---- refusals -----------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind():
    peft, batch = several("linear and conv1d")
    wanted = logits(peft, batch)
    before = Snapshot(peft)

    def broken(*_):
        raise KeyboardInterrupt

    handle = peft.get_base_model().layers[1].down.register_forward_hook(broken)
    for names in (BATCH, "b"):
        with pytest.raises(KeyboardInterrupt):
            peft(batch, adapter_names=names)
    with pytest.raises(KeyboardInterrupt), peft.use_adapter("c"):
        peft(batch)
    handle.remove()
    assert not Live.any
    assert torch.equal(logits(peft, batch), wanted)
    before.assert_same(peft)


REFUSED = {
    "unknown": (["a", "nope"] * 3, AdapterNameError, r"nope.*\['a', 'b', 'c'\]"),
    "too few": (["a", "b"], ConfigError, "2 names.*leading size 6"),
    "too many": (["a"] * 7, ConfigError, "7 names.*leading size 6"),
    "twice as many samples": (["a", "b", "c"], ConfigError, "3 names.*leading size 6"),
    "none": ([], ConfigError, "one name for each sample"),
    "numbers": ([0, 1, 2, 0, 1, 2], ConfigError, "one name for each sample"),
    "unknown for the call": ("nope", AdapterNameError, "nope"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_names_that_do_not_fit(case):
    names, error, words = REFUSED[case]
    peft, batch = several("linear and conv1d")
    before = Snapshot(peft)
    with pytest.raises(error, match=words):
        peft(batch, adapter_names=names)
    assert not Live.any
    before.assert_same(peft)


def test_a_merged_model_is_refused():
    peft, batch = several("linear and conv1d")
    peft.merge_adapter(["b"])
    for names in (BATCH, "a"):
        with pytest.raises(AdapterStateError, match=r"\['b'\] are merged.*unmerge_adapter"):
            peft(batch, adapter_names=names)


def test_trained_biases_cannot_change_from_call_to_call():
    peft = with_adapter(tiny(), "a")
    another(peft, "b", bias="all")
    with pytest.raises(AdapterStateError, match=r"\['b'\] hold trained biases"):
        peft(ids(), adapter_names=["a", "b"])
    logits_of(peft, ids(), ["a", "__base__"])  # nobody's biases act here
    peft.set_adapter("b")
    with pytest.raises(AdapterStateError, match=r"\['b'\] hold trained biases"):
        peft(ids(), adapter_names="a")


def test_two_whole_modules_cannot_act_at_once():
    peft, _ = several("whole modules")
    with pytest.raises(AdapterStateError, match="own the same module"), peft.use_adapter(["a", "b"]):
        pass


def test_a_disabled_model_is_the_base_whatever_is_chosen():
    peft, batch = several("linear and conv1d")
    wanted = alone(peft, batch, "__base__")
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft, batch, BATCH), wanted)


def test_parameters_of_a_module_do_not_see_samples():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.matrix.t()

    peft = get_peft_model(Bare(), LoraConfig(r=2, target_modules=[], target_parameters=["inner.matrix"]), "a")
    randomise(peft, "a")
    x = torch.randn(2, 3)
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"'matrix'.*\['a'\]"):
            peft(x, adapter_names=["a", "__base__"])
        with peft.use_adapter("__base__"):
            base = peft(x)
        assert not torch.equal(base, peft(x))
        assert torch.equal(peft(x, adapter_names=["__base__"] * 2), base)


def test_two_models_in_one_context_choose_apart():
    first, batch = several("linear and conv1d")
    second, _ = several("llama")
    wanted = alone(first, batch, "b"), alone(second, batch, "c")
    with first.use_adapter("b"), second.use_adapter("c"):
        assert torch.equal(logits(first, batch), wanted[0])
        assert torch.equal(logits(second, batch), wanted[1])


def test_a_loaded_model_chooses_too(tmp_path):
    peft, batch = several("embedding")
    peft.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny(), tmp_path / "a", "a")
    for name in "bc":
        fresh.load_adapter(tmp_path / name, name)
    close(logits_of(fresh, batch, BATCH), logits_of(peft, batch, BATCH), 0)
