"""Every kind of layer keeps the contract. A new kind is one more row in `BASES`."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterNameError, AdapterStateError, NonFiniteError, UnsupportedError
from lorakit.layers import LAYER_KINDS, kind_of
from lorakit.weights import find_codec
from models import Snapshot, bits, random_factors, spec_of

OUT, IN = 10, 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear(bias=True):
    return nn.Linear(IN, OUT, bias=bias)


def conv1d(bias=True):
    made = Conv1D(OUT, IN)
    nn.init.normal_(made.weight, std=0.3)
    nn.init.normal_(made.bias)
    if not bias:
        made.bias = nn.Parameter(torch.zeros(OUT))
    return made


BASES = {"linear": linear, "conv1d": conv1d}
each = pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def make(
    kind, dtype=torch.float32, names=("a",), *, bias=True, adapter_dtype=None, dropout=0.0, lora_bias=False
):
    """A layer with active adapters of ranks 2, 3, 4 …, and an effect as large as the base's."""
    torch.manual_seed(1)
    base = BASES[kind.name](bias).to(dtype)
    layer = kind.layer(base, find_codec(base))
    adapter_dtype = adapter_dtype or dtype
    for n, name in enumerate(names):
        spec = spec_of((OUT, IN), adapter_dtype, r=2 + n, alpha=3.0, dropout=dropout, lora_bias=lora_bias)
        part = random_factors(
            (OUT, IN), adapter_dtype, r=2 + n, scaling=spec.scaling, bias=lora_bias, seed=n, size=0.4
        )
        layer.add(name, part, spec, use_rslora=False)
    layer.set_adapter(names)
    return layer.eval()


def data(dtype=torch.float32, *shape):
    return torch.randn(
        *(shape or (3, 5)), IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    ).to(dtype)


def weight(layer):
    """(out, in) in fp64, read off the module itself."""
    stored = layer.base_layer.weight.detach().double()
    return stored.T if isinstance(layer.base_layer, Conv1D) else stored


def exact(layer, x, names):
    """The output in fp64, and the size of what it was summed from, which bounds the rounding."""
    x = x.detach().double()
    y, size = x @ weight(layer).T, x.abs() @ weight(layer).abs().T
    if layer.base_layer.bias is not None:
        y, size = (
            y + layer.base_layer.bias.detach().double(),
            size + layer.base_layer.bias.detach().abs().double(),
        )
    for name in names:
        part = layer.factors(name)
        A, B, s = part.A.double(), part.B.double(), part.scaling
        y = y + s * (x @ A.T @ B.T)
        size = size + abs(s) * (x.abs() @ A.abs().T @ B.abs().T)
        if part.bias is not None:
            y, size = y + s * part.bias.double(), size + abs(s) * part.bias.abs().double()
    return y, size


def assert_near(found, layer, x, names, steps=3):
    y, size = exact(layer, x, names)
    assert found.dtype == x.dtype
    error = (found.detach().double() - y).abs()
    eps = torch.finfo(x.dtype).eps
    worst = (error / (size * eps)).max().item()
    assert worst <= steps, f"{worst:.2f} roundings of the summands' size"


def test_each_kind_has_a_row_here():
    assert {kind.name for kind in LAYER_KINDS} == set(BASES)


@each
def test_kind_is_found_by_the_module(kind):
    assert kind_of(BASES[kind.name]()) is kind
    assert kind_of(nn.Embedding(3, 3)) is None


# ---- forward ------------------------------------------------------------------------------------------


@each
@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [(), ("a",), ("a", "b"), ("a", "b", "c")], ids=len)
def test_forward_is_base_plus_sum(kind, dtype, bias, names):
    layer = make(kind, dtype, names, bias=bias)
    x = data(dtype)
    assert_near(layer(x), layer, x, names)
    if names:
        assert (layer(x) - layer.base_layer(x)).abs().max() > 0.3


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_over_a_half_base_keep_the_dtype_of_x(kind, dtype):
    layer = make(kind, dtype, ("a", "b"), adapter_dtype=torch.float32)
    x = data(dtype)
    assert_near(layer(x), layer, x, ("a", "b"))


