"""Every initialiser keeps the contract on every layout. A new one is one more row in `PROMISES` or `BEGINS`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from lorakit import LoftQConfig, LoraGAConfig
from lorakit.errors import NonFiniteError
from lorakit.init import INITIALISERS, initialise
from lorakit.init.corda import OrientedParts
from lorakit.init.gathered import PREPARED_BY
from lorakit.init.lora_ga import GradientStart
from lorakit.init.registry import FROM_WEIGHT, REPLACES_BASE, TAKES_OFF, initialiser_name, why_not_begin
from lorakit.layouts import Layout, matrix_layout
from lorakit.ops.low_rank import truncated_svd
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
BEGINS = {"pissa": "offset", "olora": "offset", "mica": "zero", "loftq": "closer"}
"""How the schemes that look at the weight begin."""
UNABLE = {("loftq", "grouped"), ("loftq", "depthwise")}
"""What is refused before a scheme is asked: a grouped weight has no place for another one."""
UNABLE |= {
    (name, kind) for name in PREPARED_BY for kind in KINDS if kind not in {"matrix", "conv1d"}
}  # linear only
GRADIENT = truncated_svd(torch.randn(200, 300, generator=torch.Generator().manual_seed(1)), 2 * R)
OPTIONS = {
    "loftq": LoftQConfig(loftq_bits=4, loftq_iter=2),
    "corda": OrientedParts(GRADIENT.U[:, :R], GRADIENT.S[:R], GRADIENT.Vh[:R].T),
    "lora_ga": GradientStart(GRADIENT, LoraGAConfig()),
}
drawn = pytest.mark.parametrize("name", list(PROMISES))
computed = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in BEGINS for kind in KINDS if (name, kind) not in UNABLE]
)
each_on_each = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in INITIALISERS for kind in KINDS if (name, kind) not in UNABLE]
)
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def promise_of(name, kind):
    return (OF_EMBEDDINGS if KINDS[kind].kind == "embedding" else PROMISES)[name]


def unread(_dtype):
    raise AssertionError("a scheme that looks only at shapes read the base weight")


def spec_for(name, kind, *, r=R, **changes):
    spec = spec_of((1, 1), r=r, init=name)
    own = {"kind": KINDS[kind].kind, "layout": KINDS[kind].layout, "init_options": OPTIONS.get(name)}
    return replace(spec, **{**own, **changes})


def weight_of(kind):
    """A base weight as a codec reads it, in fp64; singular values fall slowly, as those of trained weights do."""
    layout = KINDS[kind].layout
    out, inner = layout.shape
    generator = torch.Generator().manual_seed(5)
    shape = (*((layout.experts,) if layout.experts else ()), out, inner // layout.groups)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise * torch.arange(1, shape[-1] + 1, dtype=torch.float64) ** -0.5


def blocks_of(kind, weight):
    """The matrix of each block, (out, in): a group's has zeros where the channels of others are."""
    layout = KINDS[kind].layout
    if layout.experts:
        return list(weight)
    dense = layout.make_dense(weight.view(layout.out, layout.row[0] // layout.groups, *layout.row[1:]))
    return list(dense.flatten(1).chunk(layout.groups))


def results_of(name, kind, *, weight=None, seed=11, **changes):
    """What a scheme gives for each block; those that draw are not to look at the weight."""
    torch.manual_seed(seed)
    weight = weight_of(kind) if weight is None else weight
    read = (lambda dtype: weight.to(dtype, copy=True)) if name in FROM_WEIGHT else unread
    return initialise(spec_for(name, kind, **changes), read)


def make(name, kind, **changes):
    """The factors of each block."""
    results = results_of(name, kind, **changes)
    assert all((result.base_weight is not None) == (name in REPLACES_BASE) for result in results)
    assert all((result.offset is not None) == (name in TAKES_OFF) for result in results)
    return [result.factors for result in results]


def all_of(factors, attribute):
    return torch.stack([getattr(block, attribute) for block in factors])


def test_each_initialiser_has_a_row_here():
    assert set(INITIALISERS) == set(PROMISES) | set(BEGINS) | set(PREPARED_BY)
    assert set(PROMISES) == set(OF_EMBEDDINGS)
    assert set(BEGINS) == FROM_WEIGHT


@each_on_each
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


@each_on_each
def test_on_meta_nothing_is_allocated(name, kind):
    shaped = make(name, kind, lora_bias=True)
    torch.manual_seed(11)
    results = initialise(spec_for(name, kind, device=torch.device("meta"), lora_bias=True), unread)
    for result, real in zip(results, shaped, strict=True):
        for part in ("A", "B", "bias"):
            found = getattr(result.factors, part)
            assert found.is_meta
            assert (found.shape, found.dtype) == (getattr(real, part).shape, getattr(real, part).dtype)
        assert (result.offset is not None) == (name in TAKES_OFF)
        assert (result.base_weight is not None) == (name in REPLACES_BASE)
        assert result.base_weight is None or result.base_weight.is_meta


@drawn
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


@drawn
@every_kind
def test_no_change_of_the_stored_weight_either(name, kind):
    layout = KINDS[kind].layout
    A, B, _ = layout.join(make(name, kind))
    shape_A, shape_B = layout.factor_shapes(R)
    assert tuple(A.shape) == shape_A
    assert tuple(B.shape) == shape_B
    if promise_of(name, kind).zero_delta:
        assert all(block.delta(torch.float64).abs().max() <= 1e-6 for block in layout.split(A, B, 1.0))


@drawn
@every_kind
def test_one_seed_one_result(name, kind):
    first, second, other = (make(name, kind, seed=seed) for seed in (11, 11, 12))
    for one, two, three in zip(first, second, other, strict=True):
        assert bits(one.A) == bits(two.A)
        assert bits(one.B) == bits(two.B)
        assert (bits(one.A), bits(one.B)) != (bits(three.A), bits(three.B))


@drawn
@every_kind
def test_blocks_are_drawn_apart(name, kind):
    factors = make(name, kind)
    assert len({(bits(block.A), bits(block.B)) for block in factors}) == len(factors)


@drawn
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_numbers_in_every_dtype(name, kind, dtype):
    for wide, narrow in zip(make(name, kind), make(name, kind, dtype=dtype), strict=True):
        assert torch.equal(wide.A.to(dtype), narrow.A)
        assert torch.equal(wide.B.to(dtype), narrow.B)


@drawn
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


@computed
def test_begins_from_the_weight_without_a_change_for_the_worse(name, kind):
    results, blocks = results_of(name, kind), blocks_of(kind, weight_of(kind))
    for result, W in zip(results, blocks, strict=True):
        delta = result.factors.delta(torch.float64)
        if BEGINS[name] == "zero":
            assert delta.abs().max() == 0
            assert result.offset is None
        elif BEGINS[name] == "offset":
            for own, taken in ((result.factors.A, result.offset.A), (result.factors.B, result.offset.B)):
                assert bits(own) == bits(taken)
                assert own.untyped_storage().data_ptr() != taken.untyped_storage().data_ptr()
            assert result.offset.scaling == result.factors.scaling
            assert result.offset.bias is None
            # a part of the weight, and no small one
            assert (W - delta).norm() < 0.9 * W.norm()
        else:
            alone, together = (W - result.base_weight).norm(), (W - result.base_weight - delta).norm()
            assert 0.05 * W.norm() < together < 0.99 * alone
            assert result.misfit.after == pytest.approx(together.item(), rel=1e-5)
            assert result.misfit.weight == pytest.approx(W.norm().item(), rel=1e-5)
            assert result.misfit.after < result.misfit.before < 0.15 * W.norm()


@computed
def test_a_function_of_the_weight_alone(name, kind):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second = (results_of(name, kind, seed=11) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first, second, strict=True):
        assert bits(one.factors.A) == bits(two.factors.A)
        assert bits(one.factors.B) == bits(two.factors.B)
    assert len({bits(result.factors.B) for result in first}) == len(first)


@computed
def test_the_weight_is_only_read(name, kind):
    weight = weight_of(kind).float()
    before = bits(weight)
    torch.manual_seed(0)
    initialise(spec_for(name, kind), lambda _dtype: weight)
    assert bits(weight) == before


@computed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_are_rounded_at_the_end(name, kind, dtype):
    once = {"init_options": LoftQConfig(loftq_iter=1)}  # a second step sees the factors as they are rounded
    for wide, narrow in zip(make(name, kind, **once), make(name, kind, dtype=dtype, **once), strict=True):
        assert torch.equal(wide.A.to(dtype), narrow.A)
        assert torch.equal(wide.B.to(dtype), narrow.B)


@computed
def test_float64_is_not_narrowed(name, kind):
    once = {"init_options": LoftQConfig(loftq_iter=1)}
    for wide, narrow in zip(
        make(name, kind, dtype=torch.float64, **once), make(name, kind, **once), strict=True
    ):
        assert (wide.B - narrow.B).norm() <= 1e-2 * wide.B.norm()
        assert not torch.equal(wide.B, wide.B.float().double())


@computed
@pytest.mark.parametrize("scaling", [-0.5, 3.0])
def test_any_scaling(name, kind, scaling):
    for result, W in zip(
        results_of(name, kind, scaling=scaling), blocks_of(kind, weight_of(kind)), strict=True
    ):
        assert result.factors.scaling == scaling
        if BEGINS[name] == "closer":
            assert (
                W - result.base_weight - result.factors.delta(torch.float64)
            ).norm() < result.misfit.before
        elif name == "pissa":
            assert (W - result.factors.delta(torch.float64)).norm() < 0.9 * W.norm()


@computed
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_weights_that_are_no_numbers_are_refused(name, kind, value, where):
    weight = weight_of(kind)
    weight.view(-1)[where] = value
    with pytest.raises(NonFiniteError, match=r"^some\.path: .*NaN or infinity"):
        results_of(name, kind, weight=weight)


@computed
def test_a_weight_of_zeros_leaves_something_to_train(name, kind):
    for result in results_of(name, kind, weight=torch.zeros_like(weight_of(kind))):
        A, B = result.factors.A, result.factors.B
        assert A.isfinite().all()
        assert B.isfinite().all()
        assert (A.norm(dim=1) + B.norm(dim=0) > 0.1).all()  # every rank gets a gradient


@pytest.mark.parametrize("name", ["pissa", "mica", "loftq"])
def test_values_that_the_adapters_dtype_cannot_hold_are_refused(name):
    weight = weight_of("matrix") * 1e30
    if name == "mica":  # whose factors are of unit size, whatever the weight
        assert make(name, "matrix", weight=weight, dtype=torch.float16)
        return
    with pytest.raises(NonFiniteError, match=r"^some\.path: .*float16"):
        results_of(name, "matrix", weight=weight, dtype=torch.float16)


@pytest.mark.parametrize("name", sorted(FROM_WEIGHT))
@pytest.mark.parametrize(
    ("layout", "most"),
    [
        (matrix_layout(6, 20), 6),
        (matrix_layout(20, 6), 6),
        (Layout(12, (4, 3), groups=2), 12),  # 6 for each group
        (Layout(40, (8, 2), groups=4), 16),  # 4: of 16 columns only 4 are a group's own
        (Layout(10, (5,), experts=3), 5),
    ],
)
def test_the_rank_of_the_weight_is_the_limit(name, layout, most):
    assert why_not_begin(name, layout, most) == ""
    refused = why_not_begin(name, layout, most + layout.groups)
    assert f"init_lora_weights={name!r}" in refused
    assert f"rank {most // layout.groups} at the most" in refused
    assert ("for each group" in refused) == (layout.groups > 1)


@pytest.mark.parametrize("name", sorted(set(INITIALISERS) - FROM_WEIGHT))
def test_what_is_drawn_has_no_such_limit(name):
    assert why_not_begin(name, matrix_layout(2, 3), 8) == ""


@pytest.mark.parametrize(("kind", "r"), [("matrix", 1), ("image", 3), ("embedding", 7), ("experts", 5)])
def test_orthogonal_needs_an_even_rank(kind, r):
    assert f"even rank, got {r}" in why_not_begin("orthogonal", KINDS[kind].layout, r)
    assert why_not_begin("orthogonal", KINDS[kind].layout, r + 1) == ""


@pytest.mark.parametrize(("kind", "r"), [("grouped", 4), ("grouped", 12), ("depthwise", 24)])
def test_orthogonal_needs_an_even_rank_for_each_group(kind, r):
    each_group = r // KINDS[kind].layout.groups
    assert f"even rank for each group, got {each_group}" in why_not_begin("orthogonal", KINDS[kind].layout, r)


@every_kind
def test_both_factors_of_orthogonal_are_there(kind):
    for block in make("orthogonal", kind):
        assert torch.linalg.matrix_rank(block.A, rtol=1e-4) == block.rank // 2
        assert torch.linalg.matrix_rank(block.B, rtol=1e-4) == block.rank // 2


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (True, "default"),
        (False, "random"),
        ("gaussian", "gaussian"),
        ("orthogonal", "orthogonal"),
        ("pissa", "pissa"),
        ("pissa_niter_16", "pissa"),
        ("loftq", "loftq"),
    ],
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
        assert context.shape == layout.block_shape == given[-1].shape
        assert (given[-1] != 0)[:, context.own_inputs].all()
        return INITIALISERS["default"](context)

    monkeypatch.setattr(registry, "INITIALISERS", {"looking": looking})
    whole = 1 + torch.arange(weight_of(kind).numel(), dtype=torch.float64).to(dtype).view(
        weight_of(kind).shape
    )
    initialise(spec_for("looking", kind), lambda wanted: whole.to(wanted, copy=True))
    assert len(given) == layout.blocks
    assert torch.equal(torch.cat(given), torch.cat(blocks_of(kind, whole)))
