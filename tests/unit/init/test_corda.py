"""The part of a weight that its inputs use most, or least, against its definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakit.errors import NonFiniteError
from lorakit.init import initialise
from lorakit.init.corda import oriented_parts
from models import bits, spec_of


def weight_and_covariance(out, inner, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inner, generator=generator) * torch.arange(1, inner + 1) ** -0.5
    X = torch.randn(400, inner, generator=generator) * torch.arange(1, inner + 1) ** -0.6
    X = X @ torch.linalg.qr(torch.randn(inner, inner, generator=generator)).Q
    return W, X.T @ X / 400


def defined(W, C, rank, method):
    """U_r S_r V_r C^-1 of W C, with C damped, by the definition."""
    W, C = W.double(), C.double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(C.shape[0])
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(rank) if method == "ipm" else slice(-rank, None)
    return (U[:, part] * S[part]) @ Vh[part] @ torch.linalg.inv(C)


def delta_of(parts):
    return (parts.U.double() * parts.S.double()) @ parts.V.double().T


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize(("out", "inner"), [(24, 24), (40, 16), (16, 40), (300, 200)])
def test_the_part_is_what_the_paper_says(method, out, inner):
    W, C = weight_and_covariance(out, inner)
    wanted = defined(W, C, 6, method)
    parts = oriented_parts(W, C, 6, method)
    assert (parts.U.shape, parts.S.shape, parts.V.shape) == ((out, 6), (6,), (inner, 6))
    assert float((delta_of(parts) - wanted).norm() / wanted.norm()) < (2e-3 if method == "ipm" else 2e-2)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_weight_is_only_read(method):
    W, C = weight_and_covariance(40, 16)
    before = bits(W)
    oriented_parts(W, C, 6, method)
    assert bits(W) == before


def test_a_covariance_of_few_inputs_is_no_obstacle():
    """Rank 3 in 24 dimensions: an inverse would need the damping, this only mentions it."""
    W, _ = weight_and_covariance(24, 24)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    parts = oriented_parts(W, x.T @ x, 6, "ipm")
    wanted = defined(W, x.T @ x, 6, "ipm")
    assert float((delta_of(parts) - wanted).norm() / wanted.norm()) < 2e-3


def test_the_scale_of_the_covariance_does_not_matter():
    W, C = weight_and_covariance(24, 24)
    one, other = (delta_of(oriented_parts(W, scale * C, 6, "ipm")) for scale in (1.0, 1e4))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_a_weight_of_lower_rank_stays_finite(method):
    W, C = weight_and_covariance(24, 24)
    W = W[:, :2] @ W[:2]
    parts = oriented_parts(W, C, 6, method)
    assert all(bool(torch.isfinite(part).all()) for part in (parts.U, parts.S, parts.V))
    assert float(delta_of(parts).norm()) <= float(W.norm()) * 1.001


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("where", ["weight", "covariance"])
def test_what_is_not_finite_is_refused(method, where):
    W, C = weight_and_covariance(24, 24)
    {"weight": W, "covariance": C}[where][3, 4] = float("nan")
    with pytest.raises(NonFiniteError):
        oriented_parts(W, C, 6, method)


@pytest.mark.parametrize("alpha", [6.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_offset(alpha, dtype):
    """Their delta is the part; the offset is a copy of them."""
    W, C = weight_and_covariance(24, 16)
    parts = oriented_parts(W, C, 4, "ipm")
    spec = replace(spec_of((24, 16), dtype, alpha=alpha, init="corda"), init_options=parts)
    (result,) = initialise(spec, lambda dtype: W.to(dtype))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    found = result.factors.delta(torch.float64)
    assert float((found - delta_of(parts)).norm() / found.norm()) < bound
    for own, taken in ((result.factors.A, result.offset.A), (result.factors.B, result.offset.B)):
        assert own.dtype == dtype
        assert torch.equal(own, taken)
        assert own.data_ptr() != taken.data_ptr()


@pytest.mark.parametrize(
    ("shape", "r", "fits"), [((24, 16), 4, True), ((24, 16), 3, False), ((16, 24), 4, False)]
)
def test_parts_say_what_they_are_for(shape, r, fits):
    parts = oriented_parts(*weight_and_covariance(24, 16), 4, "ipm")
    why = parts.why_not(spec_of(shape).layout, r)
    assert (why == "") == fits
    assert fits or "(24, 16, 4)" in why
