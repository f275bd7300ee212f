"""Every quantised weight keeps the codec contract: it is read, changed in fp32, quantised again, and given back.

A new library is one more row in `quantised.KINDS`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lorakit import LossyMergeError, MergeReport, NonFiniteError, UnsupportedError
from lorakit.layers import LAYER_KINDS, Linear, kind_of
from lorakit.layouts import Layout
from lorakit.types import Factors
from lorakit.weights import CODECS, find_codec
from lorakit.weights.dense import DenseCodec
from lorakit.weights.opaque import OpaqueCodec
from models import bits, random_factors, spec_of
from quantised import BY_NAME, IN, KINDS, OUT, linear, make, pieces

DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    kind: object
    bias: bool
    dtype: torch.dtype

    def make(self):
        return make(self.kind, self.bias, self.dtype)

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}-{'bias' if self.bias else 'plain'}-{dtype}"


CASES = [Case(kind, True, dtype) for kind in KINDS for dtype in DTYPES]
CASES += [Case(kind, False, torch.float32) for kind in KINDS]
each = pytest.mark.parametrize("case", CASES, ids=str)
in_full = pytest.mark.parametrize(
    "case", [case for case in CASES if case.dtype == torch.float32 and case.bias], ids=str
)


def inputs(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*(shape or (3, 5)), IN, generator=generator).to(dtype)


def change(size=0.2, bias=False, seed=5):
    """One adapter's blocks, as large as the weight itself unless `size` says otherwise."""
    return [[random_factors((OUT, IN), r=4, scaling=1.5, seed=seed, size=size, bias=bias)]]


def layer_on(base, names=("a",), *, lora_bias=False, size=0.2, dtype=torch.float32):
    """A layer with active adapters."""
    layer = Linear(base, find_codec(base))
    for n, name in enumerate(names):
        spec = spec_of((OUT, IN), dtype, r=2 + n, lora_bias=lora_bias)
        factors = random_factors(
            (OUT, IN), dtype, r=2 + n, scaling=spec.scaling, seed=n, size=size, bias=lora_bias
        )
        layer.add(name, [factors], spec, use_rslora=False)
    layer.set_adapter(names)
    return layer.eval()


def call(module, x):
    with torch.no_grad():
        return module(x)


# ---- who owns what, and what it says ----------------------------------------------------------------------


def test_each_codec_has_a_row():
    tested = {kind.codec for kind in KINDS} | {DenseCodec, OpaqueCodec}
    assert {type(codec) for codec in CODECS} == tested


@each
def test_one_codec_owns_it(case):
    base = case.make()
    (owner,) = [codec for codec in CODECS if codec.owns(base)]
    assert type(owner) is case.kind.codec
    assert owner.on_grid
    assert owner.can_read
    assert owner.can_write
    assert kind_of(base) is LAYER_KINDS[0]


@each
def test_shape_names_and_dtype(case):
    base = case.make()
    codec = find_codec(base)
    assert codec.layout(base) == Layout(OUT, (IN,))
    state = codec.state(base)
    weight, bias = codec.names
    assert getattr(base, weight) is state.weight
    assert getattr(base, bias) is state.bias
    assert (state.bias is not None) == case.bias
    known = case.dtype if case.bias or case.kind.name != "int8" else torch.float16
    assert codec.dtype(base) == known


@pytest.mark.parametrize("kind", [BY_NAME["nf4"], BY_NAME["int8"]], ids=str)
def test_what_is_not_quantised_yet_is_nobodys(kind):
    module = bnb.nn.Linear4bit(IN, OUT) if kind.name == "nf4" else bnb.nn.Linear8bitLt(IN, OUT)
    assert find_codec(module) is None


# ---- read, encode, swap -----------------------------------------------------------------------------------


@each
def test_read_is_what_the_base_multiplies_by(case):
    base = case.make()
    before = pieces(base)
    W = find_codec(base).read(base, torch.float32)
    assert W.shape == (OUT, IN)
    assert W.dtype == torch.float32
    assert not W.requires_grad
    base.train()  # in eval mode bitsandbytes rounds inputs (8 bits) or scales (4 bits) further
    eye = torch.eye(IN, dtype=case.dtype)
    found = call(base, eye).float().T - (0 if base.bias is None else base.bias.float()[:, None])
    near = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[case.dtype]
    torch.testing.assert_close(found, W, rtol=near, atol=near * W.abs().max().item())
    W.fill_(7)
    assert pieces(base) == before


