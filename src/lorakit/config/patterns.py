"""Regular expressions that users and files supply: bounded in size, in compile cost and in matching time.

Guarantees: a pattern means what it means to Python's `re`, or it is refused; compiling one takes milliseconds; all
matches made on one `Budget` take a second together, and then a `ConfigError` names the field and the pattern.

The engine is the `regex` package, because `re` cannot be interrupted. Where the two read the same text differently
(fuzzy braces, POSIX classes), module paths could not match anyway, so such patterns are refused. So are the forms
that cost too much to compile: counted repeats multiply in `regex`, and `(?:(?:a{1000}){1000}){1000}` takes gigabytes.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.later import Later

if TYPE_CHECKING:
    from collections.abc import Callable

    import regex
else:
    regex = Later("regex", globals())

MAX_LENGTH = 1_000
MAX_REPEATS = 10_000
MAX_PATTERNS = 500
SECONDS = 1.0

FULL = "{}"
# How the text of a field is put to work: as it stands on the whole path, or wrapped and matched from the path's start.
KEY = r"(.*\.)?({})$"
SAVED = r"(^|.*\.){}($|\..*)"
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
WRAPPERS = {
    "target_modules": FULL,
    "exclude_modules": FULL,
    "rank_pattern": KEY,
    "alpha_pattern": KEY,
    "modules_to_save": SAVED,
    "layers_pattern": LAYER,
}

_SIMPLE = re.compile(r"(\^?)((?:[A-Za-z0-9_-]|\\?\.)+)(\$?)")
_COUNT = re.compile(r"(?<!\\)\{(\d*),?(\d*)\}")
_ODD_BRACE = re.compile(r"(?<!\\)\{(?!\d+(?:,\d*)?\}|,\d+\})")
_ODD_CLASS = re.compile(r"(?<!\\)\[(?:\^?\[|:)")
_ODD_ESCAPE = re.compile(r"\\[uUN]")


def simple(pattern: str) -> tuple[bool, str, tuple[int, ...]] | None:
    r"""Take apart a pattern of letters, digits, `_`, `-`, `.` and `\.` alone, perhaps between `^` and `$`.

    Returns:
        Whether it starts with `^`, its text with `.` for both kinds of dot, and where in that text a dot stands for
        any character; None for any other pattern. Such a pattern needs no regex engine.
    """
    found = _SIMPLE.fullmatch(pattern)
    if found is None:
        return None
    parts = re.findall(r"\\?.", found[2])
    wild = tuple(place for place, part in enumerate(parts) if part == ".")
    return bool(found[1]), "".join(part[-1] for part in parts), wild


@lru_cache(maxsize=4096)
def flaw(pattern: str, wrapper: str) -> str:
    """What is wrong with a pattern, in words; an empty string when it is good."""
    if len(pattern) <= MAX_LENGTH and simple(pattern):
        return ""
    return _unsafe(pattern) or _invalid(pattern, wrapper)


def _unsafe(pattern: str) -> str:
    if len(pattern) > MAX_LENGTH:
        return f"a regular expression of at most {MAX_LENGTH} characters (this one has {len(pattern)})"
    if not pattern.isascii() or _ODD_ESCAPE.search(pattern):
        return "a regular expression of ASCII characters"
    if _ODD_BRACE.search(pattern) or _ODD_CLASS.search(pattern):
        return "a regular expression whose braces are repeat counts and whose [classes] do not start with '[' or ':'"
    if prod(max(int(n or 1) for n in pair) or 1 for pair in _COUNT.findall(pattern)) > MAX_REPEATS:
        return f"a regular expression whose repeat counts multiply to at most {MAX_REPEATS}"
    return ""


def _invalid(pattern: str, wrapper: str) -> str:
    try:
        re.compile(wrapper.format(pattern))
        _compiled(pattern, wrapper)
    except (re.error, regex.error, OverflowError, RecursionError, Warning) as error:
        return f"a valid regular expression ({error})"
    return ""


def _compiled(pattern: str, wrapper: str) -> Any:
    return regex.compile(wrapper.format(pattern), regex.V0)


class Budget:
    """The processor time that is left to the matching of one plan, in seconds."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.left = seconds


class Pattern:
    """One compiled pattern of one field, matched on a shared time budget.

    Args:
        field: the config field that the pattern stands in; it decides how the pattern is wrapped.
        text: the pattern as the user wrote it, already without `flaw`.
        budget: shared by all patterns of a plan.
    """

    def __init__(self, field: str, text: str, budget: Budget) -> None:
        wrapper = WRAPPERS[field]
        compiled = _compiled(text, wrapper)
        self._match: Callable[..., Any] = compiled.fullmatch if wrapper == FULL else compiled.match
        self._field, self.text, self._budget = field, text, budget

    def match(self, path: str) -> Any:
        """The match of a module path, or None.

        Raises:
            ConfigError: the plan's budget is spent.
        """
        start = time.thread_time()
        try:
            return self._match(path, timeout=max(self._budget.left, 0.0))
        except TimeoutError:
            raise ConfigError(
                f"{self._field}: {self.text!r} is too slow: matching module paths took more than {SECONDS:g} s "
                f"(now at {path!r}); wanted a pattern without nested repeats, or a list of names"
            ) from None
        finally:
            self._budget.left -= time.thread_time() - start
