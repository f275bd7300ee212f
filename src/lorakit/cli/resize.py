"""`lorakit resize`: an adapter of another rank."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.checkpoint.resizing import resize as library_resize
from lorakit.cli.output import AsJson, Output, console_for, escaped, print_json, progress
from lorakit.cli.rows import Rows, first_of, table_of


def resize(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter, or repository of the hub.")],
    output: Output,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", min=1, help="Rank of every weight; with --energy the largest."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", "-e", help="Share of each weight's squared norm to keep, such as 0.99."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output.")] = False,
    rows: Rows = 20,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of another rank: the best one there is, weight by weight.

    What it loses is told; the rows that lose most come first. Everything that is no factor is carried over.

    Example: lorakit resize my-adapter -o smaller --energy 0.99

    To one rank for all weights: lorakit resize my-adapter -o smaller --rank 8
    """
    with progress(as_json=as_json) as show:
        result = library_resize(adapter, output, rank=rank, energy=energy, overwrite=overwrite, progress=show)
    if as_json:
        print_json(result)
        return
    console = console_for(as_json=False)
    layers = sorted(result.layers, key=lambda layer: -layer.error)
    names = ("was rank", "rank", "norm", "error", "energy kept")
    table = table_of("layer", *names, title=escaped(result.output))
    for layer in first_of(layers, rows, console):
        table.add_row(
            escaped(layer.path),
            str(layer.rank_before),
            str(layer.rank),
            f"{layer.norm:.4g}",
            f"{layer.error:.2e}",
            f"{100 * layer.kept:.3f} %",
        )
    console.print(table)
    console.print(
        f"{len(layers)} weights; factors of {result.parameters_before:,} parameters became {result.parameters:,}; "
        f"{100 * result.kept:.3f} % of the energy kept",
        highlight=False,
    )