@each
def test_it_is_near_what_was_quantised(case):
    """So a row that stores the transpose, or a wrong scale, is seen."""
    W = linear(case.bias, case.dtype).weight.detach().float()
    found = find_codec(base := case.make()).read(base, torch.float32)
    rounding = torch.finfo(case.dtype).eps  # HQQ dequantises in the dtype that it computes in
    assert (found - W).abs().max() <= (case.kind.step + rounding) * W.abs().max()
    assert (found - W).norm() <= 0.2 * W.norm()


@each
def test_what_is_encoded_is_read_again_up_to_the_grid(case):
    base = case.make()
    codec, before = find_codec(base), pieces(base)
    W = inputs(torch.float32, OUT) * 3
    keep = W.clone()
    old = codec.swap(base, codec.encode(base, W))
    found = codec.read(base, torch.float32)
    assert torch.equal(W, keep)
    assert (found - W).abs().max() <= 1.05 * case.kind.step * W.abs().max()
    assert codec.layout(base) == Layout(OUT, (IN,))
    torch.testing.assert_close(call(base.train(), inputs(case.dtype)).shape, torch.Size((3, 5, OUT)))
    codec.swap(base, old)
    assert pieces(base) == before


@in_full
def test_encoding_what_was_read_loses_little(case):
    """The numbers lie on the grid already; only the scales may come out otherwise."""
    base = case.make()
    codec = find_codec(base)
    W = codec.read(base, torch.float32)
    codec.swap(base, codec.encode(base, W))
    again = codec.read(base, torch.float32)
    moves = {"hqq-3": 0.2, "hqq-4": 0.1, "torchao-int4": 0.1}  # their scales follow from other extremes
    assert (again - W).norm() <= moves.get(case.kind.name, 0.01) * W.norm()


@each
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_swap_back_restores_objects_bits_and_outputs(case, called):
    base = case.make().eval()
    codec, x = find_codec(base), inputs(case.dtype)
    if called:
        call(base, x)
    before, was = pieces(base), codec.state(base)
    wanted = call(copy.deepcopy(base), x)
    for new in (codec.encode(base, torch.zeros(OUT, IN)), codec.merged(base, was, change())):
        handed_back = codec.swap(base, new)
        assert handed_back.weight is was.weight
        assert handed_back.bias is was.bias
        assert codec.state(base).weight is new.weight
        assert not new.weight.requires_grad
        call(base, x)
        codec.swap(base, handed_back)
        assert pieces(base) == before
    assert bits(call(base, x)) == bits(wanted)


# ---- merged -----------------------------------------------------------------------------------------------


def dense_sum(W, adapters):
    return W.double() + sum(b.scaling * b.B.double() @ b.A.double() for blocks in adapters for b in blocks)


@each
def test_the_error_is_what_it_says(case):
    base = case.make()
    codec = find_codec(base)
    W, adapters = codec.read(base, torch.float32), [*change(), *change(seed=6)]
    state = codec.merged(base, codec.state(base), adapters)
    wanted = dense_sum(W, adapters)
    lost = codec.read(base, torch.float32, state).double() - wanted
    assert state.error == pytest.approx((lost.norm() / (wanted - W).norm()).item(), rel=1e-3)
    assert 0 < state.error < 0.2


@in_full
def test_a_small_change_is_lost_and_the_error_says_so(case):
    base = case.make()
    codec = find_codec(base)
    for size in (0.02, 0.002):
        state = codec.merged(base, codec.state(base), change(size=size))
        wanted = dense_sum(codec.read(base, torch.float32), change(size=size))
        off = (codec.read(base, torch.float32, state) - wanted).norm()
        assert off <= 1.001 * (codec.read(base, torch.float32) - wanted).norm(), "further away than unmerged"
        assert (state.error == 1) == (state.weight is codec.state(base).weight)
    assert 0.3 < state.error <= 1


