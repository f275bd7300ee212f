"""`lorakit extract`: a full fine-tune as an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorakit.cli.output import AsJson, Output, console_for, escaped, print_json, progress
from lorakit.cli.rows import Rows, first_of, table_of
from lorakit.extracting.extract import extract as library_extract

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.extracting.extract import Extraction


def extract(
    base: Annotated[
        str, typer.Argument(help="Checkpoint that the adapter is for: folder, or repository of the hub.")
    ],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint: folder, or repository.")],
    output: Output,
    rank: Annotated[
        int | None,
        typer.Option("--rank", "-r", min=1, help="Rank of every weight; with --energy the largest."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", "-e", help="Share of each change's squared norm to keep, such as 0.95."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Module whose weight becomes factors; default all linear layers."
        ),
    ] = None,
    save: Annotated[
        list[str] | None,
        typer.Option("--save", "-s", help="Module that is kept whole, such as embed_tokens or norm."),
    ] = None,
    bias: Annotated[
        Literal["none", "all", "lora_only"], typer.Option(help="Which biases are kept.")
    ] = "none",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Tensor or module whose change is left out.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="A smaller change, relative to the weight's norm, counts as none.")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the factors: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the output.")] = False,
    rows: Rows = 20,
    as_json: AsJson = False,
) -> None:
    """Write the adapter that turns a base into a full fine-tune of it, as well as factors of a rank can.

    What changed and has no place in the adapter is an error that lists it: keep it whole (--save), or leave it out
    (--ignore). The rows that lose most come first.

    Example: lorakit extract Llama-3.2-1B my-finetune -o adapter --rank 64

    With embeddings, head and norms: lorakit extract base tuned -o adapter -e 0.95 -s embed_tokens -s lm_head -s norm
    """
    with progress(as_json=as_json) as show:
        result = library_extract(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            target_modules=target or None,
            modules_to_save=save or (),
            bias=bias,
            ignore=ignore or (),
            tolerance=tolerance,
            dtype=dtype,
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        print_json(result)
        return
    _print(result, rows, console_for(as_json=False))


def _print(result: Extraction, rows: int, console: Console) -> None:
    layers = sorted(result.layers, key=lambda layer: -layer.error)
    table = table_of("layer", "rank", "change", "norm", "error", "energy kept", title=escaped(result.output))
    for layer in first_of(layers, rows, console):
        table.add_row(
            escaped(layer.path),
            str(layer.rank),
            f"{layer.change:.2e}",
            f"{layer.norm:.4g}",
            f"{layer.error:.2e}",
            f"{100 * layer.kept:.3f} %",
        )
    console.print(table)
    for left in result.left_out:
        size = "" if left.change is None else f", a change of {left.change:.2e}"
        console.print(f"left out: {escaped(left.name)}{size}", highlight=False)
    console.print(
        f"{len(layers)} weights as factors, {len(result.whole)} tensors whole, {result.unchanged} unchanged; "
        f"{result.parameters:,} parameters; {100 * result.kept:.3f} % of the energy kept",
        highlight=False,
    )
    for note in result.notes:
        console.print(f"note: {escaped(note)}", highlight=False)
