"""Every deterministic method against its definition, written out dense and slowly."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from lorakit.combiners import CombineOptions, combine
from lorakit.types import Factors
from unit.combiners import naive

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# The parts are given to both sides, so a result is off by the rounding of its own dtype alone.
TOLERANCE = {F64: 1e-12, F32: 3e-6, F16: 3e-3, BF16: 2e-2}
SHAPES = [
    ((12, 9), [4, 4]),
    ((9, 14), [3, 3, 3]),
    ((6, 5), [8, 8]),
    ((1, 7), [2, 2]),
    ((7, 1), [2, 2]),
    ((1, 1), [1, 1, 1]),
]
WEIGHTS = [0.7, -0.4, 1.1]
DENSITY = 0.6

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_shape = pytest.mark.parametrize(
    ("shape", "ranks"), SHAPES, ids=lambda value: str(value).replace(" ", "")
)


def close(found, wanted, tolerance, scale=None):
    """Within a share of the norm of `scale`, or of what is wanted."""
    error = (found.double() - wanted).norm()
    assert error <= tolerance * (wanted if scale is None else scale).norm() + 1e-30, float(error)


def size(parts, weights):
    """A sum that cancels is as precise as its terms, and so are products of merged factors."""
    return sum(abs(w) * naive.delta(p).norm() for p, w in zip(parts, weights, strict=True)) * torch.ones(1)


def reduced(found, wanted, rank, tolerance, scale):
    """The best approximation of that rank, and `kept` and `error` that say what it is."""
    best = naive.best(wanted, rank)
    close(found.factors.delta(F64), best, tolerance, scale)
    lost = (wanted - best).norm()
    assert found.error == pytest.approx(lost.item(), abs=1e-5 * float(scale.norm()), rel=1e-4)
    assert found.kept == pytest.approx(1 - (lost / wanted.norm()).item() ** 2, abs=1e-5)


@each_dtype
@each_shape
@pytest.mark.parametrize("method", ["cat", "sum"])
def test_exact_sum(method, shape, ranks, dtype):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[: len(ranks)]
    found = combine(parts, weights, method)
    close(found.factors.delta(F64), naive.weighted(parts, weights), TOLERANCE[dtype], size(parts, weights))
    assert found.factors.rank == (min(sum(ranks), *shape) if method == "sum" else sum(ranks))
    assert (found.kept, found.error) == (1.0, None)


@each_dtype
@each_shape
@pytest.mark.parametrize(
    ("method", "rank"), [("svd", None), *((name, rank) for name in ("svd", "sum") for rank in (1, 2, 30))]
)
def test_best_of_its_rank(method, rank, shape, ranks, dtype):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[: len(ranks)]
    found = combine(parts, weights, method, CombineOptions(rank=rank))
    expected = rank or max(ranks)
    assert found.factors.rank == expected
    reduced(found, naive.weighted(parts, weights), expected, TOLERANCE[dtype], size(parts, weights))


@each_dtype
@pytest.mark.parametrize(("shape", "ranks"), [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4]])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(
    ("method", "prune", "merge"),
    [
        ("linear", lambda x: x, naive.summed),
        ("ties", partial(naive.pruned, density=DENSITY), naive.elected),
        ("magnitude_prune", partial(naive.pruned, density=DENSITY), naive.summed),
    ],
)
def test_on_factors(method, prune, merge, majority, shape, ranks, dtype):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[: len(ranks)]
    wide = [Factors(part.A.double(), part.B.double(), part.scaling) for part in parts]
    found = combine(parts, weights, method, CombineOptions(density=DENSITY, majority_sign_method=majority))
    wanted = naive.on_factors(wide, weights, prune, merge, majority)
    close(found.factors.delta(F64), wanted, 4 * TOLERANCE[dtype], size(parts, weights))
    assert (found.kept, found.error) == (1.0, None)


@each_dtype
@pytest.mark.parametrize(("shape", "ranks"), [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4], ((8, 9), [2, 3])])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(
    ("method", "merge"), [("ties_svd", naive.elected), ("magnitude_prune_svd", naive.summed)]
)
@pytest.mark.parametrize("rank", [None, 2])
def test_on_deltas(method, merge, majority, shape, ranks, dtype, rank):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[: len(ranks)]
    deltas = [naive.pruned(naive.delta(part), DENSITY) for part in parts]
    options = CombineOptions(density=DENSITY, majority_sign_method=majority, rank=rank)
    found = combine(parts, weights, method, options)
    reduced(
        found, merge(deltas, weights, majority), rank or max(ranks), TOLERANCE[dtype], size(parts, weights)
    )


@each_dtype
@pytest.mark.parametrize(("shape", "ranks"), [SHAPES[0], SHAPES[1], SHAPES[2], ((8, 9), [2, 3])])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_sce(shape, ranks, dtype, density):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[: len(ranks)]
    found = combine(parts, weights, "sce", CombineOptions(density=density, rank=3))
    reduced(found, naive.sce(parts, weights, density), 3, TOLERANCE[dtype], size(parts, weights))


@each_dtype
@pytest.mark.parametrize(("shape", "ranks"), [*SHAPES[:1], ((8, 9), [2, 3]), ((5, 4), [3, 6])])
@pytest.mark.parametrize("t", [None, 0.0, 0.3, 1.0])
def test_slerp(shape, ranks, dtype, t):
    parts, weights = naive.parts_of(shape, ranks, dtype), WEIGHTS[:2]
    found = combine(parts, weights, "slerp", CombineOptions(t=t))
    wanted = naive.slerp(parts, weights, 0.5 if t is None else t)
    close(found.factors.delta(F64), wanted, TOLERANCE[dtype], size(parts, weights))
    assert found.factors.rank == min(sum(ranks), *shape)


def test_slerp_keeps_the_norm():
    first, second = naive.parts_of((20, 30), [3, 3])
    second = Factors(
        second.A, second.B, second.scaling * (naive.delta(first).norm() / naive.delta(second).norm()).item()
    )
    for t in (0.1, 0.5, 0.8):
        found = combine([first, second], [1, 1], "slerp", CombineOptions(t=t))
        assert found.factors.delta(F64).norm() == pytest.approx(naive.delta(first).norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("factor", "t", "share"), [(2.0, 0.25, 1.25), (-1.0, 0.25, 0.5), (0.0, 0.25, 0.75), (1 + 1e-9, 0.5, 1.0)]
)
def test_slerp_of_parallel_opposite_and_zero_deltas_is_linear(factor, t, share):
    (part,) = naive.parts_of((6, 8), [2])
    other = Factors(part.A, part.B * factor, part.scaling)
    found = combine([part, other], [1, 1], "slerp", CombineOptions(t=t))
    close(found.factors.delta(F64), share * naive.delta(part), 1e-8)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "della"])
def test_random_pruning_is_right_in_the_mean(method):
    """Elements are kept with the right frequency and rescaled, so that with one draw a seed the mean is the sum.

    One part is zero, so that the election has nothing to decide.
    """
    first, second = naive.parts_of((5, 6), [5, 5])
    parts = [first, Factors(second.A * 0, second.B * 0, 1.0)]
    draws = 3000
    options = {"density": 0.7, "rank": 5}
    total = torch.zeros(5, 6, dtype=F64)
    for seed in range(draws):
        total += combine(parts, [0.9, 1.0], method, CombineOptions(seed=seed, **options)).factors.delta(F64)
    wanted = 0.9 * naive.delta(first)
    # A and B are pruned each by itself: (1 / 0.7)^2 in the variance of a product of two
    assert (total / draws - wanted).abs().max() <= 6 * wanted.abs().max() * draws**-0.5 * 3


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "della"])
@pytest.mark.parametrize("seed", [None, 7, "generator"])
def test_seeds(method, seed):
    parts = naive.parts_of((9, 8), [3, 3], F32)

    def run():
        given = torch.Generator().manual_seed(7) if seed == "generator" else seed
        torch.manual_seed(7 if seed is None else 1)
        return combine(parts, [1, 1], method, CombineOptions(density=0.5, seed=given)).factors.delta()

    found = run()
    assert torch.equal(found, run())
    torch.manual_seed(7)
    assert torch.equal(found, combine(parts, [1, 1], method, CombineOptions(density=0.5)).factors.delta())
    generator = torch.Generator().manual_seed(8)
    options = CombineOptions(density=0.5, seed=generator)
    one, two = (combine(parts, [1, 1], method, options).factors.delta() for _ in range(2))
    assert not torch.equal(one, two), "a generator goes on where it was"
    assert not torch.equal(one, found)


def test_weights_of_zero():
    parts = naive.parts_of((9, 8), [3, 3])
    for method in ("linear", "cat", "sum", "svd", "slerp"):
        found = combine(parts, [0.0, 0.0], method)
        assert not found.factors.delta(F64).any()
        assert found.kept == 1.0
    found = combine(parts, [0.0, 1.0], "sum")
    close(found.factors.delta(F64), naive.delta(parts[1]), 1e-12)


@pytest.mark.parametrize("clamp", [None, 0.9])
def test_parts_that_change_nothing(clamp):
    """Adapters as they start: B is zero."""
    parts = [Factors(part.A, part.B * 0, 1.0) for part in naive.parts_of((40, 30), [4, 4], F32)]
    for method in ("svd", "ties_svd", "dare_linear_svd", "sce", "della", "magnitude_prune", "sum"):
        found = combine(parts, [1.0, 0.5], method, CombineOptions(density=0.5, svd_clamp=clamp))
        assert not found.factors.delta().any()
        assert found.kept == 1.0


@pytest.mark.parametrize("method", ["svd", "sum", "ties_svd", "sce"])
def test_energy_keeps_the_fewest_triplets(method):
    parts = naive.parts_of((30, 20), [6, 6])
    full = combine(parts, [1, 0.3], method, CombineOptions(density=0.5, rank=20)).factors.delta(F64)
    squares = torch.linalg.svdvals(full).square()
    for rank, energy in ((3, 0.5), (None, 0.5), (None, 0.8), (2, 0.99), (None, 1.0)):
        found = combine(parts, [1, 0.3], method, CombineOptions(density=0.5, energy=energy, rank=rank))
        r = found.factors.rank
        cap = rank or (12 if method in {"svd", "sum"} else 6)
        assert r <= cap
        assert found.kept == pytest.approx((squares[:r].sum() / squares.sum()).item(), rel=1e-9)
        assert found.kept >= energy - 1e-12 or r == cap
        assert squares[: r - 1].sum() < energy * squares.sum(), "one triplet less would have done"


@pytest.mark.parametrize("method", ["svd", "sum", "ties_svd"])
@pytest.mark.parametrize("clamp", [0.8, 0.99, 1.0])
def test_clamping_cuts_at_the_quantile(method, clamp):
    parts = naive.parts_of((30, 20), [4, 4])
    options = {"density": 0.5, "rank": 4}
    plain = combine(parts, [1, 0.3], method, CombineOptions(**options)).factors
    found = combine(parts, [1, 0.3], method, CombineOptions(svd_clamp=clamp, **options))
    bound = torch.quantile(torch.cat([plain.B.flatten(), plain.A.flatten()]), clamp)
    close(found.factors.B, plain.B.clamp(-bound, bound), 1e-9)
    close(found.factors.A, plain.A.clamp(-bound, bound), 1e-9)
    wanted = combine(parts, [1, 0.3], method, CombineOptions(density=0.5, rank=20)).factors.delta(F64)
    lost = (wanted - found.factors.delta(F64)).norm()
    assert found.error == pytest.approx(lost.item(), rel=1e-9)
    assert found.kept == pytest.approx(max(0.0, 1 - (lost / wanted.norm()).item() ** 2), abs=1e-9)


def test_padding_gives_a_trainable_rank():
    parts = naive.parts_of((12, 9), [2, 2])
    found = combine(parts, [1, 1], "svd", CombineOptions(rank=7)).factors
    assert not found.B[:, 4:].any()
    assert (found.A @ found.A.T - torch.eye(7, dtype=F64)).abs().max() <= 1e-12
    beyond = combine(parts, [1, 1], "svd", CombineOptions(rank=11)).factors
    assert not beyond.A[9:].any(), "no more directions than inputs"
    close(beyond.delta(F64), naive.weighted(parts, [1, 1]), 1e-12)


@pytest.mark.parametrize(
    "method", ["linear", "cat", "sum", "svd", "ties", "ties_svd", "sce", "della", "slerp"]
)
def test_biases_are_summed_with_weight_and_scaling(method):
    parts = naive.parts_of((9, 8), [3, 3], bias=True)
    options = CombineOptions(density=0.5)
    bias = combine(parts, [0.5, -2.0], method, options).factors.bias
    wanted = sum(w * p.scaling * p.bias for w, p in zip([0.5, -2.0], parts, strict=True))
    torch.testing.assert_close(bias, wanted)
    mixed = [parts[0], naive.parts_of((9, 8), [3])[0]]
    torch.testing.assert_close(
        combine(mixed, [0.5, 1.0], method, options).factors.bias, 0.5 * parts[0].scaling * parts[0].bias
    )


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [((F16, F16), F16), ((F16, F32), F32), ((F16, BF16), F32), ((BF16, F64), F64), ((F64, F32), F64)],
)
def test_the_widest_dtype_wins(dtypes, wanted):
    parts = [naive.parts_of((9, 8), [3], dtype, seed=n)[0] for n, dtype in enumerate(dtypes)]
    found = combine(parts, [1, 1], "svd").factors
    assert found.A.dtype == found.B.dtype == wanted


def test_intermediate_results_may_leave_the_range_of_float16():
    """300 * 300 * 8 is no float16; the factors of the result are."""
    part = Factors(torch.full((8, 6), 300.0, dtype=F16), torch.full((5, 8), 300.0, dtype=F16), 1.0)
    found = combine([part, part], [1e-3, 1e-3], "svd", CombineOptions(rank=2))
    close(found.factors.delta(F64), 2e-3 * naive.delta(part), 3e-3)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "sum"])
def test_signs_follow_the_rule(method):
    B = combine(
        naive.parts_of((30, 20), [4, 4]), [1, 1], method, CombineOptions(density=0.5, rank=4)
    ).factors.B
    assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", ["svd", "ties_svd"])
def test_full_matrices_and_driver_have_no_effect_here(method):
    parts = naive.parts_of((30, 20), [4, 4])
    plain = combine(parts, [1, 1], method, CombineOptions(density=0.5)).factors
    options = CombineOptions(density=0.5, svd_full_matrices=False, svd_driver="gesvd")
    assert torch.equal(combine(parts, [1, 1], method, options).factors.B, plain.B)


def test_kept_never_leaves_its_range():
    parts = naive.parts_of((30, 20), [4, 4], F16)
    for clamp in (0.55, 0.6, 0.8):
        found = combine(parts, [1, 1], "svd", CombineOptions(svd_clamp=clamp))
        assert 0.0 <= found.kept <= 1.0
        assert math.isfinite(found.error)
