"""Opening the files of an adapter folder that somebody else may have filled.

Rules. Only regular files are opened: a pipe, a device or a directory is refused without blocking. A symbolic link is
followed only if it ends inside the folder, or, in the cache of the hub (`models--*/snapshots/<commit>/...`), in the
`blobs` directory of the same repository. The folder itself may be a link: the caller named it.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import AdapterFormatError, AdapterNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
README_NAME = "README.md"
MAX_CONFIG = 1 << 20
_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)

Stamp = tuple[int, int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """What tells one version of a file from another: device, inode, size, time of change in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def open_regular(folder: Path, name: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of `folder/name` and its status, under the rules above.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is not a regular file, is a link to elsewhere, or cannot be read.
    """
    path = folder / name
    try:
        descriptor = os.open(_followed(path), _FLAGS)
    except FileNotFoundError:
        raise AdapterNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise AdapterFormatError(f"{path}: cannot be opened: {error.strerror or error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterFormatError(f"{path}: not a regular file; replace it by a copy of the file itself")
        yield descriptor, status
    except OSError as error:
        if isinstance(error, AdapterNotFoundError):
            raise
        raise AdapterFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    finally:
        os.close(descriptor)


def read_small(folder: Path, name: str, limit: int = MAX_CONFIG) -> bytes:
    """The whole of a small file.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is longer than `limit` bytes, or `open_regular` refuses it.
    """
    with open_regular(folder, name) as (descriptor, status):
        if status.st_size > limit:
            raise AdapterFormatError(
                f"{folder / name}: {status.st_size:,} bytes, at most {limit:,} are read; not an adapter's config"
            )
        return read_up_to(descriptor, limit)


def read_up_to(descriptor: int, count: int) -> bytes:
    """The next `count` bytes, fewer only at the end of the file."""
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def present(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of this name, of whatever kind (also a broken link)."""
    return os.path.lexists(folder / name)


def _followed(path: Path) -> str:
    if not path.is_symlink():
        return str(path)
    folder = os.path.realpath(path.parent)
    target = os.path.realpath(path)
    parents = [folder, *_blobs(Path(folder))]
    if not any(os.path.commonpath([parent, target]) == parent for parent in parents):
        raise AdapterFormatError(
            f"{path}: a symbolic link to {target}, outside of the adapter's folder; replace it by a copy"
        )
    return target


def _blobs(folder: Path) -> list[str]:
    """The store of a hub cache that `folder`, a snapshot or a folder inside one, belongs to."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [str(parent.parent / "blobs")]
    return []
