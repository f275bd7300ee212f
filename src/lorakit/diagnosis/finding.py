"""One thing that was found out about an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Level = Literal["error", "warning", "note"]
_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was found out about an adapter.

    Attributes:
        level: "error": it does not load, or not as what it should be; "warning": it loads, but something is wrong or lost;
            "note": good to know.
        check: which check found it, such as "git-lfs-pointer".
        where: the file, the field of the config, or the tensors.
        what: what was found.
        fix: what to do; empty where nothing needs to be done.
    """

    level: Level
    check: str
    where: str
    what: str
    fix: str = ""


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
