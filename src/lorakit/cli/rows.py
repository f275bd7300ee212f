"""Tables of one row a layer, of which only the first rows are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

Rows = Annotated[int, typer.Option(min=0, help="Rows of the table; 0 shows all.")]
T = TypeVar("T")


def first_of(rows: Sequence[T], count: int, console: Console) -> Sequence[T]:
    """The first rows; says on the console how many are left out."""
    if not count or len(rows) <= count:
        return rows
    console.print(f"the first {count} of {len(rows)} rows; --rows 0 shows all", highlight=False)
    return rows[:count]


def table_of(name: str, *numbers: str, title: str | None = None) -> Table:
    """A table with names at the left, folded where there is no room, and columns of numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table
