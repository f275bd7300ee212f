"""Bytes from one file to another, by the kernel where it can."""

from __future__ import annotations

import errno
import os

from lorakit.checkpoint.atomic import write_all

_CHUNK = 8 << 20
_MOST = 1 << 30  # what one call to the kernel is asked for
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTSOCK}


def copy_bytes(source: int, begin: int, count: int, target: int) -> None:
    """Append `count` bytes of the descriptor `source`, from `begin` on, to the descriptor `target`.

    On Linux they do not pass through this process. `copy_file_range` was measured at half the speed of `sendfile` where
    the file system shares no blocks (ext4: a merge of 2.6 GB took 5.5 s against 2.5 s).

    Raises:
        EOFError: the source ends before.
        OSError: as `os.write`.
    """
    done = _sent(source, begin, count, target)
    if done < count:
        _read_and_written(source, begin + done, count - done, target)


def _sent(source: int, begin: int, count: int, target: int) -> int:
    """How many bytes the kernel copied: all, or none where it cannot."""
    done = 0
    if not hasattr(os, "sendfile"):
        return done
    while done < count:
        try:
            sent = os.sendfile(target, source, begin + done, min(count - done, _MOST))
        except OSError as error:
            if error.errno in _CANNOT:
                return done
            raise
        if not sent:
            raise EOFError
        done += sent
    return done


def _read_and_written(source: int, begin: int, count: int, target: int) -> None:
    os.lseek(source, begin, os.SEEK_SET)
    while count:
        part = os.read(source, min(count, _CHUNK))
        if not part:
            raise EOFError
        write_all(target, part)
        count -= len(part)
