"""`lorakit diff`: how far apart two adapters are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.checkpoint.comparing import diff as library_diff
from lorakit.cli.output import AsJson, console_for, escaped, print_json, progress
from lorakit.cli.rows import Rows, first_of, table_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from lorakit.checkpoint.comparing import AdapterDifference, LayerDifference
    from lorakit.ops.similarity import Angles

_LONGEST = 60
APART = 3
"""The exit code of `--fail-over`: the adapters are further apart than that."""


def diff(
    a: Annotated[str, typer.Argument(help="Folder of an adapter, or repository of the hub.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    fail_over: Annotated[
        float | None,
        typer.Option(min=0.0, help="Exit with code 3 where anything differs by more than this, relatively."),
    ] = None,
    rows: Rows = 20,
    as_json: AsJson = False,
) -> None:
    """Compare what two adapters do to each weight, however their factors are written.

    A difference is the norm of one change minus the other, relative to the larger one: 0 is equal, 1 unrelated or one of
    them zero, 2 opposite. An overlap is the mean squared cosine of the principal angles, 1 where one space holds the
    other. Exit codes: 0 done, 1 an error, 2 a wrong call, 3 further apart than --fail-over.

    Example: lorakit diff before after

    In a script: lorakit diff expected found --fail-over 1e-3 --json
    """
    with progress(as_json=as_json) as show:
        result = library_diff(a, b, progress=show)
    if as_json:
        print_json(result)
    else:
        _print(result, rows, console_for(as_json=False))
    if fail_over is not None and result.largest > fail_over:
        told = f"lorakit: the largest difference, {result.largest:.4g}, is more than {fail_over:g}"
        console_for(as_json=True).print(told, style="red", highlight=False)
        raise typer.Exit(APART)


def _print(result: AdapterDifference, rows: int, console: Console) -> None:
    layers = sorted(result.layers, key=lambda layer: -layer.difference)
    if layers:
        console.print(_table(first_of(layers, rows, console)))
    for tensor in result.tensors:
        if tensor.difference:
            console.print(f"{escaped(tensor.name)}: difference {tensor.difference:.4g}", highlight=False)
    for where, names in (("a", result.only_a), ("b", result.only_b)):
        for name in names:
            console.print(f"only in {where}: {escaped(name)}", highlight=False)
    for field in result.config:
        values = f"{_shown(field.a)} and {_shown(field.b)}"
        console.print(f"config: {field.field}: {escaped(values)}", highlight=False)
    cosine = "–" if result.cosine is None else f"{result.cosine:.4f}"
    console.print(
        f"in all: difference {result.difference:.4g}, cosine {cosine}, norms {result.norm_a:.4g} and "
        f"{result.norm_b:.4g}",
        highlight=False,
    )


def _table(layers: Sequence[LayerDifference]) -> Table:
    table = table_of("layer", "difference", "cosine", "norm a", "norm b", "columns", "rows")
    for layer in layers:
        table.add_row(
            escaped(layer.path),
            f"{layer.difference:.4g}",
            "–" if layer.cosine is None else f"{layer.cosine:.4f}",
            f"{layer.norm_a:.4g}",
            f"{layer.norm_b:.4g}",
            _overlap(layer.columns),
            _overlap(layer.rows),
        )
    return table


def _shown(value: object) -> str:
    """A value of a config; of a long list or dict how long it is."""
    text = repr(value)
    if len(text) > _LONGEST and isinstance(value, (list, dict)):
        return f"{len(value)} entries"
    return text


def _overlap(angles: Angles | None) -> str:
    return "–" if angles is None else f"{angles.overlap:.3f}"
