"""Which program of a kernel serves which rows: worked out once a forward on the host, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.ops.groups import Groups


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tiles of neighbouring rows of one adapter, over the tokens sorted by adapter.

    Its sizes follow from the numbers of samples, tokens and adapters, not from who gets which: a graph captured with one
    schedule replays another batch of these sizes after `copy_`.

    Attributes:
        order: (N,) int32: the samples sorted by adapter, base alone first.
        tiles: (tiles, 3) int32: adapter, first row, row after the adapter's last; adapter -1 for a tile of nobody.
        rows: rows in a tile.
    """

    order: Tensor
    tiles: Tensor
    rows: int

    @staticmethod
    def of(groups: Groups, tokens: int) -> Schedule:
        """The schedule for samples of so many tokens; made once for all layers."""
        schedule: Schedule = groups.once(("schedule", tokens), lambda: _make(groups, tokens))
        return schedule

    def copy_(self, other: Schedule) -> None:
        """Take over another schedule of the same sizes, in the memory that a captured graph reads."""
        assert self.rows == other.rows, f"tiles of {self.rows} and {other.rows} rows"
        self.order.copy_(other.order)
        self.tiles.copy_(other.tiles)


def _make(groups: Groups, tokens: int) -> Schedule:
    total = len(groups.samples) * tokens
    rows = _rows(total, groups.count)
    tiles: list[tuple[int, int, int]] = []
    row = (len(groups.samples) - sum(groups.counts.values())) * tokens
    for adapter, members in groups.counts.items():
        end = row + members * tokens
        tiles += [(adapter, start, end) for start in range(row, end, rows)]
        row = end
    # every adapter has at most one tile that is not full
    spare = ceil(total / rows) + min(groups.count, len(groups.samples)) - len(tiles)
    device = groups.ids.device
    table = torch.tensor(tiles + [(-1, 0, 0)] * spare, dtype=torch.int32)
    return Schedule(groups.order.to(torch.int32), table.to(device), rows)


def _rows(total: int, count: int) -> int:
    """Rows in a tile, 16 to 64 by powers of two, about as many as an adapter has."""
    share = max(1, total // max(1, count))
    return min(64, max(16, 1 << (share - 1).bit_length()))
