"""Every way of storing weights keeps the codec contract. A new codec is one more row in `BASES`."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from contract.rows import DTYPES, EXPERTS, IN, OUT, ROWS, WORDS, Mixture, codec_of, dense_delta
from lorakit.layouts import Layout
from lorakit.weights import CODECS, ParameterCodec, find_codec
from lorakit.weights.dense import DenseCodec
from models import Snapshot, bits, random_factors


class Base(NamedTuple):
    """A base module of a row, with a bias or not, in one dtype."""

    row: object
    bias: bool
    dtype: torch.dtype

    def make(self):
        torch.manual_seed(1)
        return self.row.base(self.bias).to(self.dtype)

    def __str__(self):
        return f"{self.row}-{'bias' if self.bias else 'plain'}-{str(self.dtype).removeprefix('torch.')}"


BASES = {
    DenseCodec: [row for row in ROWS if row.kind != "parameter"],
    ParameterCodec: [row for row in ROWS if row.kind == "parameter"],
}
CASES = [
    Base(row, bias, dtype)
    for rows in BASES.values()
    for row in rows
    for bias in ((True, False) if row.has_bias else (False,))
    for dtype in DTYPES
]
each = pytest.mark.parametrize("case", CASES, ids=str)
in_half = pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.bfloat16], ids=str)


def test_each_codec_has_a_row_here():
    plain = {type(codec) for codec in CODECS if not codec.on_grid}  # the others: test_quantised_codecs.py
    assert plain | {ParameterCodec} == set(BASES)


def weight_of(case, base):
    return getattr(base, case.row.attribute)


def plain(case, base):
    """The stored weight as `read` is to give it, in fp64, without asking the codec."""
    weight = weight_of(case, base).detach().double()
    if case.row.stored == "conv":
        return weight.flatten(1)
    return weight.mT if case.row.stored.endswith("transposed") else weight


def parts_for(layout, count, *, bias=False):
    """Blocks of several adapters."""
    return [
        [
            random_factors(
                layout.block_shape, r=2 + n, scaling=0.5 + n, seed=31 * n + block, bias=bias, size=0.2
            )
            for block in range(layout.blocks)
        ]
        for n in range(count)
    ]


def sum_of(case, layout, adapters, *, absolute=False):
    """What the blocks of several adapters amount to, in the shape of the stored weight, made dense."""
    total = 0
    for blocks in adapters:
        A, B, _ = layout.join(blocks)
        A, B = A.double(), B.double()
        A, B = (A.abs(), B.abs()) if absolute else (A, B)
        total = total + blocks[0].scaling * dense_delta(case.row, A, B)
    return total


# ---- who owns what --------------------------------------------------------------------------------------


@each
def test_owns_its_own_alone(case):
    base = case.make()
    codec = codec_of(case.row, base)
    assert type(codec) in BASES
    assert case.row in BASES[type(codec)]
    if case.row.kind == "parameter":
        assert find_codec(base) is None
    else:
        assert [other for other in CODECS if other.owns(base)] == [codec]


FOREIGN = (
    nn.LayerNorm(4),
    nn.Identity(),
    nn.Bilinear(2, 2, 2),
    nn.ConvTranspose1d(2, 2, 1),
    nn.EmbeddingBag(3, 3),
    nn.LazyLinear(3),
    nn.LazyConv1d(3, 1),
    Mixture(OUT, IN),
)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("module", FOREIGN, ids=lambda module: type(module).__name__)
def test_nobody_owns_what_is_no_known_module(module):
    assert find_codec(module) is None


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=str)
@pytest.mark.parametrize(
    "make", [lambda w: w.to(torch.int8), lambda w: w.to(torch.complex64)], ids=["integers", "complex"]
)
def test_a_weight_that_is_no_plain_floating_point_array_is_nobodys(case, make):
    base = case.make()
    setattr(base, case.row.attribute, nn.Parameter(make(weight_of(case, base).detach()), requires_grad=False))
    assert codec_of(case.row, base) is None


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(4))
        self.four = nn.Parameter(torch.ones(2, 2, 2, 2))
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.buffer = nn.Buffer(torch.ones(2, 2))
        self.child = nn.Linear(2, 2)
        self.attribute = torch.ones(2, 2)
        self.register_parameter("missing", None)


def test_only_matrices_and_stacks_of_them_are_adapted_by_name():
    found = {
        name
        for name in (
            "vector",
            "four",
            "matrix",
            "buffer",
            "child",
            "attribute",
            "missing",
            "unknown",
            "child.weight",
        )
        if find_codec(Holder(), name) is not None
    }
    assert found == {"matrix"}


# ---- layout ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "linear": Layout(OUT, (IN,)),
    "conv1d": Layout(OUT, (IN,), transposed=True),
    "embedding": Layout(OUT, (WORDS,), transposed=True),
    "line": Layout(6, (4, 3)),
    "image": Layout(6, (4, 3, 2)),
    "image_groups": Layout(6, (4, 3, 3), groups=2),
    "image_depthwise": Layout(4, (4, 3, 3), groups=4),
    "volume_groups": Layout(6, (4, 2, 2, 2), groups=2),
    "matrix": Layout(OUT, (IN,)),
    "experts": Layout(OUT, (IN,), experts=EXPERTS),
    "experts_transposed": Layout(OUT, (IN,), experts=EXPERTS, transposed=True),
}


@pytest.mark.parametrize("case", [case for case in CASES if case.row.name in LAYOUTS], ids=str)
def test_layout_is_read_off_the_module(case):
    base = case.make()
    assert codec_of(case.row, base).layout(base) == LAYOUTS[case.row.name]


def test_a_stack_without_a_word_of_its_order_is_experts_out_in():
    base = Mixture(2, 3, 5)
    assert ParameterCodec("weights").layout(base) == Layout(3, (5,), experts=2)
    base.is_transposed = False
    assert ParameterCodec("weights").layout(base) == Layout(3, (5,), experts=2)


@each
def test_names_are_the_attributes(case):
    base = case.make()
    codec = codec_of(case.row, base)
    weight, bias = codec.names
    state = codec.state(base)
    assert getattr(base, weight) is state.weight
    assert (getattr(base, bias, None) if bias else None) is state.bias
    assert state.groups == getattr(base, "groups", None)
    assert codec.can_write


# ---- read, encode, swap ---------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("read_as", DTYPES, ids=str)
def test_read_is_fresh_and_right(case, read_as):
    base = case.make()
    before = Snapshot(base)
    W = codec_of(case.row, base).read(base, read_as)
    assert W.dtype == read_as
    assert not W.requires_grad
    torch.testing.assert_close(W, plain(case, base).to(read_as), rtol=0, atol=0)
    W.fill_(7)
    before.assert_same(base)


@each
@pytest.mark.parametrize("read_as", DTYPES, ids=str)
def test_peek_is_what_read_gives_and_copies_no_more_than_it_must(case, read_as):
    base = case.make()
    codec = codec_of(case.row, base)
    found = codec.peek(base, read_as)
    assert found.dtype == read_as
    assert not found.requires_grad
    assert torch.equal(found, codec.read(base, read_as))
    own = weight_of(case, base).untyped_storage().data_ptr()
    assert (found.untyped_storage().data_ptr() == own) == (read_as == case.dtype)


@each
def test_encode_then_swap_gives_what_was_encoded(case):
    base = case.make()
    codec = codec_of(case.row, base)
    W = torch.randn(codec.read(base, case.dtype).shape, dtype=torch.float64)
    keep = W.clone()
    codec.swap(base, codec.encode(base, W))
    torch.testing.assert_close(codec.read(base, case.dtype), W.to(case.dtype), rtol=0, atol=0)
    assert weight_of(case, base).is_contiguous()
    weight_of(case, base).data.fill_(1)
    assert torch.equal(W, keep), "the module shares memory with the matrix it was given"


@each
def test_what_is_read_encodes_to_the_same_bits(case):
    base = case.make()
    codec, before = codec_of(case.row, base), bits(weight_of(case, base))
    codec.swap(base, codec.encode(base, codec.read(base, torch.float64)))
    assert bits(weight_of(case, base)) == before


@each
@pytest.mark.parametrize("flag", [True, False])
def test_swap_back_restores_objects_and_bits(case, flag):
    base = case.make().requires_grad_(flag)
    codec, before = codec_of(case.row, base), Snapshot(base)
    groups = getattr(base, "groups", None)
    was = codec.state(base)
    layout = codec.layout(base)
    for new in (
        codec.encode(base, torch.zeros_like(codec.read(base, torch.float32))),
        codec.merged(base, was, parts_for(layout, 1)),
    ):
        handed_back = codec.swap(base, new)
        assert handed_back.weight is was.weight
        assert handed_back.bias is was.bias
        assert handed_back.groups == groups
        assert weight_of(case, base) is new.weight
        assert new.weight.requires_grad is flag
        assert getattr(base, "groups", None) == new.groups
        assert codec.swap(base, handed_back).weight is new.weight
        before.assert_same(base)
        assert getattr(base, "groups", None) == groups


# ---- merged ---------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("count", [1, 3])
def test_merged_is_rounded_once(case, count):
    base = case.make()
    codec = codec_of(case.row, base)
    layout = codec.layout(base)
    W = layout.make_dense(weight_of(case, base).detach().double())
    adapters = parts_for(layout, count)
    merged = codec.merged(base, codec.state(base), adapters)
    found = merged.weight.detach().double()
    exact = W + sum_of(case, layout, adapters)
    assert merged.weight.dtype == case.dtype
    if case.dtype in {torch.bfloat16, torch.float16}:
        assert (found == exact.to(case.dtype).double()).double().mean() >= 0.99
    size = W.abs() + sum_of(case, layout, adapters, absolute=True)
    steps = 1 if case.dtype.itemsize == 2 else 2 + sum(blocks[0].rank for blocks in adapters)
    assert ((found - exact).abs() <= steps * torch.finfo(case.dtype).eps * size).all()
    assert (found - W).abs().max() > 0.05, "the deltas must matter for this to test anything"


@in_half
def test_reading_and_merging_leave_the_base_alone(case):
    base = case.make()
    codec, before = codec_of(case.row, base), Snapshot(base)
    layout = codec.layout(base)
    codec.encode(base, torch.zeros_like(codec.read(base, torch.float32)))
    codec.merged(base, codec.state(base), parts_for(layout, 2, bias=case.row.has_bias))
    before.assert_same(base)


@each
def test_merged_starts_from_the_state_it_is_given(case):
    base = case.make()
    codec = codec_of(case.row, base)
    layout = codec.layout(base)
    zero = codec.encode(base, torch.zeros_like(codec.read(base, torch.float32)))
    adapters = parts_for(layout, 1)
    found = codec.merged(base, zero, adapters).weight.detach()
    torch.testing.assert_close(found, sum_of(case, layout, adapters).to(case.dtype))


@in_half
def test_merged_of_an_original_state_while_the_base_holds_a_merged_one(case):
    """As merging in steps asks for it."""
    base = case.make()
    codec = codec_of(case.row, base)
    first, both = parts_for(codec.layout(base), 1), parts_for(codec.layout(base), 2)
    original = codec.state(base)
    wanted = codec.merged(base, original, both)
    codec.swap(base, codec.merged(base, original, first))
    found = codec.merged(base, original, both)
    assert bits(found.weight) == bits(wanted.weight)
    assert found.groups == wanted.groups


@in_half
def test_order_and_company_of_adapters_round_alike(case):
    base = case.make()
    codec = codec_of(case.row, base)
    layout, state = codec.layout(base), codec.state(base)
    assert bits(codec.merged(base, state, []).weight) == bits(layout.make_dense(state.weight))
    adapters = parts_for(layout, 2)
    no_change = [[type(block)(block.A, torch.zeros_like(block.B), 1.0) for block in adapters[1]]]
    wanted = codec.merged(base, state, adapters[:1]).weight
    assert bits(codec.merged(base, state, adapters[:1] + no_change).weight) == bits(wanted)


@each
def test_bias_rule(case):
    base = case.make()
    codec = codec_of(case.row, base)
    layout, state = codec.layout(base), codec.state(base)
    assert codec.merged(base, state, parts_for(layout, 1)).bias is state.bias
    if state.bias is None:
        return
    adapters = parts_for(layout, 2, bias=True)
    merged = codec.merged(base, state, adapters)
    added = [torch.cat([block.bias for block in blocks]).double() * blocks[0].scaling for blocks in adapters]
    assert merged.bias.dtype == case.dtype
    assert merged.bias.requires_grad == state.bias.requires_grad
    torch.testing.assert_close(
        merged.bias.detach(), (state.bias.double() + sum(added)).detach().to(case.dtype), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.row.has_bias and not case.bias and case.row.kind != "conv1d"],
    ids=str,
)
def test_a_bias_that_is_not_there_stays_so(case):
    base = case.make()
    codec = codec_of(case.row, base)
    merged = codec.merged(base, codec.state(base), parts_for(codec.layout(base), 1, bias=True))
    assert merged.bias is None
