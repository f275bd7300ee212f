"""Every setting of a training run as an option of the command line."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lorakit.training.settings import INITS, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": list[str]}


class _Option(NamedTuple):
    help: str
    flags: tuple[str, ...] = ()


_PANELS: dict[str, dict[str, _Option]] = {
    "Options": {
        "model": _Option("Folder of the base, or a repository of the hub."),
        "output": _Option("Folder to write.", ("--output", "-o")),
    },
    "Data": {
        "data": _Option(
            "JSONL rows: text; prompt and completion; messages; or text and label. Or a data set: owner/name."
        ),
        "eval_data": _Option("JSONL rows to judge by."),
        "eval_share": _Option("Share of the rows to hold out and judge by."),
        "task": _Option("CAUSAL_LM or SEQ_CLS; default as the rows say."),
        "max_length": _Option("Tokens of a row; longer ones are cut."),
    },
    "The adapter": {
        "r": _Option("Rank.", ("--r", "--rank")),
        "alpha": _Option("lora_alpha; default twice the rank."),
        "dropout": _Option("Dropout of the adapter's input."),
        "targets": _Option(
            "Name of modules to adapt, several times; default all linear layers.", ("--target", "-t")
        ),
        "modules_to_save": _Option("Name of modules to train whole, several times.", ("--modules-to-save",)),
        "init": _Option(f"How it begins: {', '.join(INITS)}."),
        "init_batches": _Option("Batches of rows that eva, corda and lora_ga look at."),
        "dora": _Option("Train magnitudes too.", ("--dora/--no-dora",)),
        "rslora": _Option("Scale by alpha / sqrt(r).", ("--rslora/--no-rslora",)),
    },
    "The run": {
        "epochs": _Option("Passes over the rows."),
        "max_steps": _Option("Steps in all, in place of epochs."),
        "batch": _Option("Rows in a step, on each device."),
        "accumulation": _Option("Batches that make one step."),
        "learning_rate": _Option("At its highest.", ("--learning-rate", "--lr")),
        "optimizer": _Option("adamw, adamw_8bit, adafactor or sgd."),
        "schedule": _Option("linear, cosine, constant or constant_with_warmup."),
        "warmup": _Option("Share of the steps in which the rate rises."),
        "weight_decay": _Option("Of the optimizer."),
        "max_grad_norm": _Option("Gradients are scaled down to this norm."),
        "dtype": _Option("auto, bfloat16 or float32."),
        "load_in_4bit": _Option("Quantise the base to NF4.", ("--load-in-4bit/--no-load-in-4bit",)),
        "gradient_checkpointing": _Option(
            "Compute activations again in backward.",
            ("--gradient-checkpointing/--no-gradient-checkpointing",),
        ),
        "log_steps": _Option("Steps between reports of the loss."),
        "eval_steps": _Option("Steps between evaluations; default an epoch."),
        "save_steps": _Option("Steps between checkpoints; default an epoch."),
        "keep": _Option("Checkpoints that are kept."),
        "seed": _Option("Of everything that is drawn."),
    },
}


def with_settings(run: Callable[..., None]) -> Callable[..., None]:
    """Give a verb that takes `**given` an option for each setting; None where it is not given.

    So that a file of settings can be told from what the command line says, the defaults are those of `TrainConfig` and
    stand in the help alone.
    """
    signature = inspect.signature(run, eval_str=True)
    kept = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    known = {field.name: field for field in fields(TrainConfig)}
    made = [
        _parameter(known[name], option, panel)
        for panel, options in _PANELS.items()
        for name, option in options.items()
    ]
    run.__signature__ = signature.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in (*kept, *made)} | {"return": None}
    return run


def _parameter(field: Any, option: _Option, panel: str) -> inspect.Parameter:
    kind = _TYPES[str(field.type).removesuffix(" | None")]
    default = (
        field.default if isinstance(field.default, (int, float, str)) and field.default is not False else None
    )
    shown = typer.Option(
        *option.flags,
        help=option.help,
        rich_help_panel=panel,
        show_default=False if default is None else str(default),
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
    )
