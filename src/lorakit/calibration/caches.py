"""Files that keep what a run over data found, between runs: safetensors, written whole or not at all.

Those that PEFT wrote with `torch.save` are read too, as nothing but tensors (`weights_only`).
"""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lorakit.checkpoint.atomic import write_all, write_new
from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.header import DTYPE_CODES, TensorInfo, build_header
from lorakit.errors import AdapterFormatError, NonFiniteError, bullet_list
from lorakit.ops import is_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_SAME_AS = "lorakit_same_as"
_TORCH_STARTS = (b"PK", b"\x80")


def has_cache(path: str | os.PathLike[str] | None) -> bool:
    """Whether there is a file, and something in it."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def read_cache(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a cache, on the CPU.

    Raises:
        AdapterFormatError: it is no file of tensors of floats.
        NonFiniteError: they hold NaN or infinity.
    """
    with Path(path).open("rb") as file:
        start = file.read(2)
    try:
        found = _pickled(path) if start.startswith(_TORCH_STARTS) else _safe(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise AdapterFormatError(
            f"{path}: no file of tensors ({type(error).__name__}); delete it to gather again"
        ) from None
    wrong = [str(name) for name, value in found.items() if not _is_plain(value)]
    if wrong:
        raise AdapterFormatError(bullet_list(f"{path}: these are no tensors of floats", wrong[:10]))
    bad = [name for name, tensor in found.items() if not is_finite(tensor)]
    if bad:
        raise NonFiniteError(bullet_list(f"{path}: NaN or infinity; delete it to gather again", bad[:10]))
    return found


def _safe(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        same = json.loads((file.metadata() or {}).get(_SAME_AS, "{}"))
    return found | {name: found[other] for name, other in same.items() if other in found}


def _pickled(path: str | os.PathLike[str]) -> dict[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{path}: holds a {type(found).__name__}, wanted tensors by name")
    return found


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in DTYPE_CODES


def write_cache(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of floats; one under several names is written once. Folders that are missing are made.

    Raises:
        OSError: the disk is full and the like; what was there is there still.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    same = {name: first[id(tensor)] for name, tensor in tensors.items() if first[id(tensor)] != name}
    own = {name: tensor for name, tensor in tensors.items() if name not in same}
    infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.numel() * t.itemsize) for name, t in own.items()}
    metadata = {"format": "pt", **({_SAME_AS: json.dumps(same, sort_keys=True)} if same else {})}

    def fill(descriptor: int) -> None:
        write_all(descriptor, build_header(infos, metadata))
        for tensor in own.values():
            here = tensor.detach().to("cpu").contiguous()  # whose bytes live as long as it does
            write_all(descriptor, raw_bytes(here))

    new = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(8).hex()}")
    try:
        write_new(new, fill, like=target)
        new.replace(target)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
