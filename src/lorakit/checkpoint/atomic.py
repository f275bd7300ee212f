"""Files that are either the old one or the new one, never something between.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed over its target. A
symbolic link at the target is replaced, not followed. One writer at a time holds the folder's lock; where the
platform or the file system has no such lock, writers of one folder must be kept apart by the caller.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lorakit.checkpoint.layout import SUFFIX, TEMPORARY
from lorakit.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_FCNTL = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # none on Windows
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.ENOSYS}


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait for the folder's lock and hold it; gives whether there is a lock to hold here."""
    if _FCNTL is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            _FCNTL.flock(descriptor, _FCNTL.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; after an exception those that were made go again, if nothing is in them."""
    absent = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for each in absent:
                if os.path.lexists(each):
                    each.rmdir()
        raise


@contextmanager
def naming(place: Path, outcome: str) -> Iterator[None]:
    """Let an error of the disk name the output and what became of it, not a temporary file or nothing at all."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and TEMPORARY not in str(error.filename)
        if isinstance(error, AdapterError) or named or error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; {outcome}", str(place)) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left; only under the lock."""
    for name in os.listdir(folder):  # noqa: PTH208  a name is all that is needed
        if name.startswith(TEMPORARY) and name.endswith(SUFFIX):
            os.unlink(folder / name)  # noqa: PTH108


def write_new(path: Path, write: Callable[[int], None], *, like: Path) -> None:
    """Create `path`, let `write` fill the descriptor, flush it to the disk.

    The mode is that of the regular file `like`, or what the umask leaves of 0666. A file of this name that a killed
    save left is removed first.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
    descriptor = os.open(path, _CREATE, 0o666)
    try:
        write(descriptor)
        with suppress(FileNotFoundError):
            status = os.lstat(like)
            if stat.S_ISREG(status.st_mode):
                os.chmod(path, stat.S_IMODE(status.st_mode))  # noqa: PTH101
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte; a short write is continued."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def flush_folder(folder: Path) -> None:
    """Flush renames to the disk, where the platform can open a folder."""
    if _FCNTL is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
