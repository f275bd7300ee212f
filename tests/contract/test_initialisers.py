"""Every initialiser keeps the contract on every layout. A new one is one more row in `PROMISES`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from lorakit.errors import PlanError
from lorakit.init import INITIALISERS, initialise
from lorakit.init.registry import initialiser_name
from lorakit.layouts import Layout, matrix_layout
from models import bits, spec_of

R = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Kind(NamedTuple):
    """One layout, as large as the distribution of its elements needs, and the kind of layer that it is for."""

    kind: str
    layout: Layout

    @property
    def block(self):
        """(out, in, rank) of one block."""
        return (*self.layout.block_shape, self.layout.block_rank(R))


KINDS = {
    "matrix": Kind("linear", matrix_layout(200, 300)),
    "conv1d": Kind("conv1d", matrix_layout(200, 300, transposed=True)),
    "embedding": Kind("embedding", matrix_layout(300, 200, transposed=True)),
    "image": Kind("conv", Layout(200, (30, 3, 3))),
    "volume": Kind("conv", Layout(160, (10, 2, 3, 3))),
    "grouped": Kind("conv", Layout(200, (40, 3, 3), groups=4)),
    "depthwise": Kind("conv", Layout(400, (40, 5), groups=8)),
    "experts": Kind("parameter", Layout(100, (150,), experts=4)),
    "experts_transposed": Kind("parameter", Layout(100, (150,), experts=4, transposed=True)),
}


class Promise(NamedTuple):
    """What a scheme promises of the factors of one block; functions of the block's out, in and rank."""

    zero_delta: bool
    A_bound: object
    B_bound: object
    A_std: object
    B_std: object


def zero(*_):
    return 0.0


def none(*_):
    return None


UNIFORM = 1 / 3**0.5
EMBEDDING = Promise(True, zero, none, zero, lambda out, inner, r: 1.0)
PROMISES = {
    "default": Promise(
        True, lambda out, inner, r: inner**-0.5, zero, lambda out, inner, r: inner**-0.5 * UNIFORM, zero
    ),
    # its standard deviation is of the adapter's rank, which the groups of a convolution share
    "gaussian": Promise(True, none, zero, lambda out, inner, r: 1 / R, zero),
    "random": Promise(
        False,
        lambda out, inner, r: inner**-0.5,
        lambda out, inner, r: r**-0.5,
        lambda out, inner, r: inner**-0.5 * UNIFORM,
        lambda out, inner, r: r**-0.5 * UNIFORM,
    ),
    # Each row of A is 0.1 times a sum of r/2 normals, weighted by entries of a random orthogonal matrix.
    "orthogonal": Promise(True, none, none, *[lambda out, inner, r: 0.1 * 0.5**0.5] * 2),
}
PROMISES["eva"] = PROMISES["default"]  # until data have been seen
OF_EMBEDDINGS = {
    "default": EMBEDDING,
    "eva": EMBEDDING,
    "gaussian": EMBEDDING,
    "random": Promise(False, none, none, *[lambda out, inner, r: 1.0] * 2),
    "orthogonal": PROMISES["orthogonal"],
}
each = pytest.mark.parametrize("name", list(INITIALISERS))
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def promise_of(name, kind):
    return (OF_EMBEDDINGS if KINDS[kind].kind == "embedding" else PROMISES)[name]


def unread(_dtype):
    raise AssertionError("a scheme that looks only at shapes read the base weight")


def spec_for(name, kind, *, r=R, **changes):
    spec = spec_of((1, 1), r=r, init=name)
    return replace(spec, kind=KINDS[kind].kind, layout=KINDS[kind].layout, **changes)


def make(name, kind, *, seed=11, **changes):
    """The factors of each block."""
    torch.manual_seed(seed)
    results = initialise(spec_for(name, kind, **changes), unread)
    assert all(result.base_weight is None for result in results)
    return [result.factors for result in results]


def all_of(factors, attribute):
    return torch.stack([getattr(block, attribute) for block in factors])


def test_each_initialiser_has_a_row_here():
    assert set(INITIALISERS) == set(PROMISES) == set(OF_EMBEDDINGS)


@each
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_shapes_dtype_device(name, kind, dtype, lora_bias):
    factors = make(name, kind, dtype=dtype, lora_bias=lora_bias)
    out, inner, r = KINDS[kind].block
    assert len(factors) == KINDS[kind].layout.blocks
    for block in factors:
        assert tuple(block.A.shape) == (r, inner)
        assert tuple(block.B.shape) == (out, r)
        assert block.scaling == spec_of((1, 1), r=R).scaling
        assert (block.bias is not None) == lora_bias
        tensors = [block.A, block.B] + ([block.bias] if lora_bias else [])
        assert not lora_bias or tuple(block.bias.shape) == (out,)
        for tensor in tensors:
            assert tensor.dtype == dtype
            assert tensor.device.type == "cpu"
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
            assert tensor.isfinite().all()


