"""Reading and writing one small file: a bounded read of a regular file, an all-or-nothing write.

After `write_atomic` the file holds the old bytes or the new ones, whenever the process or the machine stops; a
link at the path is replaced, not followed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from lorakit.errors import AdapterFormatError, AdapterNotFoundError

MAX_BYTES = 1 << 20
_NEW_FILE_MODE = 0o666


def read_small(path: Path) -> bytes:
    """All bytes of a regular file of at most 1 MiB.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is not a regular file, or it is too large.
    """
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterNotFoundError(f"{path}: no such file") from None
    if not stat.S_ISREG(info.st_mode):
        raise AdapterFormatError(f"{path}: not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise AdapterFormatError(f"{path}: {info.st_size:,} bytes, at most {MAX_BYTES:,} are read")
    return data


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file in one step: a temporary file beside it, synced to disk, then renamed over it.

    The file keeps the mode it had; a new one gets the mode that the process' umask gives.

    Raises:
        OSError: the directory cannot be written to or the disk is full; the old file is untouched.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            Path(temporary).chmod(_mode(path))
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _mode(path: Path) -> int:
    if path.is_file() and not path.is_symlink():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return _NEW_FILE_MODE & ~umask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # a directory cannot be opened, and a rename is written through
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
