"""The layers of an adapter as a grid: where in the model down the side, which module along the top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.checkpoint.keys import natural_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorakit.checkpoint.adapter_report import InspectedLayer

NO_ROW = "(top)"


@dataclass(frozen=True)
class Grid:
    """Layers by row and column.

    Attributes:
        rows: places in the model in natural order, such as "model.layers.10".
        columns: modules in the order of their first use, such as "self_attn.q_proj".
        cells: the layers that there are.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], InspectedLayer]


def make_grid(layers: Sequence[InspectedLayer]) -> Grid:
    """The layers in the smaller of two grids: paths are cut after their first number, or after their last.

    Of two as large it is the one with fewer columns.
    """
    grids = [_grid(layers, cut) for cut in (_first_number, _last_number)]
    return min(grids, key=lambda grid: (len(grid.rows) * len(grid.columns), len(grid.columns)))


def _grid(layers: Sequence[InspectedLayer], cut: Callable[[list[str]], int | None]) -> Grid:
    cells = {}
    for layer in layers:
        parts = layer.path.split(".")
        place = cut(parts)
        row, column = (parts[: place + 1], parts[place + 1 :]) if place is not None else ([], parts)
        cells[".".join(row) or NO_ROW, ".".join(column)] = layer
    rows = sorted({row for row, _ in cells}, key=natural_key)
    return Grid(tuple(rows), tuple(dict.fromkeys(column for _, column in cells)), cells)


def _first_number(parts: list[str]) -> int | None:
    return next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)


def _last_number(parts: list[str]) -> int | None:
    return next((place for place in range(len(parts) - 2, -1, -1) if parts[place].isdecimal()), None)
