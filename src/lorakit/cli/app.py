"""The verbs, and what an error looks like: one message without a traceback."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import typer

from lorakit.cli.combine import combine
from lorakit.cli.convert import convert
from lorakit.cli.demo import demo
from lorakit.cli.diff import diff
from lorakit.cli.doctor import doctor
from lorakit.cli.estimate import estimate
from lorakit.cli.extract import extract
from lorakit.cli.inspect import inspect
from lorakit.cli.merge import merge
from lorakit.cli.resize import resize
from lorakit.cli.telling import told
from lorakit.cli.train import train

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(no_args_is_help=True, add_completion=True, help="LoRA adapters for PyTorch models.")


@app.callback()
def _root() -> None:
    """LoRA adapters for PyTorch models."""


def _verb(run: Callable[..., None]) -> Callable[..., None]:
    """The verb, with errors and warnings told as a person reads them."""

    @wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> None:
        with told():
            run(*args, **kwargs)

    return guarded


app.command()(_verb(demo))
app.command()(_verb(merge))
app.command()(_verb(convert))
app.command()(_verb(doctor))
app.command()(_verb(estimate))
app.command()(_verb(combine))
app.command()(_verb(extract))
app.command()(_verb(resize))
app.command()(_verb(diff))
app.command()(_verb(inspect))
app.command()(_verb(train))