@each
def test_bias_of_B_is_scaled_and_added(kind):
    layer = make(kind, names=("a", "b"), lora_bias=True)
    assert_near(layer(data()), layer, data(), ("a", "b"))


@each
@pytest.mark.parametrize("shape", [(), (1,), (4,), (0, 3), (2, 3, 4)], ids=str)
def test_any_leading_shape(kind, shape):
    if kind.name == "conv1d" and shape == ():
        pytest.skip("transformers' Conv1D takes no vector either")
    layer = make(kind)
    x = torch.randn(*shape, IN)
    found = layer(x)
    assert tuple(found.shape) == (*shape, OUT)
    if x.numel():
        assert_near(found, layer, x, ("a",))


@each
def test_x_that_is_not_contiguous(kind):
    layer = make(kind)
    x = torch.randn(IN, 5, 3).permute(2, 1, 0)
    assert_near(layer(x), layer, x, ("a",))


@each
def test_scaling_is_read_at_each_forward(kind):
    layer = make(kind)
    base, with_it = layer.base_layer(data()), layer(data())
    layer.scaling["a"] *= -2
    torch.testing.assert_close(layer(data()) - base, -2 * (with_it - base))


@each
def test_only_the_active_act(kind):
    layer = make(kind, names=("a", "b", "c"))
    layer.set_adapter(["c", "a", "unknown here"])
    assert layer.active_adapters == ["c", "a", "unknown here"]
    assert_near(layer(data()), layer, data(), ("a", "c"))
    flags = {name: layer.lora_A[name].weight.requires_grad for name in "abc"}
    assert flags == {"a": True, "b": False, "c": True}


@each
@every_dtype
def test_disabled_is_the_base_bit_for_bit(kind, dtype):
    layer = make(kind, dtype, ("a", "b"))
    wanted = layer.base_layer(data(dtype))
    layer.enable_adapters(False)
    assert layer.disable_adapters
    assert torch.equal(layer(data(dtype)), wanted)
    layer.enable_adapters(True)
    assert not torch.equal(layer(data(dtype)), wanted)


# ---- dropout ------------------------------------------------------------------------------------------


@each
def test_dropout_is_unbiased_in_training_and_off_in_eval(kind):
    layer = make(kind, dropout=0.3)
    x = data(torch.float32, 4)
    assert torch.equal(layer(x), layer(x))
    wanted = layer(x) - layer.base_layer(x)
    layer.train()
    draws = torch.stack([layer(x) - layer.base_layer(x) for _ in range(2000)])
    assert draws.std(dim=0).min() > 0
    error = (draws.mean(dim=0) - wanted).abs() / (draws.std(dim=0) / 2000**0.5)
    assert error.max() < 4.5  # standard errors of the mean, over 40 elements


@each
def test_dropout_acts_on_the_adapter_alone(kind):
    layer = make(kind, dropout=0.5).train()
    layer.lora_B["a"].weight.data.zero_()
    assert torch.equal(layer(data()), layer.base_layer(data()))


# ---- hooks --------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B"])
def test_hooks_run_and_change_no_number(kind, where):
    layer = make(kind, names=("a", "b"), dropout=0.5)
    module = layer.base_layer if where == "base_layer" else getattr(layer, where)["b"]
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    assert_near(layer(data()), layer, data(), ("a", "b"))
    assert len(calls) == 1, f"the hook on {where} ran {len(calls)} times"
    handle.remove()
    layer(data())
    assert len(calls) == 1


