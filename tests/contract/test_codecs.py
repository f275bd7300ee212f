"""Every way of storing a weight keeps the codec contract. A new codec is one more row in `BASES`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.weights import CODECS, find_codec
from models import Snapshot, random_factors

SHAPE = (96, 128)  # (out, in)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear(dtype, bias=True):
    return nn.Linear(SHAPE[1], SHAPE[0], bias=bias, dtype=dtype)


def linear_without_bias(dtype):
    return linear(dtype, bias=False)


def conv1d(dtype):
    made = Conv1D(SHAPE[0], SHAPE[1])
    nn.init.normal_(made.bias)
    return made.to(dtype)


BASES = {"dense": (linear, linear_without_bias, conv1d)}
FOREIGN = (nn.Embedding(4, 4), nn.Conv2d(2, 2, 1), nn.LayerNorm(4), nn.Identity(), nn.Bilinear(2, 2, 2))
CASES = [
    pytest.param(codec, make, dtype, id=f"{codec.name}-{make.__name__}-{str(dtype).removeprefix('torch.')}")
    for codec in CODECS
    for make in BASES[codec.name]
    for dtype in DTYPES
]
each = pytest.mark.parametrize(("codec", "make", "dtype"), CASES)


def test_each_codec_has_a_row_here():
    assert {codec.name for codec in CODECS} == set(BASES)


def plain(base):
    """The stored weight as (out, in) in fp64, without asking the codec."""
    weight = base.weight.detach().double()
    return weight.T if isinstance(base, Conv1D) else weight


@each
def test_owns_its_own_alone(codec, make, dtype):
    base = make(dtype)
    assert [other.name for other in CODECS if other.owns(base)] == [codec.name]
    assert find_codec(base) is codec


@pytest.mark.parametrize("module", FOREIGN, ids=lambda module: type(module).__name__)
def test_nobody_owns_what_is_no_matrix(module):
    assert find_codec(module) is None


def test_a_weight_of_integers_is_nobodys():
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert find_codec(base) is None


@each
def test_shape_is_out_by_in(codec, make, dtype):
    base = make(dtype)
    assert codec.shape(base) == SHAPE
    assert codec.transposed(base) == (tuple(base.weight.shape) != SHAPE)


@each
@pytest.mark.parametrize("read_as", DTYPES, ids=str)
def test_read_is_fresh_and_right(codec, make, dtype, read_as):
    base = make(dtype)
    W = codec.read(base, read_as)
    assert W.dtype == read_as
    assert tuple(W.shape) == SHAPE
    assert not W.requires_grad
    torch.testing.assert_close(W, plain(base).to(read_as), rtol=0, atol=0)
    before = Snapshot(base)
    W.fill_(7)
    before.assert_same(base)


@each
def test_encode_then_swap_gives_what_was_encoded(codec, make, dtype):
    base = make(dtype)
    W = torch.randn(SHAPE, dtype=torch.float64)
    keep = W.clone()
    state = codec.encode(base, W)
    codec.swap(base, state)
    torch.testing.assert_close(codec.read(base, dtype), W.to(dtype), rtol=0, atol=0)
    base.weight.data.fill_(1)
    assert torch.equal(W, keep), "the module shares memory with the matrix it was given"


@each
def test_swap_back_restores_objects_and_bits(codec, make, dtype):
    base = make(dtype)
    base.weight.requires_grad_(False)
    before = Snapshot(base)
    was = codec.state(base)
    assert was.weight is base.weight
    assert was.bias is base.bias
    new = codec.encode(base, torch.zeros(SHAPE))
    handed_back = codec.swap(base, new)
    assert handed_back.weight is was.weight
    assert handed_back.bias is was.bias
    assert base.weight is new.weight
    assert base.weight.requires_grad is False
    assert codec.swap(base, handed_back).weight is new.weight
    before.assert_same(base)


@each
@pytest.mark.parametrize("count", [1, 3])
def test_merged_is_rounded_once(codec, make, dtype, count):
    base = make(dtype)
    W = plain(base).clone()
    parts = [random_factors(SHAPE, r=2 + n, scaling=0.5 + n, seed=n) for n in range(count)]
    codec.swap(base, codec.merged(base, codec.state(base), parts))
    found = codec.read(base, torch.float64)
    exact = W + sum(part.delta(torch.float64) for part in parts)
    if dtype in {torch.bfloat16, torch.float16}:
        right = (found == exact.to(dtype).double()).double().mean().item()
        assert right >= 0.999
    size = W.abs() + sum(part.scaling * (part.B.abs() @ part.A.abs()).double() for part in parts)
    steps = 1 if dtype in {torch.bfloat16, torch.float16} else sum(part.rank for part in parts) + 2
    assert ((found - exact).abs() <= steps * torch.finfo(dtype).eps * size).all()
    assert (found - W).abs().max() > 0.05, "the deltas must matter for this to test anything"


@each
def test_reading_and_merging_leave_the_base_alone(codec, make, dtype):
    base = make(dtype)
    before = Snapshot(base)
    codec.read(base, torch.float32)
    codec.encode(base, torch.zeros(SHAPE))
    codec.merged(base, codec.state(base), [random_factors(SHAPE, bias=True)])
    before.assert_same(base)


@each
def test_merged_starts_from_the_state_it_is_given(codec, make, dtype):
    base = make(dtype)
    zero = codec.encode(base, torch.zeros(SHAPE))
    part = random_factors(SHAPE)
    codec.swap(base, codec.merged(base, zero, [part]))
    torch.testing.assert_close(codec.read(base, dtype), part.delta(torch.float64).to(dtype))


@each
def test_bias_rule(codec, make, dtype):
    base = make(dtype)
    state = codec.state(base)
    without = codec.merged(base, state, [random_factors(SHAPE)])
    assert without.bias is base.bias
    two = [
        random_factors(SHAPE, bias=True, scaling=2.0),
        random_factors(SHAPE, bias=True, scaling=-0.5, seed=9),
    ]
    merged = codec.merged(base, state, two)
    if base.bias is None:
        assert merged.bias is None
        return
    wanted = base.bias.double() + sum(part.scaling * part.bias.double() for part in two)
    assert merged.bias.dtype == dtype
    torch.testing.assert_close(merged.bias.detach(), wanted.detach().to(dtype), rtol=0, atol=0)
