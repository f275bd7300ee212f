"""`lorakit inspect`: what is in an adapter."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.checkpoint.inspecting import inspect_adapter
from lorakit.cli.output import console_for, escaped, print_json, progress
from lorakit.cli.rows import Rows, first_of, table_of
from lorakit.inspection import make_grid, short, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from lorakit.checkpoint.adapter_report import AdapterReport, InspectedLayer

_MOST_NAMES = 5


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter, or repository of the hub.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots and tables; it needs no network.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write an image; needs matplotlib.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="One row for each layer, not for each kind of module.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a page or an image that is there.")
    ] = False,
    rows: Rows = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what is in an adapter: tensors, norms, effective ranks, dead layers, NaN, digest, where it comes from.

    A file with NaN, or one that was damaged, is reported and not refused.

    Example: lorakit inspect my-adapter --html report.html
    """
    with progress(as_json=as_json) as show:
        report = inspect_adapter(adapter, progress=show)
    written = [write_report(report, path, overwrite=overwrite) for path in (html, png) if path is not None]
    if as_json:
        print_json(report)
        return
    console = console_for(as_json=False)
    _head(report, console)
    console.print(_kinds(report))
    if report.layers:
        found = _by_layer(report.layers, rows, console) if layers else _by_module(report.layers)
        console.print(found)
    _odd(report, console)
    for path in written:
        console.print(f"written: {escaped(str(path))}", highlight=False)


def _head(report: AdapterReport, console: Console) -> None:
    config = report.config
    kind = report.variant or "LoRA"
    dtypes = ", ".join(f"{count:,} {name}" for name, count in report.dtypes.items())
    lines = [
        f"{report.path}: {kind}, r={config['r']}, lora_alpha={config['lora_alpha']}",
        f"base: {report.base or '–'}   task: {report.task_type or '–'}   PEFT: {report.peft_version or '–'}",
        f"digest: {report.digest}   config: {report.config_state}",
        f"{report.parameters:,} parameters ({dtypes}), {report.bytes / 1e6:,.2f} MB",
    ]
    for line in lines:
        console.print(escaped(line), highlight=False)


def _kinds(report: AdapterReport) -> Table:
    table = table_of("tensors", "", "parameters", "bytes")
    for kind in report.kinds:
        table.add_row(kind.kind, f"{kind.tensors:,}", f"{kind.parameters:,}", f"{kind.bytes:,}")
    return table


def _by_module(layers: Sequence[InspectedLayer]) -> Table:
    """A row for all layers of one name."""
    grid = make_grid(layers)
    names = ("layers", "rank", "norm", "eff. rank", "for 99 %", "dead", "NaN")
    table = table_of("module", *names, title="the change of the weights")
    for column in grid.columns:
        own = [grid.cells[row, column] for row in grid.rows if (row, column) in grid.cells]
        table.add_row(
            escaped(column),
            str(len(own)),
            _span([float(layer.rank) for layer in own]),
            _span([layer.norm for layer in own]),
            _span([layer.effective_rank for layer in own]),
            _span([layer.energy_rank for layer in own]),
            str(sum(layer.dead for layer in own)),
            str(sum(1 for layer in own if layer.nan or layer.inf)),
        )
    return table


def _span(values: Sequence[float | None]) -> str:
    known = sorted(float(value) for value in values if value is not None)
    if not known:
        return "–"
    ends = dict.fromkeys((short(known[0]), short(known[-1])))
    return " … ".join(ends)


def _by_layer(layers: Sequence[InspectedLayer], rows: int, console: Console) -> Table:
    table = table_of("layer", "weight", "rank", "scaling", "norm", "eff. rank", "for 99 %")
    table.add_column("odd")
    for layer in first_of(layers, rows, console):
        odd = "dead" * layer.dead
        if layer.norm is None:
            odd = f"{layer.nan:,} NaN, {layer.inf:,} infinite"
        table.add_row(
            escaped(layer.path),
            f"{layer.shape[0]}x{layer.shape[1]}",
            str(layer.rank),
            short(layer.scaling),
            short(layer.norm, 4),
            short(layer.effective_rank),
            short(None if layer.energy_rank is None else float(layer.energy_rank)),
            odd,
        )
    return table


def _odd(report: AdapterReport, console: Console) -> None:
    lines = [f"problem: {problem}" for problem in report.problems]
    for names, what in (
        (report.non_finite, "NaN or infinity in"),
        (report.dead, "dead, the change is zero:"),
    ):
        if names:
            more = f" and {len(names) - _MOST_NAMES:,} more" * (len(names) > _MOST_NAMES)
            lines.append(f"{what} {', '.join(names[:_MOST_NAMES])}{more}")
    for line in lines:
        console.print(line, style="red", markup=False, highlight=False)
    for note in report.notes:
        console.print(f"note: {escaped(note)}", highlight=False)
