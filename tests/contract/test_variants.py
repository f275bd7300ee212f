"""What every variant keeps to, on every kind of layer that it is defined on.

A variant is a row of VARIANTS: what a config says to ask for it, and what about it is not as of the others. A test asks
for the rows that it holds for. What a variant computes is tested against a naive reference in tests/unit/variants.
"""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from contract.rows import ROWS, data, weight_of
from lorakit import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from lorakit.errors import AdapterError, AdapterStateError, NonFiniteError, PlanError, UnsupportedError
from models import Snapshot, bits, randomise, registry_of

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = {
    row.name: row
    for row in ROWS
    if row.name
    in {
        "linear", "conv1d", "embedding_padded", "embedding_scaled", "embedding_shifted",
        "line_circular", "image", "volume", "image_causal",
    }
}  # fmt: skip


class Variant(NamedTuple):
    """One variant.

    Attributes:
        name: of the row.
        changes: what a config says to ask for it.
        kinds: names of the rows of KINDS that it is on.
        merges: whether a weight does what it does; else merging is refused.
        is_base: whether a new adapter acts as the base.
        factors: whether factors alone describe it (`layer.blocks`).
        composes: whether gradients under `torch.func` are those of a backward, and compiling gives one graph.
        samples: whether it takes an adapter for each sample.
        written: what holds tensors that are never trained and that a step of training writes.
    """

    name: str
    changes: Mapping[str, Any]
    kinds: tuple[str, ...] = tuple(KINDS)
    merges: bool = True
    is_base: bool = True
    factors: bool = True
    composes: bool = True
    samples: bool = True
    written: str = ""


MATRICES = ("linear", "conv1d")

VARIANTS = (
    Variant("dora", {"use_dora": True}, factors=False),
    Variant("kasa", {"kasa_config": {}}, MATRICES, is_base=False),
    Variant("bdlora_a", {"use_bdlora": {"target_modules_bd_a": ["nly"], "nblocks": 2}}, MATRICES),
    Variant("bdlora_b", {"use_bdlora": {"target_modules_bd_b": ["only"], "nblocks": 2}}, MATRICES),
    Variant("velora", {"velora_config": {"num_groups": 5}}, MATRICES, written="lora_velora_embed"),
    Variant("qalora", {"use_qalora": True, "qalora_group_size": 4}, MATRICES),
    # its spread has no gradient in eval mode; in training it is looked at in tests/unit/variants
    Variant("monteclora", {"monteclora_config": {"num_samples": 3}}, MATRICES, composes=False),
)

# It acts by what a call of a whole model carries, and is tested with one (tests/unit/variants/test_alora.py).
ALORA = Variant("alora", {"alora_invocation_tokens": [1]}, MATRICES, merges=False)

PAIRS = [(variant, KINDS[kind]) for variant in VARIANTS for kind in variant.kinds]


def pairs(test=lambda *_: True):
    """Parametrise over each variant with each kind of layer for which `test(variant, row)` is true."""
    return pytest.mark.parametrize(
        ("variant", "row"),
        [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in PAIRS if test(*pair)],
    )


def variants(test=lambda _: True):
    """Parametrise over the variants, each on a linear layer."""
    return pytest.mark.parametrize("variant", [v for v in VARIANTS if test(v)], ids=lambda v: v.name)


def merging(variant, _=None):
    return variant.merges


class Only(nn.Module):
    """A model of one layer."""

    def __init__(self, base):
        super().__init__()
        self.only = base

    def forward(self, x):
        return self.only(x)


def base_of(row, dtype=torch.float32):
    torch.manual_seed(1)
    return Only(row.base(True).to(dtype)).eval()  # with a bias


def config_of(variant, **changes):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["only"], **(variant.changes if variant else {})}
    return LoraConfig(**{**options, **changes})


def model_of(variant, row, dtype=torch.float32, **changes):
    """A model of one layer with one adapter that has an effect."""
    model = get_peft_model(base_of(row, dtype), config_of(variant, **changes), "a").eval()
    stir(model, "a", 3)
    return model