@each
def test_no_change_keeps_the_very_weight(case):
    base = case.make()
    codec = find_codec(base)
    ((block,),) = change()
    state = codec.merged(base, codec.state(base), [[Factors(block.A, block.B * 0, 1.0)]])
    assert state.weight is codec.state(base).weight
    assert state.error == 0


@in_full
def test_rows_are_multiplied_before(case):
    base = case.make()
    codec = find_codec(base)
    rows = torch.linspace(0.5, 2, OUT)
    state = codec.merged(base, codec.state(base), change(), rows)
    wanted = dense_sum(rows[:, None] * codec.read(base, torch.float32), change())
    found = codec.read(base, torch.float32, state)
    assert (found - wanted).norm() <= 0.2 * wanted.norm()
    assert state.error < 0.3


@in_full
def test_merging_starts_from_the_state_it_is_given(case):
    base = case.make()
    codec = find_codec(base)
    original = codec.state(base)
    wanted = codec.merged(base, original, [*change(), *change(seed=6)])
    codec.swap(base, codec.merged(base, original, change()))
    found = codec.merged(base, original, [*change(), *change(seed=6)])
    assert bits(codec.read(base, torch.float32, found)) == bits(codec.read(base, torch.float32, wanted))


@each
def test_biases_are_scaled_and_added(case):
    base = case.make()
    codec = find_codec(base)
    state = codec.state(base)
    assert codec.merged(base, state, change()).bias is state.bias
    adapters = [*change(bias=True), *change(bias=True, seed=6)]
    merged = codec.merged(base, state, adapters)
    if not case.bias:
        assert merged.bias is None
        return
    wanted = state.bias.double() + sum(b.bias.double() * b.scaling for blocks in adapters for b in blocks)
    torch.testing.assert_close(merged.bias.double(), wanted, rtol=4e-3, atol=4e-3)
    assert isinstance(merged.bias, nn.Parameter) == isinstance(state.bias, nn.Parameter)


# ---- the layer --------------------------------------------------------------------------------------------


@each
def test_merged_and_unmerged_agree_within_the_error(case):
    """`|(W' - W - delta) x| <= error |delta| |x|`, and what bf16 products round, for every sample."""
    layer, x = layer_on(case.make(), lora_bias=case.bias), inputs(case.dtype)
    layer.train()  # as above
    y = call(layer, x).float()
    prepared = layer.prepare_merge()
    layer.commit_merge(prepared)
    delta = layer.get_delta_weight("a").float().norm()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.04}[case.dtype] * y.norm(dim=-1)
    bound = 1.01 * prepared.error * delta * x.float().norm(dim=-1) + rounding
    off = (call(layer, x).float() - y).norm(dim=-1)
    assert (off <= bound).all()
    assert (call(layer.get_base_layer(), x).float() - y).norm(dim=-1).max() < y.norm(dim=-1).max()


@each
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_unmerge_restores_the_bits(case, called):
    base = case.make()
    layer, x = layer_on(base, lora_bias=case.bias), inputs(case.dtype)
    y = call(layer, x) if called else None
    before = pieces(base)
    layer.commit_merge(layer.prepare_merge())
    assert pieces(base) != before
    call(layer, x)
    layer.unmerge()
    assert pieces(base) == before
    assert y is None or bits(call(layer, x)) == bits(y)


@each
def test_a_merge_does_not_depend_on_what_ran_before(case):
    """On this CPU bitsandbytes packs 4-bit weights at the first call in eval mode, with scales rounded to bf16."""
    found = []
    for called in (False, True):
        layer, x = layer_on(case.make(), lora_bias=case.bias), inputs(case.dtype)
        if called:
            call(layer, x)
            call(layer, x[:1, :1])
        layer.commit_merge(layer.prepare_merge())
        found.append((pieces(layer.get_base_layer()), bits(call(layer, x))))
    assert found[0] == found[1]


@each
def test_disabled_it_is_the_base_while_merged(case):
    layer, x = layer_on(case.make()), inputs(case.dtype)
    wanted = bits(call(layer.get_base_layer(), x))
    for full in (None, case.dtype):
        layer.commit_merge(layer.prepare_merge(full=full))
        merged = bits(call(layer, x))
        layer.enable_adapters(False)
        assert bits(call(layer, x)) == wanted
        layer.enable_adapters(True)
        assert bits(call(layer, x)) == merged != wanted
        layer.unmerge()


