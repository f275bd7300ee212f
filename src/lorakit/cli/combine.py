"""`lorakit combine`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.output import AsJson, Output, console_for, escaped, print_json, progress
from lorakit.cli.rows import Rows, first_of, table_of
from lorakit.combiners import METHODS
from lorakit.tools import combine as library_combine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lorakit.checkpoint.combining import Combination


def combine(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters for one base: folders, or repositories of the hub.")
    ],
    output: Output,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Factor on an adapter, once for each, in order; default 1."),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS)}.")] = "svd",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=1, help="Rank of the result, for methods that reduce.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", "-e", help="Share of the squared norm to keep, such as 0.99.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of the elements that pruning keeps.")] = None,
    majority_sign: Annotated[
        Literal["total", "frequency"], typer.Option(help="How ties and its like elect signs.")
    ] = "total",
    svd_clamp: Annotated[
        float | None, typer.Option(help="Quantile at which entries of the result are cut.")
    ] = None,
    t: Annotated[float | None, typer.Option("-t", help="Where slerp goes between the two.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Spread of the keep probabilities of della.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random pruning.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output.")] = False,
    rows: Rows = 20,
    as_json: AsJson = False,
) -> None:
    """Combine adapters into a new one, without the model: the methods of add_weighted_adapter() and more.

    Example: lorakit combine french german -o both -w 0.7 -w 0.3 --method sum --rank 16

    Pruned by sign: lorakit combine a b c -o merged --method ties_svd --density 0.3
    """
    with progress(as_json=as_json) as show:
        result = library_combine(
            adapters,
            weight or [1.0] * len(adapters),
            output=output,
            method=method,
            rank=rank,
            energy=energy,
            density=density,
            majority_sign_method=majority_sign,
            svd_clamp=svd_clamp,
            t=t,
            epsilon=epsilon,
            seed=seed,
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        print_json(result)
        return
    _print(result, [Path(each).name for each in adapters], rows, console_for(as_json=False))


def _print(result: Combination, names: Sequence[str], rows: int, console: Console) -> None:
    table = table_of("layer", "rank", "energy kept", title=escaped(result.output))
    layers = sorted(result.layers, key=lambda layer: layer.kept)
    for layer in first_of(layers, rows, console):
        table.add_row(escaped(layer.path), str(layer.rank), f"{100 * layer.kept:.3f} %")
    console.print(table)
    told = " + ".join(f"{number:g} · {name}" for number, name in zip(result.weights, names, strict=True))
    console.print(
        f"{escaped(told)} by {result.method}: {len(layers)} weights, {result.parameters:,} parameters",
        highlight=False,
    )
