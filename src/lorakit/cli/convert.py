"""`lorakit convert`: an adapter from one tool's format to another's."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorakit.checkpoint.converting.convert import convert as convert_files
from lorakit.cli.output import AsJson, console_for, escaped, print_json, progress

if TYPE_CHECKING:
    from lorakit.checkpoint.converting.convert import Converted


def convert(
    source: Annotated[Path, typer.Argument(help="File or folder of the adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File or folder to write.")],
    to: Annotated[
        str, typer.Option(help="peft, diffusers, kohya (also for ComfyUI), gguf, mlx or torchtune.")
    ],
    from_: Annotated[str | None, typer.Option("--from", help="Format of the source; default: looks.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder of the base model, or repository of the hub; gguf and torchtune need its config.json."
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            help="Model of a pipeline: unet, transformer, text_encoder, text_encoder_2 or text_encoder_3."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter between the formats of PEFT, diffusers, kohya/ComfyUI, llama.cpp (GGUF), MLX and torchtune.

    What it does to the weights stays the same; what the target has no place for is refused. docs/convert.md has the table.

    Example: lorakit convert my-adapter -o my-adapter.gguf --to gguf --base Llama-3.2-1B

    One model's part of a Stable Diffusion LoRA: lorakit convert style.safetensors -o unet-lora --to peft --component unet
    """
    with progress(as_json=as_json) as show:
        result = convert_files(
            source,
            output,
            to=to,
            from_=from_,
            base=base,
            component=component,
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        print_json(result)
        return
    console = console_for(as_json=False)
    console.print(_table(result))
    for note in result.notes:
        console.print(f"note: {escaped(note)}")


def _table(result: Converted) -> Table:
    table = Table(title=escaped(result.output), show_header=False)
    table.add_row("from", result.from_format)
    table.add_row("to", result.to_format)
    if result.components:
        table.add_row("models of the pipeline", ", ".join(result.components))
    table.add_row("modules", f"{result.modules:,}")
    table.add_row("parameters", f"{result.parameters:,}")
    return table
