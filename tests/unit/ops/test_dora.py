"""The norms of W + s B A against the dense matrix, and the node that rescales an output against plain calls."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import dora
from lorakit.ops.dora import Matrix, Rescale, row_norms, row_squares, shifted, times_transposed

SHAPES = [(10, 12, 2), (1, 7, 1), (96, 130, 16), (130, 48, 8)]
# relative to the size of what is summed, with room for other orders of summation
BOUNDS = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 2e-5, torch.float16: 4e-7}


def problem(out, inner, r, dtype=torch.float32, *, size=0.3, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    W = (draw(out, inner) * 0.1).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return W, (draw(r, inner) * size).to(wide), (draw(out, r) * size).to(wide)


def norms(W, A, B, scaling, *, transposed=False):
    stored = Matrix(W.T.contiguous() if transposed else W, transposed)
    return row_norms(stored, row_squares(stored), A, B, scaling)


def dense(W, A, B, scaling):
    return (W.double() + scaling * B.double() @ A.double()).norm(dim=1)


def size(W, A, B, scaling):
    """What the square of the norm is summed from."""
    parts = W.double().abs() + abs(scaling) * B.double().abs() @ A.double().abs()
    return parts.square().sum(dim=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [None, 64])
def test_norms(shape, dtype, transposed, tile, monkeypatch):
    if tile is not None:
        monkeypatch.setattr("lorakit.ops.merge.TILE_ELEMENTS", tile)
    W, A, B = problem(*shape, dtype)
    for scaling in (0.7, -2.0, torch.tensor(0.7)):
        found, s = norms(W, A, B, scaling, transposed=transposed), float(scaling)
        assert found.dtype == A.dtype
        error = (found.double().square() - dense(W, A, B, s).square()).abs()
        assert (error <= BOUNDS[dtype] * size(W, A, B, s)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_where_the_factors_lie_along_the_weight(dtype):
    """As after a start from singular vectors; there bf16 products alone would be 1e-3 off."""
    W, _, _ = problem(256, 192, 1, dtype)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    A, B = V[:8].contiguous(), (U[:, :8] * S[:8]).contiguous()
    found, wanted = norms(W, A, B, 0.5).double(), dense(W, A, B, 0.5)
    assert ((found - wanted) / wanted).abs().max() <= (2e-5 if dtype == torch.bfloat16 else 1e-6)


def test_bf16_products_of_parts_are_used_where_the_processor_has_them(monkeypatch):
    W, A, _ = problem(32, 48, 4, torch.bfloat16)
    wanted = W.double() @ A.double().T
    for emulated in (frozenset(), frozenset({torch.bfloat16})):
        monkeypatch.setattr(dora, "emulated_dtypes", lambda emulated=emulated: emulated)
        for matrix in (Matrix(W), Matrix(W.T.contiguous(), transposed=True)):
            found = times_transposed(matrix, A)
            assert found.dtype == torch.float32
            assert (found.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_norms_that_cancel_are_finite_and_never_negative():
    W, _, _ = problem(6, 4, 1)
    found = norms(W, torch.eye(4), -W, 1.0)  # W - W
    assert (found >= 0).all()
    assert (found <= 1e-3 * W.norm(dim=1)).all()
    assert torch.isfinite(torch.ones(6) / found).all()


def test_a_row_of_zeros_has_a_norm_that_can_be_divided_by():
    found = norms(torch.zeros(3, 4), torch.ones(2, 4), torch.zeros(3, 2), 1.0)
    assert (found > 0).all()
    assert torch.equal(torch.zeros(3) / found, torch.zeros(3))


# ---- rescaling ------------------------------------------------------------------------------------------


def rescaling(shape, space, dtype=torch.float64, seed=4):
    """Y, bias, magnitude and norms, all with a gradient but the last."""
    generator = torch.Generator().manual_seed(seed)
    out = shape[-1 - space]

    def draw(*dims):
        return torch.randn(dims, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    y, bias = draw(*shape).to(dtype), draw(out).to(dtype)
    magnitude, norms = (0.5 + draw(out).abs()).to(wide), (0.5 + draw(out).abs()).to(wide)
    return y.requires_grad_(), bias.requires_grad_(), magnitude.requires_grad_(), norms


def plain(y, bias, magnitude, norms, space):
    gain = (magnitude / norms).view(-1, *(1,) * space)
    shift = 0 if bias is None else bias.view(-1, *(1,) * space)
    return gain * (y - shift) + shift


FORMS = [((5, 6), 0), ((2, 3, 6), 0), ((6,), 0), ((2, 6, 4), 1), ((2, 6, 3, 4), 2), ((6, 3, 4), 2)]


@pytest.mark.parametrize(("shape", "space"), FORMS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_node(shape, space, has_bias):
    y, bias, magnitude, norms = rescaling(shape, space)
    bias = bias if has_bias else None
    inputs = [t for t in (y, bias, magnitude) if t is not None]
    found = Rescale.apply(y, bias, magnitude, norms, space)
    wanted = plain(y, bias, magnitude, norms, space)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        shifted(y, y, bias, magnitude / norms - 1, space), wanted, rtol=1e-13, atol=1e-13
    )
    dy = torch.randn(found.shape, dtype=found.dtype)
    for got, want in zip(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True
    ):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(
        lambda *_: Rescale.apply(y, bias, magnitude, norms, space), inputs, atol=1e-6
    )


def test_the_node_keeps_what_it_needs():
    y, bias, magnitude, norms = rescaling((64, 6), 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Rescale.apply(y, bias, magnitude.detach(), norms, 0)
        assert sum(t.numel() for t in kept) == 3 * 6  # nothing of y where the magnitude is frozen
        kept.clear()
        Rescale.apply(y, bias, magnitude, norms, 0)
    assert sum(t.numel() for t in kept) == y.numel() + 3 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_are_rounded_once(dtype):
    y, _, magnitude, norms = rescaling((40, 6), 0, dtype)
    magnitude = (norms * (1 + 0.02 * magnitude.detach())).requires_grad_()  # gains are near 1
    found = Rescale.apply(y, None, magnitude, norms, 0)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    wanted = plain(y.double(), None, magnitude.double(), norms.double(), 0)
    assert ((found.double() - wanted).abs() <= 0.55 * eps * wanted.abs() + 1e-9).all()
    dy = torch.randn(found.shape).to(dtype)
    got = torch.autograd.grad(found, [y, magnitude], dy)
    want = torch.autograd.grad(wanted, [y, magnitude], dy.double())
    assert [g.dtype for g in got] == [dtype, torch.float32]
    assert ((got[0] - want[0]).abs() <= 0.55 * eps * want[0].abs() + 1e-9).all()
    assert (got[1] - want[1]).abs().max() <= 4 * eps * want[1].abs().max()


def test_a_sum_beyond_fp16():
    y = torch.full((1000, 2), 30.0, dtype=torch.float16)
    magnitude = torch.ones(2, requires_grad=True)
    Rescale.apply(y, None, magnitude, torch.ones(2), 0).backward(torch.full_like(y, 30.0))
    assert torch.equal(magnitude.grad, torch.full((2,), 900_000.0))
