"""`lorakit merge`: adapters into a checkpoint, shard by shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorakit.checkpoint.merging.merge import merge_checkpoint
from lorakit.cli.output import AsJson, Output, console_for, escaped, print_json, progress

if TYPE_CHECKING:
    from lorakit.checkpoint.merging.merge import CheckpointMerge


def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="Folder of the base (model.safetensors, or shards and an index), or repository of the hub."
        ),
    ],
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters, or repositories of the hub.")],
    output: Output,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="Factor on an adapter, once for each, in order."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Write float32, bfloat16, float16 or float64; default as the base.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Write files of this size, such as 5GB; default the base's files.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a sample back and recompute it in fp64.")
    ] = False,
    strict: Annotated[
        bool, typer.Option(help="Refuse an adapter that lacks weights which its config names.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in the output.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into a safetensors checkpoint and write a new one, without building the model.

    A few megabytes of memory whatever the size of the model; the numbers are those of merge_and_unload(). A run that was
    killed is gone on with by the same command.

    Example: lorakit merge Llama-3.2-1B my-adapter -o merged --verify

    Two adapters, the second at half its strength: lorakit merge base style facts -o merged -w 1 -w 0.5
    """
    with progress(as_json=as_json) as show:
        result = merge_checkpoint(
            base,
            adapters,
            output,
            weights=weight or None,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            strict=strict,
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


def _table(result: CheckpointMerge) -> Table:
    table = Table(title=escaped(result.output), show_header=False)
    table.add_row(
        "files of weights",
        f"{result.files}" + f" ({result.resumed} from an earlier run)" * bool(result.resumed),
    )
    table.add_row("tensors merged", f"{result.merged:,}")
    table.add_row("tensors copied", f"{result.copied:,}")
    table.add_row("written", f"{result.bytes / 1e6:,.1f} MB in {result.seconds:.1f} s")
    if result.error is not None:
        table.add_row("read back", f"{result.checked:,} tensors")
        table.add_row(
            "largest error", f"{result.error:.2e} ({result.relative_error:.1e} of the largest weight)"
        )
    return table