@each
def test_merging_in_steps_is_merging_at_once(case):
    at_once, in_steps = layer_on(case.make(), ("a", "b")), layer_on(case.make(), ("a", "b"))
    at_once.commit_merge(at_once.prepare_merge())
    before = pieces(in_steps.get_base_layer())
    for name in "ab":
        in_steps.commit_merge(in_steps.prepare_merge([name]))
    assert pieces(in_steps.get_base_layer()) == pieces(at_once.get_base_layer())
    in_steps.unmerge()
    assert pieces(in_steps.get_base_layer()) == before


@each
def test_merging_into_full_precision(case):
    base = case.make()
    layer, x = layer_on(base, lora_bias=case.bias), inputs(case.dtype)
    before, names = pieces(base), set(layer.state_dict())
    y = call(layer.train(), x).float()
    prepared = layer.prepare_merge(full=case.dtype)
    layer.commit_merge(prepared)
    plain = layer.get_base_layer()
    assert prepared.error is None
    assert type(plain) is nn.Linear
    assert {p.dtype for p in plain.parameters()} == {case.dtype}
    W = dense_sum(layer.read_weight(torch.float32), [layer.blocks("a")])
    torch.testing.assert_close(
        plain.weight.double(), W, rtol=8e-3 if case.dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    near = {torch.float32: 1e-5, torch.bfloat16: 0.03}[case.dtype]
    torch.testing.assert_close(call(layer, x).float(), y, rtol=near, atol=near * y.abs().max().item())
    assert set(layer.state_dict()) == names
    layer.unmerge()
    assert layer.get_base_layer() is base
    assert pieces(base) == before


@in_full
@pytest.mark.parametrize(
    "order", [(None, torch.float32), (torch.float32, None)], ids=["then-full", "then-quantised"]
)
def test_the_second_merge_may_be_of_the_other_kind(case, order):
    base = case.make()
    layer, before = layer_on(base, ("a", "b")), pieces(base)
    for name, full in zip("ab", order, strict=True):
        layer.commit_merge(layer.prepare_merge([name], full))
    once = layer_on(case.make(), ("a", "b"))
    once.commit_merge(once.prepare_merge(full=order[1]))
    assert pieces(layer.get_base_layer()) == pieces(once.get_base_layer())
    layer.unmerge()
    assert layer.get_base_layer() is base
    assert pieces(base) == before


@each
@pytest.mark.parametrize("full", [False, True], ids=["quantised", "full"])
def test_a_state_dict_describes_the_unmerged_layer(case, full):
    layer = layer_on(case.make())
    before = {name: _digest(value) for name, value in layer.state_dict().items()}
    layer.commit_merge(layer.prepare_merge(full=case.dtype if full else None))
    after = {name: _digest(value) for name, value in layer.state_dict().items()}
    assert after == before
    layer.unmerge()


def _digest(value):
    if isinstance(value, torch.Tensor) and type(value) not in {torch.Tensor, nn.Parameter}:
        value = (
            value.dequantize()
            if hasattr(type(value), "tensor_data_names")
            else value.as_subclass(torch.Tensor)
        )
    return bits(value) if isinstance(value, torch.Tensor) else repr(value)


# ---- refusals ---------------------------------------------------------------------------------------------


@in_full
@pytest.mark.parametrize("full", [False, True], ids=["quantised", "full"])
@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["nan", "overflow"])
def test_numbers_that_are_none_are_refused(case, full, value):
    base = case.make()
    layer = layer_on(base)
    before = pieces(base)
    with torch.no_grad():
        layer.lora_B["a"].weight[0, 0] = value
        layer.lora_A["a"].weight[0, 0] = 3e38
    with pytest.raises(NonFiniteError, match="'a'"):
        layer.prepare_merge(full=case.dtype if full else None)
    with pytest.raises(NonFiniteError):
        layer.check_merge(full=case.dtype if full else None)
    assert pieces(base) == before
    assert not layer.merged


