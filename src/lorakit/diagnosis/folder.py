"""What can be seen of an adapter's folder before its files are read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lorakit.checkpoint.files import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    open_regular,
    present,
    read_up_to,
)
from lorakit.checkpoint.header import ALL_DTYPES, parse_header
from lorakit.diagnosis.finding import Finding, some
from lorakit.diagnosis.foreign import format_of
from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_POINTER = b"version https://git-lfs"
_KNOWN = {"pytorch_lora_weights.safetensors": "diffusers", "adapters.safetensors": "mlx"}


def folder_findings(folder: Path) -> Iterator[Finding]:
    """What keeps a folder from being an adapter's; nothing where the two files are there."""
    if folder.is_file():
        yield from _single(folder)
        return
    yield from (_pointer(folder, name) for name in (WEIGHTS_NAME, CONFIG_NAME) if _is_pointer(folder, name))
    if present(folder, WEIGHTS_NAME):
        return
    if present(folder, PICKLE_NAME):
        yield Finding(
            "error",
            "pickle",
            str(folder / PICKLE_NAME),
            "the weights are a pickle, which can run code when it is read, and is refused",
            "Ask its author for a safetensors file; or, if you trust it, load it once with allow_pickle_bin=True and save "
            "it again.",
        )
        return
    yield from _elsewhere(folder)


def _elsewhere(folder: Path) -> Iterator[Finding]:
    """Where else the weights may be."""
    inside = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS_NAME}"))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if inside:
        yield Finding(
            "error",
            "in-subfolder",
            str(folder),
            f"no {WEIGHTS_NAME} here, but in {some(inside)}: an adapter that is not called 'default' is saved into a "
            "subfolder of its name",
            f"Use {folder / inside[0]}, or subfolder={inside[0]!r}.",
        )
    for name in others:
        yield from _single(folder / name)
    if not inside and not others:
        yield Finding(
            "error",
            "no-weights",
            str(folder),
            f"no {WEIGHTS_NAME} in this folder",
            "Is it where the adapter was saved? Copy or download the file.",
        )


def _single(path: Path) -> Iterator[Finding]:
    """A file of weights that is no adapter's."""
    if _is_pointer(path.parent, path.name):
        yield _pointer(path.parent, path.name)
        return
    kind = _KNOWN.get(path.name)
    if path.suffix == ".safetensors":
        try:
            with open_regular(path.parent, path.name) as (descriptor, status):
                header = parse_header(partial(read_up_to, descriptor), status.st_size, str(path), ALL_DTYPES)
        except AdapterError as error:
            yield unreadable(error, path)
            return
        kind = format_of(list(header.tensors)) or kind
    if path.suffix == ".gguf":
        kind = "gguf"
    yield Finding(
        "error",
        "foreign-format" if kind else "no-weights",
        str(path),
        f"a file of {kind}"
        if kind
        else f"not an adapter: wanted a folder with {CONFIG_NAME} and {WEIGHTS_NAME}",
        f"Convert it: lorakit convert, from {kind} to peft."
        if kind
        else "Is it where the adapter was saved?",
    )


def unreadable(error: AdapterError, path: Path) -> Finding:
    """A file that the reader refuses."""
    what = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.parent}: ")
    return Finding("error", "unreadable", str(path), what, "Copy, download or save it again.")


def _is_pointer(folder: Path, name: str) -> bool:
    if not present(folder, name):
        return False
    try:
        with open_regular(folder, name) as (descriptor, _):
            return read_up_to(descriptor, len(_POINTER)) == _POINTER
    except AdapterError:  # what it is instead is for the reader to say
        return False


def _pointer(folder: Path, name: str) -> Finding:
    return Finding(
        "error",
        "git-lfs-pointer",
        str(folder / name),
        "a git-lfs pointer: the few lines that stand for the file where git-lfs has not fetched it",
        f"Run `git lfs pull` in {folder}.",
    )
