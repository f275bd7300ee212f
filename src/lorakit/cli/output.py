"""What every verb has alike: options, progress, and its result as JSON."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorakit.config.strict_json import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed import DataclassInstance

    Report = Callable[[str, int, int], None]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
"""Every verb has it."""
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
"""Of verbs that write a folder."""


def console_for(*, as_json: bool) -> Console:
    """Where a verb speaks to a person: stderr where stdout is for the JSON alone."""
    return Console(stderr=as_json)


@contextmanager
def progress(*, as_json: bool) -> Iterator[Report]:
    """A bar for each thing that is reported as (what, how many steps are done, of how many).

    On stderr, where that is a terminal; none beside JSON.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal) as bar:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=total)
            bar.update(rows[what], completed=done, total=total)

        yield show


def print_json(result: DataclassInstance | dict[str, Any]) -> None:
    """The result of a verb on stdout."""
    typer.echo(dumps(result if isinstance(result, dict) else asdict(result)).decode())


def escaped(text: str) -> str:
    """A text that rich is not to read as markup."""
    return text.replace("[", r"\[")
