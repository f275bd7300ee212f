"""Adding low-rank changes to a dense weight: one rounding, and one tile of extra memory.

The tiles are a function of the shape alone, so a weight merged in memory and the same weight merged on disk, tile by
tile or whole, are equal bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.types import Factors

TILE_ELEMENTS = 4 * 2**20  # 16 MiB of float32


def tile_rows(shape: tuple[int, int]) -> int:
    """How many rows of a stored weight of this (rows, columns) shape are merged at a time."""
    return max(1, TILE_ELEMENTS // max(1, shape[1]))


@torch.no_grad()
def merge_delta(
    W: Tensor,
    factors: Sequence[Factors],
    *,
    sign: float = 1.0,
    transposed: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`W + sign * sum_i s_i B_i A_i`, accumulated in float32 (float64 for a float64 W) and rounded once.

    With `rows` it is `diag(rows) W + ...`.

    Args:
        W: (out, in), or (in, out) when `transposed`; any floating dtype and strides.
        factors: the changes; moved to W's device one tile of B (or of A when `transposed`) at a time.
        sign: 1.0 to add, -1.0 to subtract.
        transposed: whether W is stored (in, out), as transformers' Conv1D does.
        out: where to write, with W's shape, dtype and device; may be W itself. A fresh tensor when None.
        rows: (out,) factors on the rows of W (on its columns when `transposed`), or None for ones.

    Returns:
        `out`, or the fresh tensor, in W's dtype. Biases of the factors are not looked at.
    """
    result = torch.empty_like(W) if out is None else out
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    pairs = [(f.A.t(), f.B.t(), f.scaling) if transposed else (f.B, f.A, f.scaling) for f in factors]
    pairs = [(left, right.to(W.device, wide), sign * scaling) for left, right, scaling in pairs]
    factor = None if rows is None else rows.to(W.device, wide).view((1, -1) if transposed else (-1, 1))
    step = tile_rows((W.shape[0], W.shape[1]))
    for start in range(0, W.shape[0], step):
        part = slice(start, start + step)
        source, target = W[part], result[part]
        if W.dtype == wide:
            tile = target if target.data_ptr() == source.data_ptr() else target.copy_(source)
        else:
            tile = source.to(wide)
        if factor is not None:
            tile.mul_(factor if transposed else factor[part])
        for left, right, alpha in pairs:
            tile.addmm_(left[part].to(W.device, wide), right, alpha=alpha)
        if tile is not target:
            target.copy_(tile)
        del tile  # or the next one would be made beside it
    return result
