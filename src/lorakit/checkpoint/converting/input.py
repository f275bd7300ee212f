"""Tensors of files that other tools wrote: safetensors and pickles of any name, checked as adapters are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.files import MAX_CONFIG, open_regular, read_small, read_up_to, stamp_of
from lorakit.checkpoint.header import ALL_DTYPES, DTYPES, parse_header
from lorakit.checkpoint.reading import non_finite
from lorakit.checkpoint.sources import SafetensorsSource, open_pickle
from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, NonFiniteError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

WITH_WHOLE_NUMBERS = {**DTYPES, "I64": torch.int64, "I32": torch.int32}
"""Of files whose alphas are tensors."""


def read_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its metadata.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is damaged or no safetensors file.
    """
    with open_regular(path.parent, path.name) as (descriptor, status):
        header = parse_header(partial(read_up_to, descriptor), status.st_size, str(path), ALL_DTYPES)
    return list(header.tensors), header.metadata


def read_safetensors(
    path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and its metadata.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is damaged or no safetensors file.
        NonFiniteError: it holds NaN or infinity.
    """
    with open_regular(path.parent, path.name) as (descriptor, status):
        header = parse_header(partial(read_up_to, descriptor), status.st_size, str(path), dtypes)
        stamp = stamp_of(status)
    source = SafetensorsSource(path.parent, stamp, header.tensors, header.places(stamp[2]), path.name)
    tensors = dict(source.read(header.tensors))
    refuse_non_finite(path, tensors)
    return tensors, header.metadata


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled dict, through the restricted unpickler only.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is no dict of tensors of floats.
        NonFiniteError: it holds NaN or infinity.
        UnsupportedError: this torch has known holes in its restricted unpickler.
    """
    source, infos = open_pickle(path.parent, path.name)
    tensors = dict(source.read(infos))
    refuse_non_finite(path, tensors)
    return tensors


def read_object(folder: Path, name: str, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it holds something else.
    """
    found = strict_json.loads(read_small(folder, name, limit), where=str(folder / name), max_bytes=limit)
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{folder / name}: holds a {type(found).__name__}, wanted an object")
    return found


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: the tensors that hold them, with their counts.
    """
    bad = [line for name, tensor in tensors.items() for line in non_finite(name, tensor)]
    if bad:
        raise NonFiniteError(
            bullet_list(f"{path}: numbers that are not finite", bad, "The training diverged.")
        )


def number_in(config: Mapping[str, Any], key: str, where: str) -> float:
    """A number that a config must have.

    Raises:
        AdapterFormatError: it is missing, no number, or zero.
    """
    found = config.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not found:
        raise AdapterFormatError(f"{where}: {key}: {found!r}, wanted a number other than 0")
    return float(found)
