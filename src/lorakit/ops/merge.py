"""Adding low-rank changes to a dense weight: one rounding, and one tile of extra memory.

The tiles are a function of the shape alone, so a weight merged in memory and the same weight merged on disk, tile by
tile or whole, are equal bit for bit.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lorakit.types import Factors

# 4 MiB of float32. With 16 every tile is mapped anew by the allocator: a merge on disk of 1 GB had 140,000 page faults
# instead of 8,000 and took 1.15 times the CPU time, one in memory of a bf16 weight 1.2 times. Less gains nothing.
TILE_ELEMENTS = 2**20


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
    for write in _writes(W, result, factors, sign, transposed=transposed, rows=rows):
        write()
    return result


class MergeInPlace:
    """`merge_delta` into parts of a weight, which can be carried on after an interrupt: half a merge is no weight.

    Args:
        W: a weight, into which nobody else writes meanwhile; its version counts the writes, so it is no tensor of
            inference mode.
        parts: views of it, with the factors and the `rows` of each.
        transposed: whether the parts are stored (in, out).
    """

    def __init__(
        self,
        W: Tensor,
        parts: Sequence[tuple[Tensor, Sequence[Factors], Tensor | None]],
        *,
        transposed: bool = False,
    ) -> None:
        self._W, self._parts, self._transposed = W, parts, transposed
        self._begun = W._version

    @torch.no_grad()
    def carry_on(self) -> None:
        """Make the writes that have not been made yet."""
        for write in islice(self._writes(), self._W._version - self._begun, None):
            write()

    def _writes(self) -> Iterator[Callable[[], object]]:
        for part, factors, rows in self._parts:
            yield from _writes(part, part, factors, transposed=self._transposed, rows=rows)


def _writes(
    W: Tensor,
    out: Tensor,
    factors: Sequence[Factors],
    sign: float = 1.0,
    *,
    transposed: bool,
    rows: Tensor | None,
) -> Iterator[Callable[[], object]]:
    """What a merge does to `out`, one change of it at a time; `out` is W itself, or apart from it."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    pairs = [(f.A.t(), f.B.t(), f.scaling) if transposed else (f.B, f.A, f.scaling) for f in factors]
    pairs = [(left, right.to(W.device, wide), sign * scaling) for left, right, scaling in pairs]
    factor = None if rows is None else rows.to(W.device, wide).view((1, -1) if transposed else (-1, 1))
    step = tile_rows((W.shape[0], W.shape[1]))
    scratch = None if W.dtype == wide else W.new_empty((min(step, W.shape[0]), W.shape[1]), dtype=wide)
    for start in range(0, W.shape[0], step):
        part = slice(start, start + step)
        source, target = W[part], out[part]
        tile = target if scratch is None else scratch[: len(source)]
        changes = [] if tile.data_ptr() == source.data_ptr() else [partial(tile.copy_, source)]
        if factor is not None:
            changes.append(partial(tile.mul_, factor if transposed else factor[part]))
        changes += [
            partial(tile.addmm_, left[part].to(W.device, wide), right, alpha=alpha)
            for left, right, alpha in pairs
        ]
        if scratch is None:
            yield from changes
        else:
            for change in changes:
                change()
            yield partial(target.copy_, tile)
