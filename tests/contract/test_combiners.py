"""Every combiner keeps the contract. A new one is one more row in `PROMISES`."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from lorakit.combiners import METHODS, CombineOptions, combine
from lorakit.types import Factors
from models import bits, random_factors

SHAPES = ((40, 28), (28, 40), (5, 3), (1, 6), (6, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F64 = torch.float64
R = 4


class Promise(NamedTuple):
    """What a method promises, beyond what every method does.

    Attributes:
        options: that it is tested with.
        counts: numbers of adapters.
        reduces: whether it ends in an SVD of a given rank, and says what that costs.
        alone: whether one adapter with weight 1 keeps its delta.
        symmetric: whether the order of the adapters does not matter.
        random: whether it draws random numbers.
        rank: of the result, by the number of adapters of rank R, for a shape that is large enough.
    """

    options: CombineOptions
    counts: tuple[int, ...] = (1, 2, 3)
    reduces: bool = False
    alone: bool = True
    symmetric: bool = True
    random: bool = False
    rank: tuple[int, ...] = (R, R, R)


PLAIN, PRUNING = CombineOptions(), CombineOptions(density=0.6)
SEEDED = CombineOptions(density=0.6, seed=3)
SUMS = (R, 2 * R, 3 * R)
PROMISES = {
    "linear": Promise(PLAIN),
    "cat": Promise(PLAIN, rank=SUMS),
    "svd": Promise(PLAIN, reduces=True),
    "ties": Promise(PRUNING),
    "ties_svd": Promise(PRUNING, reduces=True),
    "dare_linear": Promise(SEEDED, symmetric=False, random=True),
    "dare_linear_svd": Promise(SEEDED, reduces=True, symmetric=False, random=True),
    "dare_ties": Promise(SEEDED, symmetric=False, random=True),
    "dare_ties_svd": Promise(SEEDED, reduces=True, symmetric=False, random=True),
    "magnitude_prune": Promise(PRUNING),
    "magnitude_prune_svd": Promise(PRUNING, reduces=True),
    "sum": Promise(PLAIN, rank=SUMS),
    "della": Promise(SEEDED, reduces=True, alone=False, symmetric=False, random=True),
    "sce": Promise(PRUNING, reduces=True),
    "slerp": Promise(PLAIN, counts=(2,), rank=SUMS),
}
CASES = [(name, count) for name, promise in PROMISES.items() for count in promise.counts]
each = pytest.mark.parametrize(("name", "count"), CASES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parts_of(count, shape=SHAPES[0], dtype=F64, *, bias=False):
    scalings = (1.5, 0.5, -0.8)
    return [
        random_factors(shape, dtype, r=R, scaling=scalings[n], bias=bias, seed=n, size=1.0)
        for n in range(count)
    ]


WEIGHTS = (0.8, -0.5, 1.2)


def run(name, parts, weights=None, **changes):
    given = PROMISES[name].options
    options = CombineOptions(**{field: getattr(given, field) for field in CombineOptions.__slots__} | changes)
    return combine(parts, list(weights or WEIGHTS)[: len(parts)], name, options)


def delta(found):
    return found.factors.delta(F64)


def close(found, wanted, tolerance=1e-9):
    assert (found - wanted).norm() <= tolerance * (1e-12 + wanted.norm())


def test_each_method_has_a_row_here():
    assert set(METHODS) == set(PROMISES)


@each
@each_shape
@each_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_shape_dtype_and_finiteness(name, count, shape, dtype, bias):
    found = run(name, parts_of(count, shape, dtype, bias=bias))
    factors = found.factors
    assert factors.shape == shape
    assert factors.scaling == 1.0
    assert (factors.bias is not None) == bias
    for tensor in (factors.A, factors.B, *([factors.bias] if bias else [])):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert torch.isfinite(tensor).all()
        assert not tensor.requires_grad
    assert 0.0 <= found.kept <= 1.0


@each
def test_rank(name, count):
    promise = PROMISES[name]
    assert run(name, parts_of(count)).factors.rank == promise.rank[count - 1]
    if promise.reduces:
        for rank in (1, 3, 60):
            assert run(name, parts_of(count), rank=rank).factors.rank == rank


@each
def test_kept_and_error_agree(name, count):
    found = run(name, parts_of(count))
    assert (found.error is None) == (not PROMISES[name].reduces)
    if found.error is None:
        assert found.kept == 1.0
        return
    whole = run(name, parts_of(count), rank=28)
    assert whole.kept == pytest.approx(1.0, abs=1e-12)
    assert whole.error <= 1e-9 * delta(whole).norm()
    assert found.error == pytest.approx((delta(whole) - delta(found)).norm().item(), abs=1e-9)
    assert found.kept == pytest.approx(1 - (found.error / delta(whole).norm().item()) ** 2, abs=1e-12)


@each
@each_dtype
def test_parts_are_left_alone_and_not_shared(name, count, dtype):
    parts = parts_of(count, dtype=dtype, bias=True)
    for part in parts:
        part.A.requires_grad_()
    before = [bits(tensor) for part in parts for tensor in (part.A, part.B, part.bias)]
    factors = run(name, parts, [1.0] * count).factors
    for tensor in (factors.A, factors.B, factors.bias):
        tensor.zero_()
    assert before == [bits(tensor) for part in parts for tensor in (part.A, part.B, part.bias)]


@each
def test_same_request_same_bits(name, count):
    parts = parts_of(count, dtype=torch.float32)
    first, second = run(name, parts).factors, run(name, parts).factors
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


@each
def test_views_are_as_good_as_copies(name, count):
    parts = parts_of(count)
    views = [
        Factors(part.A.t().contiguous().t(), part.B.t().contiguous().t(), part.scaling) for part in parts
    ]
    close(delta(run(name, views)), delta(run(name, parts)))


@each
def test_torch_generators_move_only_for_unseeded_random_pruning(name, count):
    state = torch.get_rng_state()
    run(name, parts_of(count), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    run(name, parts_of(count), seed=None)
    prunes = PROMISES[name].random and (count > 1 or not PROMISES[name].alone)
    assert torch.equal(torch.get_rng_state(), state) != prunes


@each
@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_scaling_all_weights_scales_the_delta(name, count, factor):
    parts = parts_of(count)
    found = run(name, parts, [factor * weight for weight in WEIGHTS])
    wanted = factor * delta(run(name, parts))
    assert (delta(found) - wanted).norm() <= 1e-9 * (1e-3 + wanted.norm())


@pytest.mark.parametrize("name", [name for name, promise in PROMISES.items() if promise.symmetric])
def test_order_does_not_matter(name):
    count = PROMISES[name].counts[-1]
    parts, weights = parts_of(count), WEIGHTS[:count]
    close(delta(run(name, parts[::-1], weights[::-1])), delta(run(name, parts, weights)))


@pytest.mark.parametrize("name", [name for name, promise in PROMISES.items() if 1 in promise.counts])
@each_shape
def test_one_adapter_with_weight_one_keeps_its_delta(name, shape):
    (part,) = parts_of(1, shape)
    found = run(name, [part], [1.0])
    kept = (delta(found) - part.delta(F64)).norm() <= 1e-12 * part.delta(F64).norm()
    if PROMISES[name].alone or part.delta(F64).numel() > 100:  # of a handful of elements all may stay
        assert kept == PROMISES[name].alone


@pytest.mark.parametrize(
    ("name", "count"), [(name, n) for name, n in CASES if n == 1 or not METHODS[name].equal_ranks]
)
def test_where_scaling_stands_does_not_matter(name, count):
    """(A, B, s) and (A, s B, 1) are one adapter to whatever looks at deltas, or at one adapter."""
    parts = parts_of(count)
    folded = [Factors(part.A, part.B * part.scaling, 1.0) for part in parts]
    close(delta(run(name, folded)), delta(run(name, parts)))
