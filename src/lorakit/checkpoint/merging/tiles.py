"""A changed weight, tile by tile: the very numbers that a merge in memory gives.

The tiles are those of `merge_delta`, so they do not depend on how a checkpoint is cut into tensors and files. A tile is
accumulated in fp32 (fp64 for an fp64 base) and rounded once.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lorakit.checkpoint.merging.scratch import fresh
from lorakit.errors import NonFiniteError, at_path
from lorakit.ops import is_finite, merge_delta, tile_rows
from lorakit.types import Factors
from lorakit.variants import Effect
from lorakit.weights.dense import add_biases

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lorakit.checkpoint.merging.changes import Change
    from lorakit.checkpoint.merging.fitting import Fit
    from lorakit.checkpoint.merging.scratch import Memory
    from lorakit.checkpoint.merging.weight import WeightReader
    from lorakit.layouts import Layout


class Tile(NamedTuple):
    """Consecutive elements of a changed weight: the first of them, and their values, wide and not rounded."""

    begin: int
    values: Tensor


class Ready:
    """One change with its adapters' tensors in memory.

    Args:
        change: of one weight.
        base: reads the checkpoint.
        twice: compute in fp64 throughout, to check against.
        memory: that tiles are made in; with `Scratch` one tile is gone when the next is asked for.
    """

    def __init__(
        self, change: Change, base: WeightReader, *, twice: bool = False, memory: Memory = fresh
    ) -> None:
        self.weight = change.weight
        self._change, self._base, self._memory = change, base, memory
        is_wide = twice or change.weight.dtype == torch.float64
        self.wide = torch.float64 if is_wide else torch.float32
        self._replaced = None if change.replaced is None else change.replaced.read().flatten()
        layouts = {fit.layout for fit in change.fits}
        assert len({(each.blocks, each.transposed) for each in layouts}) < 2, "one weight lies in one way"
        self.layout: Layout | None = next(iter(layouts), None)
        self._blocks: list[list[Factors]] = []
        self._gains: Tensor | None = None
        with torch.no_grad():
            self._add_factors(twice=twice)
            self._token_rows = self._rows()
            self._bias = self._merged_bias(twice=twice) if change.biases else None
        self.rows, self.columns = self._matrix()

    def _matrix(self) -> tuple[int, int]:
        """Rows of one block, and elements of a row."""
        shape = self.weight.shape
        if not shape:
            return 1, 1
        if self.layout is not None and self.layout.experts:
            return shape[1], shape[2]
        return shape[0], math.prod(shape[1:])

    def _add_factors(self, *, twice: bool) -> None:
        gains = []
        for fit in self._change.fits:
            with at_path(fit.site.path):
                blocks, gain = self._effect(fit, twice=twice)
            self._blocks += blocks
            gains += [] if gain is None else [gain]
        if gains:
            self._gains = torch.stack([gain - 1 for gain in gains]).sum(dim=0) + 1

    def _effect(self, fit: Fit, *, twice: bool) -> tuple[list[list[Factors]], Tensor | None]:
        """The factors of one adapter, block by block, those of what it takes off the base beside them; and its gain."""
        held = fit.adapter.held(fit.site, fit.named_as, self.weight.dtype, twice=twice)
        read = partial(self._whole, fit.layout)
        variant = fit.adapter.variant
        effect = Effect(held.A, held.B) if variant is None else variant.effect(held, fit.layout, read)
        found = [fit.layout.split(effect.A, effect.B, float(held.scaling))]
        offset = None if variant is None else variant.offset(fit.spec(self.weight.dtype), read)
        if offset is not None:
            found.append(tuple(Factors(block.A, block.B, -block.scaling) for block in offset))
        wide = [
            [Factors(block.A.to(self.wide), block.B.to(self.wide), block.scaling) for block in each]
            for each in found
        ]
        return wide, effect.rows

    def _whole(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The base weight as a variant wants it: (out, in), or (experts, out, in)."""
        weight = self._base.whole(self.weight, dtype)
        if layout.experts:
            return weight.mT if layout.transposed else weight
        matrix = weight.flatten(1)
        return matrix.t() if layout.transposed else matrix

    def _rows(self) -> Mapping[int, Tensor]:
        found: dict[int, Tensor] = {}
        for rows in self._change.rows:
            # rounded to the base's dtype, since a factor may be added to them
            found |= dict(zip(rows.tokens, rows.read().to(self.weight.dtype), strict=True))
        return found

    def _merged_bias(self, *, twice: bool) -> Tensor:
        blocks = []
        for fit in self._change.biases:
            held = fit.adapter.held(fit.site, fit.named_as, self.weight.dtype, twice=twice)
            blocks.append(fit.layout.split(held.A, held.B, float(held.scaling), held.bias))
        own = self._source(0, self.weight.count).to(torch.float64, copy=True)
        merged = add_biases(nn.Parameter(own, requires_grad=False), blocks)
        assert merged is not None
        return merged.detach()

    # ---- tiles ----------------------------------------------------------------------------------------

    def tiles(self, begin: int, count: int) -> Iterator[Tile]:
        """The tiles that hold `count` elements from `begin` on, cut to these.

        Raises:
            NonFiniteError: a result is not finite.
        """
        block_size = self.rows * self.columns
        step = tile_rows((self.rows, self.columns))
        end = begin + count
        for block in range(begin // max(block_size, 1), -(-end // max(block_size, 1))):
            first = block * block_size
            start = max(begin - first, 0) // self.columns // step * step
            for row in range(start, self.rows, step):
                stop = min(row + step, self.rows)
                here = first + row * self.columns
                if here >= end:
                    return
                values = self._tile(block, row, stop).flatten()
                low = max(begin - here, 0)
                high = min(end - here, len(values))
                yield Tile(here + low, values[low:high])

    def _source(self, begin: int, count: int) -> Tensor:
        """Elements that factors are added to, in the base's dtype."""
        if self._replaced is not None:
            return self._replaced[begin : begin + count].to(self.weight.dtype)
        return self._base.elements(self.weight, begin, count, self._memory)

    @torch.no_grad()
    def _tile(self, block: int, start: int, stop: int) -> Tensor:
        begin = (block * self.rows + start) * self.columns
        if self._bias is not None:
            return self._bias[start:stop]
        stored = self._source(begin, (stop - start) * self.columns).view(stop - start, self.columns)
        for token, row in self._token_rows.items():
            if start <= token < stop:
                stored[token - start] = row
        tile = converted(stored, self.wide, self._memory)
        layout = self.layout
        if layout is None:
            return tile
        factors = [self._part(each[block], layout, start, stop) for each in self._blocks]
        gains = self._gains if self._gains is None or layout.transposed else self._gains[start:stop]
        return merge_delta(tile, factors, transposed=layout.transposed, out=tile, rows=gains)

    @staticmethod
    def _part(factors: Factors, layout: Layout, start: int, stop: int) -> Factors:
        """The factors of these rows of the stored matrix, with the strides that they have in the whole."""
        if layout.transposed:
            return Factors(factors.A[:, start:stop], factors.B, factors.scaling)
        return Factors(factors.A, factors.B[start:stop], factors.scaling)


def converted(tile: Tensor, dtype: torch.dtype, memory: Memory) -> Tensor:
    """The same numbers in another dtype: the tensor itself where it has that already."""
    if tile.dtype == dtype:
        return tile
    return memory(str(dtype), tile.numel(), dtype).view(tile.shape).copy_(tile)


def rounded(tile: Tensor, dtype: torch.dtype, name: str, memory: Memory = fresh) -> Tensor:
    """A tile in the dtype of the output.

    Raises:
        NonFiniteError: it holds NaN or infinity then.
    """
    found = converted(tile, dtype, memory)
    if not is_finite(found):
        raise NonFiniteError(
            f"{name}: merging would give NaN or infinity in {str(dtype).removeprefix('torch.')}; nothing was written. "
            "The adapter diverged, the base holds such numbers, or the dtype is too narrow (pass dtype='bfloat16')"
        )
    return found
