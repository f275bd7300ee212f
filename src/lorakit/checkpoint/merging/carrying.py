"""The small files of a checkpoint: tokenizer, config and the like go along, weights in other formats do not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.files import read_small
from lorakit.checkpoint.merging.ties import untied
from lorakit.checkpoint.shards import INDEX, WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

MAX_SMALL = 256 << 20


def small_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that go along, as paths below the folder; and those that do not, though they are no weights."""
    carried: list[str] = []
    left: list[str] = []
    for path in _files(folder, ""):
        if path == INDEX or path.endswith(WEIGHT_SUFFIXES):
            continue
        (left if os.stat(folder / path).st_size > MAX_SMALL else carried).append(path)  # noqa: PTH116
    return carried, left


def _files(folder: Path, below: str) -> Iterator[str]:
    for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder, path)
        elif entry.is_file():
            yield path


def read_carried(folder: Path, path: str) -> bytes:
    """A small file's bytes.

    Raises:
        AdapterFormatError: it is a link out of the folder, or not a regular file.
    """
    place = folder / path
    return read_small(place.parent, place.name, MAX_SMALL)


def repaired_config(
    config: Mapping[str, Any], *, parted: bool, dtype: torch.dtype | None
) -> dict[str, Any] | None:
    """The model's config as it is true of the output; None where the base's own is."""
    found = dict(untied(config)) if parted else dict(config)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        keys = {"torch_dtype", "dtype"} & found.keys()
        found |= dict.fromkeys(keys or {"dtype"}, name)
        for key, value in found.items():
            if isinstance(value, dict) and {"torch_dtype", "dtype"} & value.keys():
                found[key] = {**value, **dict.fromkeys({"torch_dtype", "dtype"} & value.keys(), name)}
    return None if found == dict(config) else found