@in_full
def test_a_lossy_merge_of_a_layer_is_refused(case):
    base = case.make()
    layer, before = layer_on(base, size=0.002), pieces(base)
    with pytest.raises(LossyMergeError, match="dequantize=True") as caught:
        layer.merge()
    assert isinstance(caught.value.report, MergeReport)
    assert pieces(base) == before
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_lora_bias_needs_a_bias(kind):
    layer = layer_on(make(kind, bias=False), lora_bias=True)
    with pytest.raises(UnsupportedError, match="no bias"):
        layer.merge()


# ---- packing of 4-bit weights -----------------------------------------------------------------------------

PACKED = [kind for kind in KINDS if kind.name in {"nf4", "nf4-double", "fp4"}]


def pack(base):
    """What a call in eval mode does where the CPU has bf16 instructions, also where it has none."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    if not getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        base.weight.data, _ = _convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)


def watched(kind, dtype=torch.float32):
    """A layer on a base that is watched as where the CPU has bf16 instructions, also where it has none."""
    base = make(kind, dtype=dtype)
    here, base.support_avx512bf16_for_cpu = base.support_avx512bf16_for_cpu, True
    layer = layer_on(base, dtype=torch.float32)
    base.support_avx512bf16_for_cpu = here
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_a_packed_weight_is_read_as_it_was(kind, dtype):
    layer, x = watched(kind, dtype), inputs(dtype)
    base = layer.base_layer
    W, before = layer.read_weight(torch.float32), pieces(base)
    call(layer.train(), x)  # the layer sees the scales before they are packed
    pack(base)
    assert bits(base.weight) != before["weight"]
    assert bits(layer.read_weight(torch.float32)) == bits(W)
    layer.state_dict()
    assert pieces(base) == before


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_a_weight_packed_before_the_adapter_came_is_read_as_the_base_computes(kind):
    base = make(kind)
    W = find_codec(base).read(base, torch.float32)
    pack(base)
    found = find_codec(base).read(base, torch.float32)
    torch.testing.assert_close(found, W, rtol=2**-8, atol=0)
    layer = layer_on(base)
    packed = pieces(base)
    layer.commit_merge(layer.prepare_merge())
    layer.unmerge()
    assert pieces(base) == packed


@pytest.mark.parametrize("kind", PACKED, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_reach_the_input_after_an_evaluation(kind, mode):
    layer = watched(kind).train(mode == "train")
    x = inputs().requires_grad_()
    layer(x).sum().backward()
    wanted, x.grad = x.grad, None
    call(layer.eval(), x.detach())
    pack(layer.get_base_layer())
    layer.train(mode == "train")(x).sum().backward()
    assert bits(x.grad) == bits(wanted)


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_hooks_go_with_the_layer(kind):
    layer = watched(kind)
    base = layer.base_layer
    assert base._forward_pre_hooks
    layer.release()
    assert not base._forward_pre_hooks
    assert not base._state_dict_pre_hooks


@pytest.mark.parametrize("kind", PACKED, ids=str)
def test_a_copy_has_hooks_of_its_own(kind):
    layer = watched(kind)
    twin = copy.deepcopy(layer)
    assert bits(call(twin, inputs())) == bits(call(layer, inputs()))
    layer.release()
    assert not layer.base_layer._forward_pre_hooks
    assert len(twin.base_layer._forward_pre_hooks) == 1
    call(twin, inputs())
    twin.release()
    assert not twin.base_layer._forward_pre_hooks


# ---- elsewhere --------------------------------------------------------------------------------------------


@in_full
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_a_state_that_follows_its_base_elsewhere_stands_for_the_same_numbers(case, called):
    """Of the devices there is only one here, so the state is sent to where it is."""
    base = case.make().eval()
    codec = find_codec(base)
    if called:
        call(base, inputs())
    W = codec.read(base, torch.float32)
    state = codec.state(base)
    assert codec.moved(base, state) is state
    weight, more = codec.at(codec.held(base), torch.device("cpu"))
    found = codec.read(base, torch.float32, state._replace(weight=weight, more=more))
    torch.testing.assert_close(
        found, W, rtol=2**-8 if called else 0, atol=0
    )  # nobody watched it being packed
    codec.swap(base, state._replace(weight=weight, more=more))
    assert call(base, inputs()).shape == (3, 5, OUT)