@each
@every_kind
def test_on_meta_nothing_is_allocated(name, kind):
    for block in make(name, kind, device=torch.device("meta"), lora_bias=True):
        assert block.A.is_meta
        assert block.B.is_meta
        assert block.bias.is_meta


@each
@every_kind
def test_begins_as_no_change_where_promised(name, kind):
    for block in make(name, kind, lora_bias=True):
        delta, bias = block.delta(torch.float64).abs().max().item(), block.bias.abs().max().item()
        if promise_of(name, kind).zero_delta:
            assert delta <= 1e-6  # orthogonal: the rounding of fp32
            assert bias == 0
        else:
            assert delta > 1e-2
            assert bias > 1e-2 or kind == "embedding"  # which has none


@each
@every_kind
def test_no_change_of_the_stored_weight_either(name, kind):
    layout = KINDS[kind].layout
    A, B, _ = layout.join(make(name, kind))
    shape_A, shape_B = layout.factor_shapes(R)
    assert tuple(A.shape) == shape_A
    assert tuple(B.shape) == shape_B
    if promise_of(name, kind).zero_delta:
        assert all(block.delta(torch.float64).abs().max() <= 1e-6 for block in layout.split(A, B, 1.0))


@each
@every_kind
def test_one_seed_one_result(name, kind):
    first, second, other = (make(name, kind, seed=seed) for seed in (11, 11, 12))
    for one, two, three in zip(first, second, other, strict=True):
        assert bits(one.A) == bits(two.A)
        assert bits(one.B) == bits(two.B)
        assert (bits(one.A), bits(one.B)) != (bits(three.A), bits(three.B))


@each
@every_kind
def test_blocks_are_drawn_apart(name, kind):
    factors = make(name, kind)
    assert len({(bits(block.A), bits(block.B)) for block in factors}) == len(factors)


@each
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_numbers_in_every_dtype(name, kind, dtype):
    for wide, narrow in zip(make(name, kind), make(name, kind, dtype=dtype), strict=True):
        assert torch.equal(wide.A.to(dtype), narrow.A)
        assert torch.equal(wide.B.to(dtype), narrow.B)


@each
@every_kind
def test_distribution(name, kind):
    promise, factors = promise_of(name, kind), make(name, kind)
    for attribute, bound, std in (
        ("A", promise.A_bound(*KINDS[kind].block), promise.A_std(*KINDS[kind].block)),
        ("B", promise.B_bound(*KINDS[kind].block), promise.B_std(*KINDS[kind].block)),
    ):
        tensor = all_of(factors, attribute)
        if bound is not None:
            assert tensor.abs().max() <= bound
            assert tensor.abs().max() >= 0.99 * bound
        # orthogonal has only one small random matrix a block: its halves vary more than the elements of a plain draw
        assert tensor.std().item() == pytest.approx(std, rel=0.35 if name == "orthogonal" else 0.05)
        assert abs(tensor.mean().item()) <= 0.06 * std + 1e-9


@pytest.mark.parametrize(("kind", "r"), [("matrix", 1), ("image", 3), ("embedding", 7), ("experts", 5)])
def test_orthogonal_needs_an_even_rank(kind, r):
    with pytest.raises(PlanError, match=rf"some\.path.*even rank, got {r}"):
        make("orthogonal", kind, r=r)


@pytest.mark.parametrize(("kind", "r"), [("grouped", 4), ("grouped", 12), ("depthwise", 24)])
def test_orthogonal_needs_an_even_rank_for_each_group(kind, r):
    each_group = r // KINDS[kind].layout.groups
    with pytest.raises(PlanError, match=rf"some\.path.*even rank for each group, got {each_group}"):
        make("orthogonal", kind, r=r)


@every_kind
def test_both_factors_of_orthogonal_are_there(kind):
    for block in make("orthogonal", kind):
        assert torch.linalg.matrix_rank(block.A, rtol=1e-4) == block.rank // 2
        assert torch.linalg.matrix_rank(block.B, rtol=1e-4) == block.rank // 2


@pytest.mark.parametrize(
    ("value", "name"),
    [(True, "default"), (False, "random"), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")],
)
def test_names_of_config_values(value, name):
    assert initialiser_name(value) == name


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_block_is_given_its_own_part_of_the_weight(kind, dtype, monkeypatch):
    """For schemes that look at the base weight."""
    from lorakit.init import registry

    layout, given = KINDS[kind].layout, []

    def looking(context):
        given.append(context.read_weight(dtype))
        assert context.shape == layout.block_shape
        return INITIALISERS["default"](context)

    monkeypatch.setattr(registry, "INITIALISERS", {"looking": looking})
    out, inner = layout.shape
    columns = inner // layout.groups  # a grouped weight has its own channels alone
    whole = torch.arange(max(layout.experts, 1) * out * columns, dtype=torch.float64).to(dtype)
    whole = whole.view(layout.experts, out, columns) if layout.experts else whole.view(out, columns)
    initialise(spec_for("looking", kind), lambda wanted: whole.to(wanted, copy=True))
    assert len(given) == layout.blocks
    assert torch.equal(torch.cat(given), whole.view(-1, columns))
