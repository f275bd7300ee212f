"""`merge_delta` against float64, and the norms against the dense change."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.ops import delta_bound, frobenius_norm, merge, merge_delta, tile_rows
from lorakit.types import Factors


def factors(out, features, r=4, dtype=torch.float32, scaling=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(r, features, generator=g, dtype=torch.float64).to(dtype)
    return Factors(A, torch.randn(out, r, generator=g, dtype=torch.float64).to(dtype), scaling)


def exact(W, parts, sign=1.0):
    return W.double() + sign * sum(f.delta(torch.float64) for f in parts)


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rows", [3, 7, 100])
@pytest.mark.parametrize("where", ["fresh", "in place", "out", "strided"])
def test_merge_is_within_one_rounding(dtype, transposed, sign, rows, where, monkeypatch):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", rows * 30)
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    parts = [factors(20, 30, dtype=dtype), factors(20, 30, r=2, seed=3)]
    want = exact(W, parts, sign)
    stored = W.t().contiguous() if transposed else W.clone()
    if where == "strided":
        stored = torch.stack([stored, stored], dim=-1)[..., 0]
    before = stored.clone()
    out = {"fresh": None, "in place": stored, "out": torch.empty_like(stored), "strided": None}[where]
    got = merge_delta(stored, parts, sign=sign, transposed=transposed, out=out)
    assert got.dtype == dtype
    assert out is None or got is out
    assert where == "in place" or torch.equal(stored, before)
    error = ((got.t() if transposed else got).double() - want).abs()
    slack = 2e-6 if dtype in {torch.bfloat16, torch.float16} else TOLERANCE[dtype] * 20
    assert (error <= TOLERANCE[dtype] * want.abs() + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_tile_by_tile_gives_the_same_bits(dtype, monkeypatch):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 16 * 64)
    W, f = torch.randn(50, 64).to(dtype), factors(50, 64)
    whole = merge_delta(W, [f])
    in_place = merge_delta(W.clone(), [f], out=W.clone())
    step = tile_rows((50, 64))
    assert step == 16
    tiles = [
        merge_delta(W[s : s + step], [Factors(f.A, f.B[s : s + step], f.scaling)]) for s in range(0, 50, step)
    ]
    assert torch.equal(whole, torch.cat(tiles))
    assert torch.equal(whole, in_place)


def test_tiles_are_bounded():
    assert tile_rows((4096, 4096)) * 4096 * 4 == 4 * 2**20
    assert tile_rows((8, 10**9)) == 1


def test_merge_of_a_parameter_that_requires_grad():
    W = torch.nn.Parameter(torch.randn(5, 6))
    want = exact(W.detach(), [factors(5, 6)]).float()
    merge_delta(W, [factors(5, 6)], out=W)
    torch.testing.assert_close(W.detach(), want)
    assert W.grad_fn is None


@pytest.mark.parametrize(("out", "features", "r"), [(30, 20, 4), (3, 20, 8), (20, 3, 8), (20, 20, 1)])
def test_frobenius_norm(out, features, r):
    f = factors(out, features, r, scaling=-0.3)
    assert frobenius_norm(f) == pytest.approx(f.delta(torch.float64).norm().item(), rel=1e-12)


def test_frobenius_norm_keeps_its_digits_when_the_product_cancels():
    f = factors(30, 20, 2)
    B = torch.cat([f.B, -f.B * (1 + 2**-20)], dim=1)
    near_zero = Factors(torch.cat([f.A, f.A]).double(), B.double(), 1.0)
    assert frobenius_norm(near_zero) == pytest.approx(near_zero.delta(torch.float64).norm().item(), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("r", [1, 4])
def test_bound_holds_and_is_tight_at_rank_one(seed, r):
    f = factors(30, 20, r, scaling=-2.0, seed=seed)
    largest = f.delta(torch.float64).abs().max().item()
    assert largest <= delta_bound(f)
    if r == 1:
        assert delta_bound(f) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_non_finite_factors_show(bad, side):
    f = factors(6, 5)
    getattr(f, side)[1, 1] = bad
    assert not math.isfinite(delta_bound(f))
    assert not math.isfinite(frobenius_norm(f))


def test_bound_does_not_overflow_where_the_delta_does():
    big = torch.full((2, 3), 1e30)
    assert delta_bound(Factors(big, big.t().contiguous(), 1.0)) == pytest.approx(2e60, rel=1e-6)
