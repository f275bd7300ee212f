"""Files and folders that appear whole or not at all, and safetensors files with any names."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from lorakit.checkpoint.atomic import flush_folder, made, naming, write_all, write_new
from lorakit.checkpoint.digest import digest_order, raw_bytes
from lorakit.checkpoint.header import TensorInfo, build_header
from lorakit.checkpoint.layout import SUFFIX, TEMPORARY
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    Fill = Callable[[int], None]


def write_file(target: Path, fill: Fill, *, overwrite: bool) -> None:
    """Create a file, or replace one, in one step.

    Args:
        target: its folder is made if it is missing.
        fill: writes into a descriptor.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ConfigError: something is there already.
        OSError: the disk refused. What was there is there still.
    """
    refuse_taken(target, overwrite=overwrite)
    with naming(target, "nothing was written"), made(target.parent):
        new = target.with_name(_temporary())
        try:
            write_new(new, fill, like=target)
            refuse_taken(target, overwrite=overwrite)
            os.replace(new, target)  # noqa: PTH105
            flush_folder(target.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)  # noqa: PTH108
            raise


def write_folder(target: Path, files: Mapping[str, Fill], *, overwrite: bool) -> None:
    """Create a folder of files, or replace one that holds no others, in one step.

    Raises:
        ConfigError: the folder is there, and may not be replaced or holds other files.
        OSError: the disk refused. What was there is there still.
    """
    _refuse_folder(target, files, overwrite=overwrite)
    with naming(target, "nothing was written"), made(target.parent):
        new, old = target.with_name(_temporary()), target.with_name(_temporary())
        try:
            new.mkdir()
            for name, fill in files.items():
                write_new(new / name, fill, like=target / name)
            flush_folder(new)
            _refuse_folder(target, files, overwrite=overwrite)
            _exchange(new, target, old)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        flush_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Fill:
    """What writes these tensors, which must be on the CPU; equal input gives equal bytes."""
    infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.numel() * t.itemsize) for name, t in tensors.items()}
    infos = {name: infos[name] for name in digest_order(infos)}

    def fill(descriptor: int) -> None:
        write_all(descriptor, build_header(infos, metadata))
        for name in infos:
            write_all(descriptor, raw_bytes(tensors[name].contiguous()))

    return fill


def bytes_file(data: bytes) -> Fill:
    """What writes these bytes."""
    return partial(write_all, data=data)


def refuse_taken(target: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is that may not be replaced.

    Raises:
        ConfigError: it is a folder, or a file and `overwrite` is False.
    """
    if target.is_dir():
        raise ConfigError(f"{target}: a folder; name the file to write")
    if not overwrite and os.path.lexists(target):
        raise ConfigError(
            f"{target}: is there already; choose another name, or pass overwrite=True (--overwrite)"
        )


def _refuse_folder(target: Path, files: Mapping[str, Fill], *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: not a folder; name the folder to write")
    held = sorted(entry.name for entry in target.iterdir())
    if held and not overwrite:
        raise ConfigError(
            f"{target}: holds files already; choose another folder, or pass overwrite=True (--overwrite)"
        )
    others = [name for name in held if name not in files]
    if others:
        raise ConfigError(
            f"{target}: holds {', '.join(others[:5])}, which an adapter of this format does not have; choose another folder"
        )


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of another, which goes aside; back, if that fails."""
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _temporary() -> str:
    return f"{TEMPORARY}convert-{os.getpid()}-{os.urandom(8).hex()}{SUFFIX}"