def stir(model, name, seed):
    """Every trained tensor of an adapter moved from where it began, so that it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in registry_of(model).layers.values():
            frozen = layer.frozen_tensors(name)
            for item in layer.tensors(name):
                if not any(item.tensor is it for it in frozen):
                    item.tensor.add_(torch.randn(item.tensor.shape, generator=generator) * 0.3)


def second(model, variant, name="b", seed=4, **changes):
    """One more adapter with an effect; a plain one for None."""
    model.add_adapter(name, config_of(variant, **{"r": 4, "lora_alpha": 3, **changes}))
    stir(model, name, seed)
    model.eval()


def layer_of(model):
    return registry_of(model).layers["only"]


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def close(found, wanted, tolerance=1e-5):
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-3)


def gradients(model, x, call=None):
    y = model(x) if call is None else call(x)
    torch.manual_seed(8)
    (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# ---- beginning and acting -------------------------------------------------------------------------------


@pairs(lambda variant, _: variant.is_base)
def test_a_new_adapter_acts_as_the_base(variant, row):
    base, x = base_of(row), data(row)
    wanted = outputs(base, x)
    close(outputs(get_peft_model(base, config_of(variant)).eval(), x), wanted)


@pairs()
def test_the_weight_is_only_read(variant, row):
    base = base_of(row)
    before = Snapshot(base)
    model = get_peft_model(base, config_of(variant))
    before.assert_same(model.unload())


@pairs()
def test_it_has_an_effect_and_only_while_it_is_active(variant, row):
    model, x = model_of(variant, row), data(row)
    wanted = outputs(base_of(row), x)
    acting = outputs(model, x)
    assert (acting - wanted).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs(model, x), wanted)
    second(model, variant)
    model.set_adapter("b")
    other = outputs(model, x)
    assert (other - acting).abs().max() > 0.05
    model.set_adapter("a")
    assert torch.equal(outputs(model, x), acting)


@pairs()
def test_training_and_eval_mode_give_the_same_without_dropout(variant, row):
    model, x = model_of(variant, row), data(row)
    close(model(x).detach(), outputs(model, x))


@pairs()
def test_what_is_kept_between_calls_follows_every_change(variant, row):
    model, x = model_of(variant, row), data(row)
    layer = layer_of(model)
    seen = [outputs(model, x)]
    with torch.no_grad():
        for item in layer.tensors("a"):
            item.tensor.mul_(1.25)
            seen.append(outputs(model, x))
    layer.scaling["a"] *= 1.5
    seen.append(outputs(model, x))
    with torch.no_grad():
        weight_of(row, layer).mul_(1.1)
    found = outputs(model, x)
    fresh = copy.deepcopy(model)
    assert torch.equal(outputs(fresh, x), found)
    assert all(
        (one - other).abs().max() > 1e-4 for one, other in zip(seen[-2:], [*seen[-1:], found], strict=True)
    )


@variants()
def test_evaluations_see_what_an_optimiser_wrote_unseen(variant):
    """A fused step counts no versions."""
    row = KINDS["linear"]
    model, x = model_of(variant, row), data(row)
    outputs(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.1, fused=True)
    model(x).square().sum().backward()
    optimiser.step()
    assert torch.equal(outputs(model, x), outputs(copy.deepcopy(model), x))


# ---- gradients ------------------------------------------------------------------------------------------


@pairs(lambda variant, _: variant.composes)
def test_gradients_are_those_of_the_composition(variant, row):
    """Under `torch.func` everything is plain torch calls."""
    model, x = model_of(variant, row, torch.float64), data(row, torch.float64)
    found = gradients(model, x)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(8)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    wanted = grad(lambda values: (functional_call(model, values, (x,)) * weights).sum())(values)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        close(found[name], value, 1e-10)


@pairs()
def test_training_moves_what_is_trained_and_nothing_else(variant, row):
    model, x = model_of(variant, row), data(row)
    model.train()
    before = {name: bits(p) for name, p in model.named_parameters()}
    wanted = outputs(base_of(row), x)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        written = bool(variant.written) and variant.written in name
        assert (bits(p) != before[name]) == (p.requires_grad or written), name
    frozen = {id(p) for p in layer_of(model).frozen_tensors("a")}
    assert {id(p) for p in layer_of(model).parameters_of("a")} - frozen == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@pairs()
def test_gradient_checkpointing(variant, row):
    model, x = model_of(variant, row), data(row)
    wanted = gradients(model, x)
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


# ---- dtypes ---------------------------------------------------------------------------------------------


@pairs()
def test_fp32_adapters_over_a_half_base(variant, row):
    model, exact = model_of(variant, row, torch.bfloat16), model_of(variant, row)
    with torch.no_grad():
        weight_of(row, layer_of(exact)).copy_(weight_of(row, layer_of(model)))
        if layer_of(exact).bias is not None:
            layer_of(exact).bias.copy_(layer_of(model).bias)
        for one, other in zip(layer_of(exact).tensors("a"), layer_of(model).tensors("a"), strict=True):
            assert other.tensor.dtype == torch.float32
            one.tensor.copy_(other.tensor)
    x = data(row, torch.bfloat16)
    for found in (outputs(model, x), model(x).detach()):
        assert found.dtype == torch.bfloat16
        close(found.float(), outputs(exact, x.float() if x.is_floating_point() else x), 3e-2)


@pairs()
def test_autocast(variant, row):
    model, x = model_of(variant, row), data(row)
    wanted, wanted_gradients = outputs(model, x), gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_gradients = outputs(model, x), gradients(model, x)
    close(found.float(), wanted, 2e-2)
    for name, value in wanted_gradients.items():
        close(found_gradients[name], value, 4e-2)


# ---- merging --------------------------------------------------------------------------------------------


@pairs(merging)
@pytest.mark.parametrize("others", ["alone", "plain", "same"])
def test_merged_is_unmerged_and_unmerging_gives_the_bits_back(variant, row, others):
    model, x = model_of(variant, row), data(row)
    if others != "alone":
        second(model, variant if others == "same" else None)
        model.base_model.set_adapter(["a", "b"])
    before, wanted = bits(weight_of(row, layer_of(model))), outputs(model, x)
    model.merge_adapter()
    close(outputs(model, x), wanted)
    assert bits(weight_of(row, layer_of(model))) != before
    model.unmerge_adapter()
    assert bits(weight_of(row, layer_of(model))) == before
    assert torch.equal(outputs(model, x), wanted)


@pairs(merging)
def test_merge_and_unload(variant, row):
    model, x = model_of(variant, row), data(row)
    wanted = outputs(model, x)
    plain = model.merge_and_unload()
    assert type(plain.only) is type(base_of(row).only)
    close(outputs(plain, x), wanted)


@pairs(merging)
def test_the_delta_is_what_merging_adds(variant, row):
    model = model_of(variant, row)
    layer = layer_of(model)
    before, delta = weight_of(row, layer).detach().clone(), layer.get_delta_weight("a")
    model.merge_adapter()
    close(before + delta, weight_of(row, layer).detach())


@pytest.mark.parametrize("variant", [ALORA, *(v for v in VARIANTS if not v.merges)], ids=lambda v: v.name)
def test_merging_is_refused_by_name(variant):
    model = model_of(variant, KINDS["linear"])
    before = Snapshot(model)
    for call in (model.merge_adapter, model.merge_and_unload, lambda: layer_of(model).get_delta_weight("a")):
        with pytest.raises(UnsupportedError):
            call()
        before.assert_same(model)


@variants()
def test_factors(variant):
    layer = layer_of(model_of(variant, KINDS["linear"]))
    if variant.factors:
        (only,) = layer.blocks("a")
        close(only.delta(), layer.get_delta_weight("a"))
    else:
        with pytest.raises(UnsupportedError):
            layer.blocks("a")


@variants()
def test_a_merge_of_nan_is_refused(variant):
    model = model_of(variant, KINDS["linear"])
    with torch.no_grad():
        next(layer_of(model).parameters_of("a")).view(-1)[0] = float("nan")
    before = Snapshot(model)
    with pytest.raises(AdapterError) as refused:
        model.merge_adapter()
    assert isinstance(refused.value, NonFiniteError if variant.merges else UnsupportedError)
    before.assert_same(model)


# ---- several --------------------------------------------------------------------------------------------


@pairs()
@pytest.mark.parametrize("other", ["plain", "same"])
def test_several_add_what_each_adds_alone(variant, row, other):
    model, x = model_of(variant, row), data(row)
    second(model, variant if other == "same" else None)
    base = outputs(base_of(row), x)
    alone = {}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = outputs(model, x)
    wanted = alone["a"] + alone["b"] - base
    for order in (["a", "b"], ["b", "a"]):
        model.base_model.set_adapter(order)
        close(outputs(model, x), wanted)
        close(model(x).detach(), wanted)


@pairs(lambda variant, row: variant.samples and not row.runs_whole)
def test_each_sample_through_its_own_adapter(variant, row):
    model, x = model_of(variant, row), data(row)
    second(model, None)
    second(model, variant, "c", 6)
    names = ["c", "__base__", "a"]
    with torch.no_grad():
        found = model(x, adapter_names=names)
    for sample, name in enumerate(names):
        if name == "__base__":
            wanted = outputs(base_of(row), x)
        else:
            model.set_adapter(name)
            wanted = outputs(model, x)
        close(found[sample], wanted[sample])
    other = ["b", "a", "c"]
    found = model(x, adapter_names=other)
    for sample, name in enumerate(other):
        model.set_adapter(name)
        close(found.detach()[sample], outputs(model, x)[sample])


@pairs()
def test_deleting_takes_everything_with_it(variant, row):
    model, x = model_of(variant, row), data(row)
    second(model, None)
    model.set_adapter("b")
    wanted = outputs(model, x)
    model.set_adapter("a")
    outputs(model, x)
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(outputs(model, x), wanted)
    layer = layer_of(model)
    assert not [name for name in model.state_dict() if ".a." in name or name.endswith(".a")]
    assert not layer.variants
    assert not layer.kept
    assert not layer.frozen


# ---- files and copies -----------------------------------------------------------------------------------


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pairs()
def test_saved_and_loaded_it_is_the_same(variant, row, tmp_path):
    model, x = model_of(variant, row), data(row)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    loaded = PeftModel.from_pretrained(base_of(row), tmp_path / "a").eval()
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert not any(p.requires_grad for p in loaded.parameters())
    trained = PeftModel.from_pretrained(base_of(row), tmp_path / "a", "a", is_trainable=True)
    assert flags(trained) == flags(model)


@variants()
def test_a_file_with_nan_is_refused(variant, tmp_path):
    row = KINDS["linear"]
    model = model_of(variant, row)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    for key, value in load_file(path).items():
        spoiled = load_file(path)
        spoiled[key] = torch.full_like(value, float("nan"))
        save_file(spoiled, path, metadata={"format": "pt"})
        base = base_of(row)
        before = Snapshot(base)
        with pytest.raises(AdapterError):
            PeftModel.from_pretrained(base, tmp_path / "a")
        before.assert_same(base)
        spoiled[key] = value
        save_file(spoiled, path, metadata={"format": "pt"})


@pairs()
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies(variant, row, way):
    model, x = model_of(variant, row), data(row)
    wanted = outputs(model, x)
    made = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(made, x), wanted)
    randomise(made, "a", 9)
    assert torch.equal(outputs(model, x), wanted)
    assert not torch.equal(outputs(made, x), wanted)


@variants()
def test_exchanging_it_in_place_is_refused_by_name(variant, tmp_path):
    model = model_of(variant, KINDS["linear"])
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    field = next(iter(variant.changes))
    before = Snapshot(model)
    with pytest.raises(PlanError, match=f"{field}: the loaded adapter is .*, which cannot be exchanged"):
        hotswap_adapter(model, tmp_path / "a", "a")
    with pytest.raises(AdapterStateError, match=r"only: adapter 'a' is .*, which cannot be exchanged"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    before.assert_same(model)


@pairs()
def test_every_parameter_handed_over(variant, row):
    """`functional_call` puts plain tensors where parameters were."""
    model, x = model_of(variant, row), data(row)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(functional_call(model, values, (x,)), model(x))


# ---- torch.compile --------------------------------------------------------------------------------------


@pairs(
    lambda variant, row: variant.composes and row.name in {"linear", "conv1d", "embedding_padded", "image"}
)
def test_compiled_in_one_graph(variant, row):
    torch._dynamo.reset()
    model, x = model_of(variant, row), data(row)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(outputs(compiled, x), outputs(model, x))
    wanted, found = gradients(model, x), gradients(model, x, compiled)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value, 1e-4)
