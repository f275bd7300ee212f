"""The options by which a verb describes a new adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.configs import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANEL = "The adapter"

Rank = Annotated[int, typer.Option("--r", "--rank", help="Rank.", rich_help_panel=_PANEL)]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="lora_alpha; default twice the rank.", rich_help_panel=_PANEL)
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="Name of modules to adapt, several times; default all linear layers.",
        rich_help_panel=_PANEL,
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--target-parameter",
        help="Name of parameters to adapt, such as experts.gate_up_proj, several times.",
        rich_help_panel=_PANEL,
    ),
]
Whole = Annotated[
    list[str] | None,
    typer.Option("--modules-to-save", help="Name of modules to train whole.", rich_help_panel=_PANEL),
]
Dora = Annotated[bool, typer.Option("--dora", help="Train magnitudes too.", rich_help_panel=_PANEL)]
Rslora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=_PANEL)]
Task = Annotated[
    str | None,
    typer.Option("--task", help="CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS or QUESTION_ANS."),
]


def targets_of(names: Sequence[str] | None) -> list[str] | str:
    """`target_modules` for the names that were given."""
    return list(names) if names and list(names) != ["all-linear"] else "all-linear"


def config_of(
    r: int,
    alpha: float | None,
    targets: Sequence[str] | None,
    whole: Sequence[str] | None,
    task: str | None,
    **more: Any,
) -> LoraConfig:
    """The config that the options describe.

    Raises:
        ConfigError: a value is wrong.
    """
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        target_modules=targets_of(targets),
        modules_to_save=list(whole) if whole else None,
        task_type=task,
        **more,
    )
