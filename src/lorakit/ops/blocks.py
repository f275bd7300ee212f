"""Products with block-diagonal matrices, which are stored and multiplied without their zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def block_linear(x: Tensor, weight: Tensor, blocks: int) -> Tensor:
    """`x @ block_diagonal(weight).T`: each part of the outputs from its own part of the inputs.

    Args:
        x: (..., in).
        weight: (out, in / blocks), the blocks one below the other; cast to the dtype of x.
        blocks: how many; divides in and out.

    Returns:
        (..., out) in the dtype of x, or autocast's.
    """
    parts = x.unflatten(-1, (blocks, -1))
    each = weight.to(x.dtype).unflatten(0, (blocks, -1))
    return torch.einsum("...bi,boi->...bo", parts, each).flatten(-2)


def block_diagonal(weight: Tensor, blocks: int) -> Tensor:
    """(out, in / blocks) with its zeros: (out, in). Differentiable."""
    made: Tensor = torch.block_diag(*weight.chunk(blocks))
    return made
