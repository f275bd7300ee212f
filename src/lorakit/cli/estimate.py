"""`lorakit estimate`: what training an adapter will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorakit.cli.adapter_options import Alpha, Dora, Parameters, Rank, Rslora, Targets, Task, Whole, config_of
from lorakit.cli.output import AsJson, console_for, escaped, print_json
from lorakit.estimating.estimate import estimate as library_estimate

if TYPE_CHECKING:
    from lorakit.estimating.estimate import Estimate


def estimate(
    model: Annotated[str, typer.Argument(help="Folder with config.json, or a repository of the hub.")],
    r: Rank = 16,
    alpha: Alpha = None,
    target: Targets = None,
    target_parameter: Parameters = None,
    modules_to_save: Whole = None,
    dora: Dora = False,
    rslora: Rslora = False,
    task: Task = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1024,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw_8bit, adafactor, lion, sgd or sgd_momentum.")
    ] = "adamw",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in backward.")
    ] = False,
    quantization: Annotated[
        str | None, typer.Option(help="nf4, or nf4_double with quantised scales.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what training an adapter will take: parameters, file size, memory by part. Loads no weights.

    Example: lorakit estimate Llama-3.1-8B --r 16 --batch 4 --seq 2048 --quantization nf4 --gradient-checkpointing
    """
    console = console_for(as_json=as_json)
    config = config_of(
        r,
        alpha,
        target,
        modules_to_save,
        task,
        target_parameters=list(target_parameter) if target_parameter else None,
        use_dora=dora,
        use_rslora=rslora,
    )
    result = library_estimate(
        model,
        config,
        batch=batch,
        seq=seq,
        dtype=dtype,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization,
    )
    if as_json:
        print_json(result)
        return
    share = 100 * result.trainable_parameters / (result.base_parameters + result.trainable_parameters)
    console.print(
        f"{result.model}: {result.base_parameters:,} parameters; {result.targets} adapted modules, "
        f"{result.trainable_parameters:,} trainable parameters ({share:.2f} %), file of "
        f"{_size(result.adapter_bytes)}",
        highlight=False,
    )
    console.print(_table(result))
    for note in result.notes:
        console.print(f"note: {escaped(note)}")


def _table(result: Estimate) -> Table:
    again = ", computed again" * result.gradient_checkpointing
    stored = f", linear layers in {result.quantization}" if result.quantization else ""
    table = Table(title=f"one step: {result.batch} x {result.seq} tokens, {result.dtype}{stored}")
    for name in ("training memory", "", "of the total"):
        table.add_column(name, justify="left" if name == "training memory" else "right")
    rows = (
        ("weights of the model", result.weights),
        ("weights of the adapter", result.adapter),
        ("gradients", result.gradients),
        (f"optimizer ({result.optimizer_name})", result.optimizer),
        (f"activations{again}", result.activations),
        ("logits and their loss", result.logits),
    )
    for name, size in rows:
        table.add_row(name, _size(size), f"{100 * size / result.total:.0f} %")
    table.add_section()
    table.add_row("in all, on one device", _size(result.total), "")
    return table


def _size(count: int) -> str:
    """Bytes for people: in units of 1024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
