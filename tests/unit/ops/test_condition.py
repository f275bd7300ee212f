"""`singular_range`: both ends of the singular values, within what it promises, whatever the matrix."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import NonFiniteError
from lorakit.ops import condition
from lorakit.ops.condition import singular_range

F64 = torch.float64
SPECTRA = {
    "noise": None,
    "power law": lambda n: torch.arange(1, n + 1, dtype=F64) ** -0.7,
    "two clusters": lambda n: torch.cat(
        [torch.full((n - n // 2,), 3.0), torch.full((n // 2,), 1.0)]
    ).double(),
    "orthogonal": lambda n: torch.ones(n, dtype=F64),
    "one small": lambda n: torch.cat(
        [torch.linspace(2, 1, n - 1, dtype=F64), torch.tensor([1e-3], dtype=F64)]
    ),
}


def matrix(kind, shape):
    spectrum = SPECTRA[kind]
    noise = torch.randn(shape, dtype=F64)
    if spectrum is None:
        return noise
    U, _, Vh = torch.linalg.svd(noise, full_matrices=False)
    return (U * spectrum(min(shape))) @ Vh


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(12, 12), (400, 420), (500, 400), (5, 900)], ids=str)
def test_both_ends(shape, kind, dtype):
    W = matrix(kind, shape).to(dtype)
    values = torch.linalg.svdvals(W.double())
    largest, smallest = singular_range(W)
    rounding = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * float(values[0])
    # rounding to bf16 makes tight clusters of what was equal
    loose = dtype is torch.bfloat16 and kind in {"two clusters", "orthogonal"}
    assert largest == pytest.approx(float(values[0]), rel=5e-4 if loose else 1e-5, abs=rounding)
    assert smallest == pytest.approx(float(values[-1]), rel=5e-4, abs=rounding)
    assert singular_range(W.clone()) == (largest, smallest)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_the_tolerance_holds(tol):
    for kind in ("noise", "power law"):
        W = matrix(kind, (420, 400))
        values = torch.linalg.svdvals(W)
        found = singular_range(W, tol=tol)
        assert abs(found.largest / float(values[0]) - 1) <= tol / 2
        assert abs(found.smallest / float(values[-1]) - 1) <= tol / 2


def test_a_large_matrix_costs_no_full_decomposition(monkeypatch):
    """Neither of noise nor of a power law."""
    monkeypatch.setattr(condition, "_of_all", lambda _: pytest.fail("all singular values were computed"))
    for kind in ("noise", "power law"):
        W = matrix(kind, (420, 400)).float()
        values = torch.linalg.svdvals(W.double())
        assert singular_range(W).smallest == pytest.approx(float(values[-1]), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    W = torch.randn(400, 420)
    found, scaled = singular_range(W), singular_range(W * scale)
    assert scaled.largest == pytest.approx(found.largest * scale, rel=1e-4)
    assert scaled.smallest == pytest.approx(found.smallest * scale, rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (400, 400), (400, 500)], ids=str)
def test_singular_matrices(shape):
    W = torch.randn(shape)
    W[3] = W[5]
    largest, smallest = singular_range(W)
    assert smallest <= 1e-5 * largest
    assert singular_range(torch.zeros(shape)) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad):
    W = torch.randn(6, 5)
    W[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"\(6, 5\) matrix: it holds NaN or infinity"):
        singular_range(W)


def test_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    singular_range(torch.ones(400, 400) + torch.eye(400))
    assert torch.equal(torch.get_rng_state(), state)
