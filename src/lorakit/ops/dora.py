"""DoRA's tensor maths: the norms of `W + scaling * B A` row by row, and an output rescaled by magnitude over norm.

Guarantees:
- neither `B A` nor a wide copy of a whole half-precision weight is built: the norm is the low-rank expansion
  `||W||^2 + rowsum((2 s W A^T + s^2 B (A A^T)) * B)`, of which the first term is kept for as long as W is the same;
- what reads W runs in pieces that depend on its shape alone, and gives fp32 numbers (fp64 for an fp64 W);
- no gradient goes through the norm (Liu et al., 2024, arXiv:2402.09353, section 4.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.ops.dropout import KERNEL_DTYPES, KERNEL_RANK, has_triton
from lorakit.ops.merge import tile_rows
from lorakit.ops.reference import must_compose
from lorakit.ops.terms import emulated_dtypes

if TYPE_CHECKING:
    from torch import Tensor


class Matrix(NamedTuple):
    """A weight as a matrix.

    Attributes:
        values: (out, in), or (in, out) when `transposed`.
        transposed: which of the two.
    """

    values: Tensor
    transposed: bool = False


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms of a weight of some dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_squares(W: Matrix) -> Tensor:
    """The squared norm of each output's row of W: (out,), wide."""
    wide = wide_dtype(W.values.dtype)
    parts = [part.to(wide).square() for part in _pieces(W.values)]
    if W.transposed:
        return torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)
    return torch.cat([part.sum(dim=1) for part in parts])


def row_norms(W: Matrix, squares: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """The norm of each output's row of `W + scaling * B A`: (out,), wide, and never below the smallest number.

    Where the two nearly cancel, the rounding of `||W||^2` is what is left of the square; it is kept from being
    negative.

    Args:
        W: the weight.
        squares: of `row_squares(W)`.
        A: (r, in).
        B: (out, r).
        scaling: of the adapter.
    """
    wide = wide_dtype(W.values.dtype)
    A, B = A.to(wide), B.to(wide)
    scaling = scaling.to(wide) if isinstance(scaling, torch.Tensor) else scaling
    if _on_kernels(W.values, A, B):
        from lorakit.ops.triton import norms

        return norms.row_norms(W.values.t() if W.transposed else W.values, squares, A, B * scaling)
    inner = times_transposed(W, A) * (2 * scaling) + B @ (A @ A.t()) * scaling**2
    total = squares + (inner * B).sum(dim=1)
    return total.clamp_min(0).sqrt().clamp_min(torch.finfo(wide).tiny)


def _on_kernels(values: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the kernel reads W: on GPUs, with Triton, where the norm is a number and no gradient is asked for."""
    if not values.is_cuda or values.dtype not in KERNEL_DTYPES or len(A) > KERNEL_RANK:
        return False
    differentiated = torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
    return has_triton() and not must_compose(values, ()) and not differentiated


def times_transposed(W: Matrix, A: Tensor) -> Tensor:
    """`W A^T`, (out, r) in the dtype of A, which is wide."""
    if W.values.dtype == torch.bfloat16 and _multiplies_bfloat16(W.values):
        return _products_of_parts(W, A)
    pieces = _pieces(W.values)
    if not W.transposed:
        return torch.cat([piece.to(A.dtype) @ A.t() for piece in pieces])
    columns = A.split([piece.shape[0] for piece in pieces], dim=1)
    products = [a @ piece.to(A.dtype) for a, piece in zip(columns, pieces, strict=True)]
    return torch.stack(products).sum(dim=0).t()


def _products_of_parts(W: Matrix, A: Tensor) -> Tensor:
    """`W A^T` of a bfloat16 W in bfloat16 products, to some 1e-6: 2.2 ms at 4096 x 4096, where widening W takes 9 ms.

    A is cut into two bfloat16 parts. A product is summed in fp32 and rounded at its end, so the difference between
    the sum and the rounded sum is had by giving the latter to a second product to start from.
    """
    high = A.to(torch.bfloat16)
    low = (A - high.to(A.dtype)).to(torch.bfloat16)
    values = W.values if W.transposed else W.values.t()
    rounded = torch.cat([high, low]) @ values
    first, second = rounded.chunk(2)
    lost = torch.addmm(first, high, values, beta=-1)
    return (first.to(A.dtype) + second.to(A.dtype) + lost.to(A.dtype)).t()


def _multiplies_bfloat16(values: Tensor) -> bool:
    return values.device.type != "cpu" or torch.bfloat16 not in emulated_dtypes()


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """A matrix cut along its rows, so that no more than one piece is wide at a time."""
    if torch.compiler.is_compiling():
        return (values,)
    rows = tile_rows((values.shape[0], values.shape[1]))
    return torch.split(values, rows)


# ---- rescaling ------------------------------------------------------------------------------------------


def by_row(rows: Tensor, space: int) -> Tensor:
    """(out,) numbers in the shape that multiplies (..., out, *space)."""
    return rows.view(-1, *(1,) * space) if space else rows


def scaled_rows(gain: Tensor, B: Tensor) -> Tensor:
    """`diag(gain) B` in the dtype of B, (out, r, *1)."""
    return (by_row(gain, B.ndim - 1) * B).to(B.dtype)


def shifted(y: Tensor, base_y: Tensor, bias: Tensor | None, change: Tensor, space: int) -> Tensor:
    """`y + change * (base_y - bias)`: for `change = gain - 1`, what rescaling the rows of W does to an output.

    A gain is near 1, so its change is what loses least when it is rounded to the dtype of y.

    Args:
        y: (..., out, *space).
        base_y: of the same shape, `W x + bias`; may be y itself.
        bias: (out,) or None.
        change: (out,).
        space: how many dimensions come after out.
    """
    inner = base_y if bias is None else base_y - by_row(bias, space).to(base_y.dtype)
    return torch.addcmul(y, inner, by_row(change.to(y.dtype), space))


class Rescale(torch.autograd.Function):
    """`g (y - bias) + bias` for `g = magnitude / norms`: keeps y, and what is no longer than a row.

    y (..., out, *space) is not written to; bias (out,) or None; magnitude (out,); norms (out,), taken to be constant;
    `space` says how many dimensions come after out.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor | None, magnitude: Tensor, norms: Tensor, space: int
    ) -> Tensor:
        """The rescaled output, in the dtype of y."""
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, bias, magnitude, norms)
        ctx.space = space
        return shifted(y, y, bias, magnitude / norms - 1, space)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; differentiable in turn."""
        y, bias, magnitude, norms = ctx.saved_tensors
        need_y, need_bias, need_magnitude = ctx.needs_input_grad[:3]
        space, change = ctx.space, magnitude / norms - 1
        dbias = (-change * _sum_by_row(dy, space)).to(bias.dtype) if need_bias else None
        dmagnitude = None
        if need_magnitude:
            inner = y if bias is None else y - by_row(bias, space).to(y.dtype)
            dmagnitude = (_sum_by_row(dy * inner, space) / norms).to(magnitude.dtype)
        return shifted(dy, dy, None, change, space) if need_y else None, dbias, dmagnitude, None, None


def _sum_by_row(t: Tensor, space: int) -> Tensor:
    """(..., out, *space) -> (out,). The sum of fp16 numbers may be beyond fp16."""
    row = t.ndim - 1 - space
    others = [dim for dim in range(t.ndim) if dim != row]
    return t.sum(dim=others, dtype=torch.float32 if t.dtype == torch.float16 else None) if others else t
