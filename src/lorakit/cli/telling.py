"""What a person sees of an error and of a warning: a message without a traceback, which says what to do."""

from __future__ import annotations

import errno
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOM = "make room there, or choose another output"
_RIGHTS = "check who may read and write there"
_WRITABLE = "choose an output that can be written"
_WHAT_TO_DO = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _WRITABLE,
    errno.ENOTDIR: _WRITABLE,
    errno.EISDIR: _WRITABLE,
    errno.EEXIST: _WRITABLE,
    errno.ENAMETOOLONG: _WRITABLE,
}


@contextmanager
def told() -> Iterator[None]:
    """Tell errors of lorakit's and of the disk on stderr, and end with exit code 1; tell warnings in a line each.

    Raises:
        typer.Exit: after an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show
        try:
            yield
        except BrokenPipeError:  # whoever read the output has enough: no error, which typer knows
            raise
        except (AdapterError, OSError) as error:
            _print(f"lorakit: {_message(error)}", "red")
            raise typer.Exit(1) from error


def _message(error: AdapterError | OSError) -> str:
    if isinstance(error, AdapterError) or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    hint = _WHAT_TO_DO.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f"; {hint}" if hint else "")


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    _print(f"warning: {' '.join(str(message).split())}", "yellow")


def _print(text: str, style: str) -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
