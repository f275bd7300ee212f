"""Near names for a name that was not found."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST = 500  # comparing one long path with this many takes about 40 ms
_ASKED = 10  # further names get no suggestion: by then the reader has the idea


def suffixes(path: str) -> Iterator[str]:
    """The path and what follows each of its dots, longest first: "a.b.c", "b.c", "c"."""
    yield path
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


class NearNames:
    """Suggests endings of the given module paths that look like a name.

    Args:
        paths: dotted module paths.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._left = _ASKED
        self._endings: dict[int, tuple[str, ...]] = {}

    def __call__(self, name: str) -> str:
        """The close of a sentence: "; did you mean 'q_proj'?", or nothing: no name is near, or ten were asked for."""
        if not self._left:
            return ""
        self._left -= 1
        near = get_close_matches(name, self._of_length(name.count(".") + 1), n=3, cutoff=0.6)
        return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

    def _of_length(self, parts: int) -> tuple[str, ...]:
        if parts not in self._endings:
            endings = dict.fromkeys(".".join(path.rsplit(".", parts)[-parts:]) for path in self._paths)
            self._endings[parts] = tuple(endings)[:_MOST]
        return self._endings[parts]
