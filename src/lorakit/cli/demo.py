"""`lorakit demo`: the main job on a real model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lorakit.cli.output import AsJson, console_for, escaped, print_json, progress
from lorakit.demo.plot import plot_training
from lorakit.demo.run import run_demo

if TYPE_CHECKING:
    from lorakit.demo.run import DemoResult


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the picture.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the order of the texts.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA classifier on the real MiniLM, then save, load, merge and unmerge it. Offline, in minutes.

    Example: lorakit demo --output demo-output
    """
    console = console_for(as_json=as_json)
    console.print("A line of Python with one operator removed: which kind of comparison was it?")
    with progress(as_json=as_json) as show:
        result = run_demo(output, seed=seed, epochs=epochs, progress=show)
    picture = output / "training.png"
    plot_training(result, picture)
    if as_json:
        print_json(result)
        return
    console.print(f"example: [b]{escaped(result.example[0])}[/b] is {result.example[1]}")
    console.print(_accuracies(result), _checks(result))
    console.print(
        f"adapter: {output / 'adapter'}   picture: {picture}   {sum(result.seconds.values()):.0f} s in all"
    )


def _accuracies(result: DemoResult) -> Table:
    table = Table(
        title=f"{result.train_texts} training texts, {result.test_texts} held out, {len(result.labels)} labels"
    )
    table.add_column("")
    for name in ("trainable", "of the model", "held-out accuracy"):
        table.add_column(name, justify="right")
    for name, parameters, score in (
        ("frozen MiniLM, linear head", result.head_parameters, result.head_accuracy),
        ("MiniLM with LoRA, r=16", result.trainable_parameters, result.lora_accuracy),
    ):
        share = 100 * parameters / (result.base_parameters + parameters)
        table.add_row(name, f"{parameters:,}", f"{share:.2f} %", f"{score:.3f}")
    return table


def _checks(result: DemoResult) -> Table:
    table = Table(title="on disk and back")
    table.add_column("")
    table.add_column("measured", justify="right")
    share = 100 * result.adapter_bytes / result.base_bytes
    table.add_row("base on disk", f"{result.base_bytes / 1e6:.1f} MB")
    table.add_row("adapter on disk", f"{result.adapter_bytes / 1e6:.1f} MB ({share:.1f} %)")
    table.add_row("loaded into a fresh base: largest logit difference", f"{result.load_difference:.1e}")
    table.add_row("merged: largest logit difference", f"{result.merge_difference:.1e}")
    table.add_row("unmerged: every base weight has its bits back", "yes" if result.bits_restored else "NO")
    return table
