"""Key maps as data, with `{}` for the number of a layer; and what to say of a strange key."""

from __future__ import annotations

import re
from os.path import commonprefix
from typing import TYPE_CHECKING

from lorakit.config import NearNames
from lorakit.errors import AdapterFormatError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LISTED = 20
_COMPARED = 100


class NameTable:
    """Translates paths of modules both ways.

    Args:
        rows: PEFT's path of a module to the format's name for it; both hold one `{}` or none.
    """

    def __init__(self, rows: Mapping[str, str]) -> None:
        self._there = dict(rows)
        self._back = {name: path for path, name in rows.items()}
        assert len(self._back) == len(self._there), "two paths with one name"

    def name(self, path: str) -> str | None:
        """The format's name for the module at a path, or None."""
        return _translated(path, self._there)

    def path(self, name: str) -> str | None:
        """The path of the module that the format calls `name`, or None."""
        return _translated(name, self._back)

    def paths_like(self, path: str) -> list[str]:
        """The known paths, with the numbers of a path that is not known."""
        return _numbered(self._there, path)

    def require(self, paths: Iterable[str], head: str) -> None:
        """Refuse modules that the format has no name for.

        Raises:
            AdapterFormatError: `head`, and those that it has none for.
        """
        unknown = [path for path in paths if self.name(path) is None]
        if unknown:
            raise refuse_unknown(head, unknown, self.paths_like(unknown[0]))

    def names_like(self, name: str) -> list[str]:
        """The known names, with the numbers of a name that is not known."""
        return _numbered(self._back, name)


def refuse_unknown(
    head: str, unknown: Sequence[str], known: Iterable[str] = (), hint: str = ""
) -> AdapterFormatError:
    """The error that lists names which a format does not have, with near ones."""
    names = list(known)
    lines = [f"{name[:200]}{_near(name, names)}" for name in unknown[:_LISTED]]
    if len(unknown) > _LISTED:
        lines.append(f"and {len(unknown) - _LISTED} more")
    return AdapterFormatError(bullet_list(head, lines, hint))


def _near(name: str, known: Sequence[str]) -> str:
    """The close of a sentence that suggests known names, of those that begin most alike."""
    alike = sorted(known, key=lambda other: -len(commonprefix((name, other))))  # noqa: RUF071 - letters are meant
    return NearNames(alike[:_COMPARED])(name)


def _translated(name: str, rows: Mapping[str, str]) -> str | None:
    if name in rows and "{}" not in name:
        return rows[name]
    found = _NUMBER.search(name)
    if found is None:
        return None
    target = rows.get(f"{name[: found.start()]}{{}}{name[found.end() :]}")
    return None if target is None else target.replace("{}", found[0])


def _numbered(rows: Mapping[str, str], name: str) -> list[str]:
    found = _NUMBER.search(name)
    number = found[0] if found else "0"
    return [row.replace("{}", number) for row in rows]