@each
@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B"])
def test_a_hook_may_replace_the_output(kind, where):
    layer = make(kind)
    module = layer.base_layer if where == "base_layer" else getattr(layer, where)["a"]
    base, delta = layer.base_layer(data()), layer(data()) - layer.base_layer(data())
    module.register_forward_hook(lambda _module, _inputs, output: output * 2)
    wanted = base * 2 + delta if where == "base_layer" else base + delta * 2
    torch.testing.assert_close(layer(data()), wanted)


# ---- gradients ----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")], ids=len)
def test_gradients_are_those_of_the_plain_composition(kind, dtype, tolerance, names):
    layer = make(kind, dtype, names, lora_bias=True)
    layer.base_layer.requires_grad_(False)
    x, direction = data(dtype).requires_grad_(), torch.randn(3, 5, OUT).to(dtype)
    inputs = [x] + [
        p for name in names for p in (layer.lora_A[name].weight, *layer.lora_B[name].parameters())
    ]
    found = torch.autograd.grad((layer(x) * direction).sum(), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = wide[0] @ weight(layer).T
    for n, name in enumerate(names):
        A, B, b = wide[1 + 3 * n : 4 + 3 * n]
        y = y + layer.scaling[name] * (wide[0] @ A.T @ B.T + b)
    wanted = torch.autograd.grad((y * direction.double()).sum(), wide)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@each
def test_a_trainable_base_gets_its_gradient_too(kind):
    layer = make(kind)
    layer.base_layer.requires_grad_(True)
    found = torch.autograd.grad(layer(data()).square().sum(), list(layer.base_layer.parameters()))
    plain = copy.deepcopy(layer.base_layer)
    part = layer.factors("a")
    wanted = torch.autograd.grad(
        (plain(data()) + data() @ part.delta().T).square().sum(), list(plain.parameters())
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- merging ------------------------------------------------------------------------------------------


@each
@every_dtype
def test_unmerge_gives_the_very_bits_and_objects_back(kind, dtype):
    layer = make(kind, dtype, ("a", "b"))
    before = Snapshot(layer)
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert layer.merged
    layer.unmerge()
    assert not layer.merged
    before.assert_same(layer)
    layer.unmerge()  # nothing is merged: nothing happens
    before.assert_same(layer)


@each
def test_a_thousand_cycles_in_bf16_change_no_bit(kind):
    layer = make(kind, torch.bfloat16, ("a", "b"))
    before, output = Snapshot(layer), layer(data(torch.bfloat16))
    for _ in range(1000):
        layer.merge()
        layer.unmerge()
    before.assert_same(layer)
    assert torch.equal(layer(data(torch.bfloat16)), output)


@each
@every_dtype
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merged_output_is_the_unmerged_one(kind, dtype, lora_bias):
    layer = make(kind, dtype, ("a", "b"), lora_bias=lora_bias)
    x = data(dtype)
    y, size = exact(layer, x, ("a", "b"))
    layer.merge()
    merged = layer(x).detach().double()
    # one rounding of the weight, one of the output, and the accumulation of IN products
    assert ((merged - y).abs() <= 3 * torch.finfo(dtype).eps * size).all()
    assert torch.equal(layer(x), layer.base_layer(x)), "a merged layer computes with its base alone"


@each
def test_merging_in_steps_rounds_once(kind):
    together, steps = (make(kind, torch.bfloat16, ("a", "b", "c")) for _ in range(2))
    together.merge()
    for name in ("a", "b", "c"):
        steps.merge(adapter_names=[name])
    assert bits(steps.base_layer.weight) == bits(together.base_layer.weight)


@each
def test_merging_again_or_elsewhere_does_nothing(kind):
    layer = make(kind)
    assert layer.prepare_merge(["not here"]) is None
    layer.merge()
    before = Snapshot(layer)
    layer.merge()
    before.assert_same(layer)


@each
@every_dtype
def test_prepare_changes_nothing(kind, dtype):
    layer = make(kind, dtype)
    before = Snapshot(layer)
    assert layer.prepare_merge() is not None
    layer.check_merge()
    before.assert_same(layer)


BAD = {
    "NaN in A": (torch.float32, lambda layer: layer.lora_A["b"].weight.data.view(-1)[0].fill_(float("nan"))),
    "infinity in B": (
        torch.float32,
        lambda layer: layer.lora_B["b"].weight.data.view(-1)[0].fill_(float("inf")),
    ),
    "overflow of fp16": (torch.float16, lambda layer: layer.lora_B["b"].weight.data.fill_(60000.0)),
    "overflow of fp32": (torch.float32, lambda layer: layer.lora_B["b"].weight.data.fill_(3e38)),
    "scaling": (torch.float32, lambda layer: layer.scaling.update(b=float("nan"))),
}


@each
@pytest.mark.parametrize("fault", list(BAD))
@pytest.mark.parametrize("call", ["merge", "check_merge"])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_is_not_finite_is_refused(kind, fault, call, merged_before):
    dtype, spoil = BAD[fault]
    layer = make(kind, dtype, ("a", "b"))
    spoil(layer)
    if merged_before:
        layer.merge(adapter_names=["a"])
    before = bits(layer.base_layer.weight), layer.base_layer.weight, list(layer.merged_adapters)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        getattr(layer, call)(adapter_names=["b"]) if call == "merge" else layer.check_merge(["b"])
    after = bits(layer.base_layer.weight), layer.base_layer.weight, list(layer.merged_adapters)
    assert after[0] == before[0]
    assert after[1] is before[1]
    assert after[2] == before[2]


@each
def test_unmerge_restores_whatever_happened_to_the_adapter(kind):
    layer = make(kind, torch.bfloat16)
    weight_bits = bits(layer.base_layer.weight)
    layer.merge()
    with torch.no_grad():
        layer.lora_A["a"].weight.add_(1)
        layer.lora_B["a"].weight.mul_(-3)
    layer.scaling["a"] = 77.0
    layer.unmerge()
    assert bits(layer.base_layer.weight) == weight_bits
    assert_near(layer(data(torch.bfloat16)), layer, data(torch.bfloat16), ("a",))


@each
def test_disabling_a_merged_layer_is_the_base_bit_for_bit(kind):
    layer = make(kind, lora_bias=True)
    base = layer.base_layer(data())
    layer.merge()
    merged = layer(data())
    layer.enable_adapters(False)
    assert torch.equal(layer(data()), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(data()), merged)
    layer.enable_adapters(False)
    layer.unmerge()
    assert torch.equal(layer(data()), base)


@each
def test_state_dict_of_a_merged_layer_is_the_unmerged_one(kind):
    layer = make(kind, names=("a", "b"), lora_bias=True)
    before = {key: bits(tensor) for key, tensor in layer.state_dict().items()}
    layer.merge()
    assert {key: bits(tensor) for key, tensor in layer.state_dict().items()} == before
    with pytest.raises(AdapterStateError, match="unmerge"):
        layer.load_state_dict(layer.state_dict())


@each
def test_removing_a_merged_adapter_is_refused(kind):
    layer = make(kind, names=("a", "b"))
    layer.merge(adapter_names=["a"])
    before = Snapshot(layer)
    with pytest.raises(AdapterStateError, match=r"'a' is merged.*unmerge"):
        layer.remove("a")
    before.assert_same(layer)
    layer.unmerge()
    layer.remove("a")
    assert layer.adapters == ("b",)
    assert_near(layer(data()), layer, data(), ("b",))


@each
def test_a_merge_for_good_leaves_no_way_back(kind):
    layer = make(kind, names=("a", "b"))
    layer.commit_merge_for_good(layer.prepare_merge(["a"]))
    for call in (layer.unmerge, lambda: layer.prepare_merge(["b"])):
        with pytest.raises(AdapterStateError, match="merge_and_unload"):
            call()


# ---- factors and delta --------------------------------------------------------------------------------


@each
@every_dtype
def test_delta_weight_has_the_layout_of_the_base(kind, dtype):
    layer = make(kind, dtype)
    delta = layer.get_delta_weight("a")
    assert delta.shape == layer.base_layer.weight.shape
    assert delta.dtype == dtype
    wanted = layer.factors("a").delta(torch.float64)
    wanted = wanted.T if isinstance(layer.base_layer, Conv1D) else wanted
    torch.testing.assert_close(delta, wanted.to(dtype))
    with pytest.raises(AdapterNameError, match=r"nope.*\['a'\]"):
        layer.factors("nope")


# ---- the layer as a module ----------------------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@each
@pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle, through_torch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_their_own(kind, copier, merged):
    layer = make(kind, names=("a", "b"))
    original_bits = bits(layer.base_layer.weight)
    if merged:
        layer.merge()
    twin = copier(layer)
    assert torch.equal(twin(data()), layer(data()))
    twin.unmerge()
    assert bits(twin.base_layer.weight) == original_bits
    assert layer.merged == merged
    with torch.no_grad():
        before = layer(data())
        twin.lora_B["a"].weight.add_(1)
        twin.base_layer.weight.add_(1)
    assert torch.equal(layer(data()), before)
    assert {k: tuple(v.shape) for k, v in twin.state_dict().items()} == {
        k: tuple(v.shape) for k, v in layer.state_dict().items()
    }
    twin.merge()
    assert twin.merged_adapters == ["a", "b"]
    assert sum("base_layer.weight" in key for key in twin.state_dict()) == 1


@each
def test_a_merged_copy_shows_the_unmerged_state(kind):
    layer = make(kind)
    twin = copy.deepcopy(layer)
    twin.merge()
    assert bits(twin.state_dict()["base_layer.weight"]) == bits(layer.base_layer.weight)


@each
def test_keys_of_the_state_dict(kind):
    layer = make(kind, lora_bias=True)
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.a.weight",
        "lora_B.a.weight",
        "lora_B.a.bias",
    }


def test_lora_bias_needs_a_bias_to_merge_into():
    kind = next(kind for kind in LAYER_KINDS if kind.name == "linear")
    layer = make(kind, bias=False, lora_bias=True)
    before = Snapshot(layer)
    with pytest.raises(UnsupportedError, match="lora_bias"):
        layer.merge()
    before.assert_same(layer)


@each
@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_may_keep_what_the_base_gave(kind, grad):
    layer = make(kind)
    x = torch.randn(5, layer.in_features)  # the product of a matrix is fresh, not a view
    with torch.no_grad():
        expected = layer.base_layer(x).clone()
    kept = []
    handle = layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.set_grad_enabled(grad):
        out = layer(x)
    handle.remove()
    assert torch.equal(kept[0], expected)
    assert not torch.equal(out, expected)


class Doubling(torch.nn.Linear):
    """A Linear that computes something of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapper(torch.nn.Module):
    """What takes a module's place, as sharding does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_a_subclass_is_called_not_computed_around():
    base = Doubling(6, 4)
    layer = with_factors(base)
    x = torch.randn(3, 6)
    expected = base(x) + x @ layer.factors("a").delta().T
    torch.testing.assert_close(layer(x), expected)


def test_a_wrapper_that_takes_the_bases_place_is_called():
    layer = with_factors(torch.nn.Linear(6, 4))
    x = torch.randn(3, 6)
    expected = layer(x)
    layer.base_layer = Wrapper(layer.base_layer)
    torch.testing.assert_close(layer(x), expected)
    assert layer.base_layer.calls == 1


def with_factors(base):
    layer = kind_of(base).layer(base, find_codec(base))
    spec = spec_of((base.out_features, base.in_features), r=2)
    layer.add("a", random_factors((base.out_features, base.in_features), r=2), spec, use_rslora=False)
    layer.set_adapter("a")
    return layer
