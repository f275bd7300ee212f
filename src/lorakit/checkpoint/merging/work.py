"""A folder that appears whole: it grows under a hidden name beside its place, and is renamed when it is done.

What a killed run finished is kept: the hidden folder has a journal of its files, with a fingerprint of everything that
they follow from. A later run with the same fingerprint goes on from there, any other begins anew. One run at a time
holds the folder.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.atomic import flush_folder, locked, write_all, write_new
from lorakit.checkpoint.files import read_small
from lorakit.checkpoint.shards import INDEX, SINGLE
from lorakit.config import strict_json
from lorakit.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_JOURNAL = ".lorakit-journal.json"
_MAX_JOURNAL = 64 << 20


class Work:
    """The hidden folder of one output, held by this run.

    Attributes:
        folder: where files are written.
        resumed: names of the files that an earlier run finished.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self._fingerprint = folder, fingerprint
        self._done = self._read()
        self.resumed = tuple(self._done)
        for entry in os.scandir(folder):
            if entry.name not in self._done and entry.name != _JOURNAL:
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)  # noqa: PTH108

    def _read(self) -> dict[str, int]:
        try:
            found: Any = strict_json.loads(
                read_small(self.folder, _JOURNAL, _MAX_JOURNAL), where=_JOURNAL, max_bytes=_MAX_JOURNAL
            )
            if found["fingerprint"] != self._fingerprint:
                return {}
            done = dict(found["done"])
            return {name: size for name, size in done.items() if (self.folder / name).stat().st_size == size}
        except (AdapterError, OSError, KeyError, TypeError, ValueError):
            return {}  # no journal, or not one of ours: nothing is taken over

    def write(self, name: str, fill: Callable[[int], None]) -> None:
        """Write a file, flush it to the disk, and note that it is done."""
        path = self.folder / name
        try:
            write_new(path, fill, like=path)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        self._done[name] = path.stat().st_size
        journal = strict_json.dumps({"fingerprint": self._fingerprint, "done": self._done})
        write_new(self.folder / f"{_JOURNAL}.new", partial(write_all, data=journal), like=path)
        os.replace(self.folder / f"{_JOURNAL}.new", self.folder / _JOURNAL)  # noqa: PTH105

    def write_small(self, name: str, data: bytes) -> None:
        """Write a file that is not worth a note; folders in its name are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, partial(write_all, data=data), like=path)

    def is_done(self, name: str) -> bool:
        """Whether a file is there whole."""
        return name in self._done

    def finish(self, target: Path) -> None:
        """Rename the folder to its place, in which nothing is, an empty folder, or an output that is to go."""
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        flush_folder(self.folder)
        former = _aside(target)
        replaces = os.path.lexists(target) and any(target.iterdir())
        if replaces:
            os.replace(target, former)  # noqa: PTH105
        try:
            os.replace(self.folder, target)  # noqa: PTH105
        except BaseException:
            if replaces and not os.path.lexists(target):
                os.replace(former, target)  # noqa: PTH105
            raise
        flush_folder(target.parent)
        if replaces:
            shutil.rmtree(former, ignore_errors=True)


@contextmanager
def working_on(target: Path, fingerprint: str, *, overwrite: bool) -> Iterator[Work]:
    """The work on one output folder.

    After an error of lorakit's the hidden folder is gone; after any other (a full disk, an interrupt) finished files stay
    in it, for the next run to go on with.

    Raises:
        ConfigError: something is in the place of the output that may not be replaced.
        OSError: the folder cannot be made.
    """
    hidden = hidden_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _held(hidden):
        _tidy(target)
        try:
            check_target(target, overwrite=overwrite)
        except ConfigError:
            with suppress(OSError):
                hidden.rmdir()  # which keeps what a killed run left
            raise
        work = Work(hidden, fingerprint)
        try:
            yield work
        except AdapterError:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        except BaseException:
            if not work._done:
                shutil.rmtree(hidden, ignore_errors=True)
            raise


def hidden_folder(target: Path) -> Path:
    """Where an output grows."""
    return target.parent / f".{target.name}.lorakit-merging"


def _tidy(target: Path) -> None:
    """Finish what a run left that was killed while it replaced an output."""
    former = _aside(target)
    if not former.is_dir():
        return
    if os.path.lexists(target):
        shutil.rmtree(former)
    else:
        os.replace(former, target)  # noqa: PTH105


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.lorakit-former"


@contextmanager
def _held(hidden: Path) -> Iterator[None]:
    """Make the hidden folder and hold it, once no other run does."""
    with ExitStack() as stack:
        while True:
            hidden.mkdir(exist_ok=True)
            if _is_held(hidden, stack):
                break
            stack.close()  # the run that held it has renamed or removed it
        yield


def _is_held(hidden: Path, stack: ExitStack) -> bool:
    """Wait for the folder; whether it is still the one of that name then."""
    try:
        before = os.stat(hidden)  # noqa: PTH116
        stack.enter_context(locked(hidden))
        return os.path.samestat(before, os.stat(hidden))  # noqa: PTH116
    except FileNotFoundError:
        return False


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a place for an output.

    Raises:
        ConfigError: something is there, and it is no output that may be replaced.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target}: is there and is no folder; choose another output")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{target}: is not empty; choose another output, or pass overwrite=True (--overwrite)"
        )
    if not any((target / name).is_file() for name in (SINGLE, INDEX)):
        raise ConfigError(
            f"{target}: is not empty and holds no checkpoint, so it is not replaced; choose another output"
        )


def check_outside(target: Path, inputs: Sequence[Path]) -> None:
    """Refuse an output that is, or lies in, an input, or the other way round.

    Raises:
        ConfigError: says which input.
    """
    place = Path(os.path.realpath(target))
    for each in inputs:
        other = Path(os.path.realpath(each))
        if place == other or place in other.parents or other in place.parents:
            raise ConfigError(f"{target}: overlaps the input {each}; choose an output outside of it")
