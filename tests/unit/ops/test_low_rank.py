"""Cheap singular value decompositions against the full one, on matrices that are kind and on those that are not."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.errors import NonFiniteError
from lorakit.ops import low_rank
from lorakit.ops.low_rank import LowRank, low_rank_svd, padded_rows, truncated_svd
from lorakit.types import Factors

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def with_spectrum(S, out, features, seed=0):
    left = torch.linalg.qr(normal(out, len(S), seed=seed)).Q
    right = torch.linalg.qr(normal(features, len(S), seed=seed + 1)).Q
    return (left * S) @ right.mT


def pruned(out, features, r, density):
    """What `ties_svd` reduces: some dozen large singular values on a floor of many small ones."""
    delta = normal(out, r) @ normal(r, features, seed=1)
    return delta * (delta.abs() >= delta.abs().flatten().kthvalue(int((1 - density) * delta.numel())).values)


def dense(svd: LowRank):
    return (svd.U.double() * svd.S.double()) @ svd.Vh.double()


def best(W, rank):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def check_is_svd(svd, W, rank, slack):
    """Orthonormal, falling, oriented, and complete in its energy."""
    assert svd.U.shape == (W.shape[0], rank)
    assert svd.S.shape == (rank,)
    assert svd.Vh.shape == (rank, W.shape[1])
    one = torch.eye(rank, dtype=F64)
    for rows in (svd.U.mT.double(), svd.Vh.double()):
        assert (rows @ rows.mT - one).abs().max() <= slack
    assert (svd.S >= 0).all()
    assert (svd.S.diff() <= 0).all()
    assert svd.energy == pytest.approx(W.double().square().sum().item(), rel=slack)
    largest = svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


# name, matrix, rank, whether the iteration (and not the full SVD) is to find the answer
CASES = [
    ("pruned sum", pruned(420, 380, 8, 0.3), 8, True),
    ("pruned sum, rank 1", pruned(420, 380, 8, 0.3), 1, True),
    ("pruned sum, wide", pruned(300, 900, 6, 0.5), 6, True),
    ("pruned sum, tall", pruned(900, 300, 6, 0.5), 6, True),
    ("power law", with_spectrum(torch.arange(1, 401, dtype=F64) ** -0.5, 500, 400), 12, True),
    ("steep", with_spectrum(10.0 ** -(torch.arange(400, dtype=F64) / 30), 400, 400), 12, True),
    ("one value", with_spectrum(torch.tensor([3.0], dtype=F64), 300, 300), 1, True),
    ("rank 20 of 20", normal(400, 20) @ normal(20, 300), 12, True),
    ("rank 3, fewer than asked", normal(400, 3) @ normal(3, 300), 12, True),
    ("few rows", torch.cat([normal(20, 400), torch.zeros(380, 400, dtype=F64)]), 12, True),
    ("few entries", normal(400, 400) * (normal(400, 400, seed=3) > 2.9), 12, True),
    ("noise", normal(600, 600), 8, True),
    ("rank above half", normal(60, 50), 40, False),
    ("rank above all", normal(9, 5), 7, False),
    ("row", normal(1, 300), 4, False),
    ("column", normal(300, 1), 4, False),
    ("one entry", normal(1, 1), 1, False),
    ("noise, many", normal(300, 300), 24, False),
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("W", "rank", "iterates"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_truncated_svd_is_the_best_of_its_rank(W, rank, iterates, dtype, monkeypatch):
    W = W.to(dtype)
    full = torch.linalg.svd
    sizes = []
    monkeypatch.setattr(
        torch.linalg, "svd", lambda M, **kwargs: (sizes.append(tuple(M.shape)), full(M, **kwargs))[1]
    )
    svd = truncated_svd(W, rank)
    assert (tuple(W.shape) not in sizes) == iterates
    monkeypatch.undo()
    count = min(rank, *W.shape)
    slack = 3e-6 if dtype == F32 else 1e-13
    check_is_svd(svd, W, count, slack)
    wanted = best(W, rank)
    assert (dense(svd) - wanted).norm() <= 1.5e-5 * wanted.norm()
    assert svd.rest == pytest.approx((W - wanted).norm().item(), abs=1e-3 * W.norm().item())
    least, found = (W - wanted).norm(), (W.double() - dense(svd)).norm()
    assert found <= least + 1e-6 * wanted.norm()


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["pruned sum", "power law", "noise"])
def test_the_tolerance_is_kept_and_buys_time(name, tol, monkeypatch):
    W, rank = next(case[1:3] for case in CASES if case[0] == name)
    steps = []
    step = low_rank._Krylov._step
    monkeypatch.setattr(
        low_rank._Krylov, "_step", lambda self, newest: (steps.append(1), step(self, newest))[1]
    )
    found, wanted = dense(truncated_svd(W, rank, tol=tol)), best(W, rank)
    assert (found - wanted).norm() <= tol * wanted.norm()
    loose = len(steps)
    truncated_svd(W, rank, tol=1e-9)
    assert loose < len(steps) - loose


@pytest.mark.parametrize("multiple", [1, 5, 40])
def test_equal_singular_values(multiple):
    """Any of the best approximations will do: what counts is the energy."""
    W = torch.block_diag(3 * torch.eye(multiple, dtype=F64), torch.eye(400, dtype=F64))
    svd = truncated_svd(W, 10)
    check_is_svd(svd, W, 10, 1e-12)
    wanted = torch.linalg.svdvals(W)[:10]
    assert (svd.S - wanted).abs().max() <= 1e-6


def test_a_wrong_recurrence_is_noticed(monkeypatch):
    """Were the basis to lose its orthogonality, the residuals, computed afresh, would send W to the full SVD."""
    W, rank = CASES[0][1:3]
    ritz = low_rank._Krylov._ritz

    def lying(self):
        _, found = ritz(self)
        return 0.5, found._replace(residuals=torch.zeros_like(found.residuals))

    monkeypatch.setattr(low_rank._Krylov, "_ritz", lying)
    wanted = best(W, rank)
    assert (dense(truncated_svd(W, rank)) - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_sizes_that_overflow_when_squared(scale):
    W = (pruned(300, 280, 6, 0.3) * scale).float()
    svd = truncated_svd(W, 6)
    wanted = best(W, 6)
    assert (dense(svd) - wanted).norm() <= 1.5e-5 * wanted.norm()
    assert svd.energy == pytest.approx(W.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_precisions_are_widened(dtype):
    W = pruned(300, 280, 6, 0.3).to(dtype)
    svd = truncated_svd(W, 6)
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == F32
    assert (dense(svd) - best(W, 6)).norm() <= 1.5e-5 * best(W, 6).norm()


def test_zero_matrix():
    svd = truncated_svd(torch.zeros(30, 20), 4)
    assert svd.energy == 0.0
    assert not svd.S.any()
    check_is_svd(svd, torch.zeros(30, 20), 4, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_matrices_are_refused(bad):
    W = torch.ones(30, 20)
    W[29, 19] = bad
    with pytest.raises(NonFiniteError, match=r"\(30, 20\)"):
        truncated_svd(W, 4)


def test_the_result_depends_on_nothing_else():
    W = CASES[0][1].float()
    before = W.clone()
    state = torch.get_rng_state()
    first = truncated_svd(W, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for one, two in zip(first[:3], truncated_svd(W.t().contiguous().t(), 8)[:3], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    for one, two in zip(first[:3], truncated_svd(W, 8)[:3], strict=True):
        assert torch.equal(one, two)
    assert torch.equal(W, before)


def factors(out, features, r, scaling, seed, dtype=F32):
    return Factors(
        normal(r, features, seed=seed, dtype=dtype), normal(out, r, seed=seed + 1, dtype=dtype), scaling
    )


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("out", "features", "ranks"),
    [
        (40, 30, [4, 4]),
        (40, 30, [3]),
        (30, 300, [4, 1, 7]),
        (300, 20, [16, 16]),
        (6, 5, [4, 4]),
        (1, 1, [3]),
        (2, 50, [8]),
    ],
)
def test_svd_of_a_sum_of_factors(out, features, ranks, dtype):
    parts = [factors(out, features, r, 0.5 - n, 10 * n, dtype) for n, r in enumerate(ranks)]
    W = sum(part.delta(F64) for part in parts)
    svd = low_rank_svd(parts)
    slack = 3e-6 if dtype == F32 else 1e-13
    check_is_svd(svd, W, min(sum(ranks), out, features), slack)
    assert (dense(svd) - W).norm() <= slack * W.norm()
    wanted = torch.linalg.svdvals(W)[: svd.S.shape[0]]
    assert (svd.S.double() - wanted).abs().max() <= slack * wanted[0]
    assert svd.rest == 0.0
    cut = svd.truncated(2)
    for one, two in zip(cut, low_rank_svd(parts, rank=2), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-4, atol=1e-5)
    assert cut.rest == pytest.approx((W - best(W, 2)).norm().item(), abs=10 * slack * W.norm().item())
    assert (cut.factors().delta(F64) - best(W, 2)).norm() <= 10 * slack * W.norm()


def test_svd_of_a_sum_that_cancels():
    part = factors(40, 30, 4, 1.0, 0)
    svd = low_rank_svd([part, Factors(part.A, part.B, -1.0)])
    assert svd.S.max() <= 1e-6 * part.delta().norm()
    assert torch.isfinite(svd.U).all()


@pytest.mark.parametrize(
    ("k", "dim", "rank", "filled"), [(3, 10, 6, 6), (3, 10, 3, 3), (3, 4, 9, 4), (4, 4, 6, 4)]
)
def test_padded_rows(k, dim, rank, filled):
    Vh = torch.linalg.qr(normal(dim, k)).Q.mT
    rows = padded_rows(Vh, rank)
    assert torch.equal(rows[:k], Vh)
    assert (rows @ rows.mT - torch.diag((torch.arange(rank) < filled).double())).abs().max() <= 1e-12
    assert torch.equal(rows, padded_rows(Vh, rank))
