"""`lorakit train`: from a file of rows to an adapter."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003 - the annotation is evaluated
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lorakit.cli.output import AsJson, console_for, escaped, print_json, progress
from lorakit.cli.setting_options import with_settings
from lorakit.demo.model import model_folder
from lorakit.demo.task import build_task
from lorakit.training.run import last_checkpoint
from lorakit.training.run import train as library_train
from lorakit.training.settings import TrainConfig, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from lorakit.cli.output import Report
    from lorakit.demo.task import Split, Task
    from lorakit.training.run import TrainResult

_INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended
_DEMO = {"output": "train-output", "batch": 32, "learning_rate": 2e-3, "max_length": 48, "warmup": 0.1}


@with_settings
def train(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options given here win.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output.")
    ] = False,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Train an adapter on a JSONL file, on transformers' Trainer. Without model and data: the demo's, offline.

    Example: lorakit train --model Llama-3.2-1B --data chats.jsonl --output my-adapter --epochs 3 --eval-share 0.05

    From a file of settings, one of them changed: lorakit train --config run.yaml --lr 1e-4

    On two devices: torchrun --nproc-per-node 2 -m lorakit train --config run.yaml
    """
    is_first = os.environ.get("RANK", "0") == "0"
    console = console_for(as_json=as_json)
    chosen = read_settings(config) if config is not None else {}
    chosen |= {name: value for name, value in given.items() if value is not None}
    demo = None if {"model", "data"} & chosen.keys() else build_task()
    if demo is not None:
        console.print("the demo: MiniLM, and lines of Python of which one kind of comparison was taken out")
        chosen = _DEMO | {"model": str(model_folder())} | chosen
    missing = [f"--{name}" for name in ("model", "output", "data") if name not in chosen and demo is None]
    if missing:
        raise typer.BadParameter(f"wanted {' and '.join(missing)}, here or in the file of settings")
    _quieten_transformers()
    try:
        with progress(as_json=as_json) if is_first else _silent() as show:
            result = library_train(
                TrainConfig(**chosen),
                rows=None if demo is None else _rows(demo, demo.train),
                eval_rows=None if demo is None else _rows(demo, demo.test),
                resume=resume,
                overwrite=overwrite,
                progress=show,
            )
    except KeyboardInterrupt:
        if is_first:
            _tell_stopped(chosen["output"])
        raise typer.Exit(_INTERRUPTED) from None
    if is_first:
        _tell(result, console, as_json=as_json)


def _tell(result: TrainResult, console: Console, *, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    console.print(_table(result))
    for note in result.notes:
        console.print(f"note: {escaped(note)}")


def _tell_stopped(output: str) -> None:
    found = last_checkpoint(output)
    if found is None:
        said = "nothing is saved: no checkpoint was finished; --save-steps says how often one is"
    else:
        said = f"{found} is whole, and the same command with --resume goes on from there"
    console_for(as_json=True).print(
        f"lorakit: interrupted; {escaped(said)}", style="red", highlight=False, soft_wrap=True
    )


def _rows(task: Task, split: Split) -> list[dict[str, Any]]:
    return [
        {"text": text, "label": task.label_names[label]}
        for text, label in zip(split.texts, split.labels, strict=True)
    ]


@contextmanager
def _silent() -> Iterator[Report]:
    """What another process than the first shows: nothing."""
    yield lambda what, done, total: None  # noqa: ARG005


def _quieten_transformers() -> None:
    """None of its bars, and not its report that a classifier's head is new."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _table(result: TrainResult) -> Table:
    table = Table(title=escaped(result.output), show_header=False)
    share = 100 * result.trainable_parameters / (result.base_parameters + result.trainable_parameters)
    held_out = f", {result.eval_rows:,} held out" * bool(result.eval_rows)
    table.add_row("rows", f"{result.rows:,} of {result.kind}{held_out}")
    table.add_row("trainable parameters", f"{result.trainable_parameters:,} ({share:.2f} %)")
    resumed = "" if result.resumed_from is None else f", resumed from step {result.resumed_from:,}"
    table.add_row("steps", f"{result.steps:,} in {result.seconds:.0f} s{resumed}")
    for name, values in (
        ("loss", result.losses),
        ("loss, held out", result.evaluations),
        ("accuracy, held out", result.accuracies),
    ):
        if values:
            first = f"{values[0][1]:.3f} -> " * (len(values) > 1)
            table.add_row(name, f"{first}{values[-1][1]:.3f}")
    if result.picture is not None:
        table.add_row("picture", escaped(result.picture))
    return table
