"""Rounding a matrix to what few bits can hold, with one scale for each block of neighbours.

Every function gives the rounded values themselves, dequantised, on the device and in the dtype of the matrix. Rounding
them again gives them back: a block's largest entry keeps its size, so its scale stays.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The levels of 4-bit NormalFloat (Dettmers et al., 2023, arXiv:2305.14314, appendix E), in bitsandbytes' float32."""

BLOCK = 64
"""Neighbours that share a scale, as in bitsandbytes."""
# 2.5 ms for 1 M entries, 14 times less than bucketize and a lookup: a chunk and its helpers stay in the cache.
_CHUNK = 1024 * BLOCK


def round_nf4(W: Tensor) -> Tensor:
    """The nearest NormalFloat values of 4 bits, a scale for each 64 entries in row-major order, as in bitsandbytes.

    Args:
        W: (out, in), float32 or float64, finite.
    """
    return _in_blocks(W, BLOCK, _nearest_nf4)


def round_uniform(W: Tensor, levels: int, block: int = BLOCK) -> Tensor:
    """The nearest of evenly spaced values from minus to plus the largest size in each block, both included.

    Args:
        W: (out, in), float32 or float64, finite.
        levels: how many values; an odd number has 0 among them.
        block: entries in row-major order that share a scale.
    """
    half = (levels - 1) / 2
    shift = 0.0 if levels % 2 else 0.5

    def nearest(units: Tensor) -> Tensor:
        # an even number of levels lies at odd halves; the largest entry itself is at `half` either way
        steps = units.mul_(half).sub_(shift).round_().add_(shift)
        return steps.clamp_(-half, half).div_(half)

    return _in_blocks(W, block, nearest)


def round_int8(W: Tensor) -> Tensor:
    """The nearest of 255 evenly spaced values, a scale for each row: the grid of LLM.int8 (arXiv:2208.07339)."""
    return round_uniform(W, 255, W.shape[1])


def _in_blocks(W: Tensor, block: int, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """Scale every block to sizes of at most 1, let `nearest` overwrite that with its choice, and scale back.

    A last block may be shorter.
    """
    flat = W.reshape(-1)
    out = torch.empty_like(flat)
    whole = flat.numel() // block * block
    pieces = [(flat[:whole].view(-1, block), out[:whole].view(-1, block))]
    if whole < flat.numel():
        pieces.append((flat[None, whole:], out[None, whole:]))
    rows = max(1, _CHUNK // block) if W.device.type == "cpu" else max(1, flat.numel())
    for source, target in pieces:
        for values, place in zip(source.split(rows), target.split(rows), strict=True):
            low, high = torch.aminmax(values, dim=1, keepdim=True)
            scale = torch.maximum(-low, high)
            # times the inverse, as in bitsandbytes: one in 30 M entries is so near a middle that this decides
            units = values * scale.clamp(min=torch.finfo(W.dtype).tiny).reciprocal()
            torch.mul(nearest(units), scale, out=place)
    return out.view_as(W)


def _nearest_nf4(units: Tensor) -> Tensor:
    return _nearest(units, NF4)


def _nearest(units: Tensor, levels: Sequence[float]) -> Tensor:
    """The nearest of rising levels, by climbing from the lowest over each middle that is passed.

    The sums come out as the very levels: each is at most twice its neighbour in size or opposite in sign, so that a
    step is held exactly enough for rounding to give the next level.
    """
    chosen = torch.full_like(units, levels[0])
    passed = torch.empty_like(units)
    for lower, upper in pairwise(levels):
        torch.gt(units, (lower + upper) / 2, out=passed)
        chosen.add_(passed, alpha=upper - lower)
    return chosen
