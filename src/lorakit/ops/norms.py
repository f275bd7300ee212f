"""Sizes of a low-rank change, read from its factors in float64; the dense change is never built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.ops.finite import is_finite

if TYPE_CHECKING:
    from lorakit.types import Factors

# Far above the rounding of a float64 dot product of any rank, far below anything a caller cares about.
_SLACK = 1 + 1e-9


@torch.no_grad()
def frobenius_norm(f: Factors) -> float:
    """The Frobenius norm of `scaling * B @ A`, from the triangular factor of B: `||R A||`, in float64.

    Nothing is squared before the product is formed, so a B @ A that nearly cancels keeps its digits.

    Returns:
        The norm; NaN when a factor holds NaN or infinity.
    """
    A, B = f.A.double(), f.B.double()
    if not is_finite(A, B):
        return float("nan")
    R = torch.linalg.qr(B, mode="r").R
    return abs(f.scaling) * float(torch.linalg.matrix_norm(R @ A))


@torch.no_grad()
def delta_bound(f: Factors) -> float:
    """An upper bound on `max |scaling * B @ A|`: the largest row norm of B times the largest column norm of A.

    If the bound added to the largest base weight is finite in the weight's dtype, so is the merged weight.

    Returns:
        The bound in float64; NaN or infinity when a factor holds one.
    """
    rows = torch.linalg.vector_norm(f.B, dim=1, dtype=torch.float64).max()
    columns = torch.linalg.vector_norm(f.A, dim=0, dtype=torch.float64).max()
    return abs(f.scaling) * float(rows * columns) * _SLACK
