"""Which modules a config means, and the rank and alpha of each: one matcher for every field that names modules.

The rules are PEFT's. A string is a regular expression for the whole path; an entry of a list is a whole path or the
end of one after a dot; a key of `rank_pattern` or `alpha_pattern` is a regular expression for such an end, and the
first key that matches decides. Names cost a few dictionary look-ups a path, however many there are; only real
regular expressions are run, all on one time budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.config.patterns import Budget, Pattern, simple
from lorakit.config.suggest import NearNames, suffixes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from lorakit.config.lora import LoraConfig


def ends_in(path: str, name: str) -> bool:
    """Whether a path is a name, or ends in it after a dot."""
    return f".{path}".endswith(f".{name}")


class Matcher:
    """Answers for one config, path by path.

    Args:
        config: a valid config whose `target_modules` is already resolved: not "all-linear". None targets nothing.

    Raises:
        ConfigError: from any method, when matching has used up the time budget of one second.
    """

    def __init__(self, config: LoraConfig) -> None:
        assert config.target_modules != "all-linear", "the planner resolves the shorthand"
        budget = Budget()
        self._config = config
        self._targets = _names("target_modules", config.target_modules or (), budget)
        self._excluded = _names("exclude_modules", config.exclude_modules or (), budget)
        self._saved = _Saved(config.modules_to_save or (), budget)
        self._layers = _Layers(config, budget)
        self._ranks = _Keys("rank_pattern", config.rank_pattern, budget)
        self._alphas = _Keys("alpha_pattern", config.alpha_pattern, budget)
        self._paths: dict[str, None] = {}

    def target(self, path: str) -> bool:
        """Whether the adapter goes on the module: targeted, in a chosen layer, neither excluded nor saved whole."""
        self._paths[path] = None
        targeted = self._targets.match(path)
        excluded = self._excluded.match(path)
        if not targeted or excluded or self._saved.match(path):
            return False
        return self._targets.holds_whole(path) or self._layers.match(path)

    def rank(self, path: str) -> int:
        """The rank of a targeted module."""
        key = self._ranks.first(path)
        return self._config.r if key is None else self._config.rank_pattern[key]

    def alpha(self, path: str) -> float:
        """The `lora_alpha` of a targeted module."""
        key = self._alphas.first(path)
        return self._config.lora_alpha if key is None else self._config.alpha_pattern[key]

    def unused(self) -> list[str]:
        """One line for each entry that hit nothing in all calls so far, with near names."""
        near = NearNames(self._paths)
        parts = (self._targets, self._excluded, self._layers, self._ranks, self._alphas)
        return [line for part in parts for line in part.unused(near)]


def _names(field: str, value: str | Collection[str], budget: Budget) -> _Whole | _Ends:
    return _Whole(field, value, budget) if isinstance(value, str) else _Ends(field, value)


class _Whole:
    """One regular expression for whole paths."""

    def __init__(self, field: str, text: str, budget: Budget) -> None:
        self._field, self._pattern, self._hit = field, Pattern(field, text, budget), False

    def match(self, path: str) -> bool:
        found = self._pattern.match(path) is not None
        self._hit = self._hit or found
        return found

    def holds_whole(self, _path: str) -> bool:
        return True  # a pattern selects layers by itself

    def unused(self, _near: NearNames) -> Iterator[str]:
        if not self._hit:
            yield f"{self._field}: the pattern {self._pattern.text!r} matches no module"


class _Ends:
    """Names, each a whole path or the end of one."""

    def __init__(self, field: str, names: Iterable[str]) -> None:
        self._field = field
        self._hits = dict.fromkeys(names, False)
        self._parts = sorted({name.count(".") + 1 for name in self._hits})

    def match(self, path: str) -> bool:
        found = False
        for count in self._parts:  # as a rule only one: the last part of the path
            end = ".".join(path.rsplit(".", count)[-count:])
            if end in self._hits:
                found = self._hits[end] = True
        return found

    def holds_whole(self, path: str) -> bool:
        return path in self._hits

    def unused(self, near: NearNames) -> Iterator[str]:
        for name in sorted(name for name, hit in self._hits.items() if not hit):
            yield f"{self._field}: {name!r} matches no module{near(name)}"


class _Saved:
    """`modules_to_save`: the modules of that name and all inside them."""

    def __init__(self, names: Iterable[str], budget: Budget) -> None:
        self._names = {name for name in names if name.replace("-", "_").isidentifier() and name.isascii()}
        self._patterns = [
            Pattern("modules_to_save", name, budget) for name in names if name not in self._names
        ]

    def match(self, path: str) -> bool:
        inside = bool(self._names) and not self._names.isdisjoint(path.split("."))
        return inside or any(pattern.match(path) for pattern in self._patterns)


class _Layers:
    """`layers_to_transform` and `layers_pattern`: the first number in a path that stands for a layer."""

    def __init__(self, config: LoraConfig, budget: Budget) -> None:
        chosen, names = config.layers_to_transform, config.layers_pattern or ()
        self._hits = dict.fromkeys([chosen] if isinstance(chosen, int) else chosen or (), False)
        names = [names] if isinstance(names, str) else names
        self._patterns = [Pattern("layers_pattern", name, budget) for name in names]

    def match(self, path: str) -> bool:
        if not self._hits:
            return True
        index = self._index_by_name(path) if self._patterns else _first_index(path)
        if index not in self._hits:
            return False
        self._hits[index] = True
        return True

    def _index_by_name(self, path: str) -> int | None:
        found = next(filter(None, (pattern.match(path) for pattern in self._patterns)), None)
        digits = found["idx"] if found else None
        return None if digits is None else int(digits)

    def unused(self, _near: NearNames) -> Iterator[str]:
        for index in sorted(index for index, hit in self._hits.items() if not hit):
            yield f"layers_to_transform: {index} is the index of no layer with a targeted module"


def _first_index(path: str) -> int | None:
    """The first part of a path that is a number, has a name and one more part before it, and something after it."""
    parts = path.split(".")[2:-1]
    return next((int(part) for part in parts if part.isdecimal()), None)


class _Keys:
    """`rank_pattern` or `alpha_pattern`: patterns for the end of a path, of which the first in order decides."""

    def __init__(self, field: str, keys: Iterable[str], budget: Budget) -> None:
        self._field = field
        self._order = list(keys)
        self._hits = [False] * len(self._order)
        self._ends, self._wholes = _Templates(), _Templates()
        self._patterns: list[tuple[int, Pattern]] = []
        for order, key in enumerate(self._order):
            parts = simple(key)
            if parts is None:
                self._patterns.append((order, Pattern(field, key, budget)))
            else:
                from_start, text, wild = parts
                (self._wholes if from_start else self._ends).add(text, wild, order)

    def first(self, path: str) -> str | None:
        """The first key that matches, or None."""
        if not self._order:
            return None
        none = len(self._order)
        best = min((self._ends.first(end, none) for end in suffixes(path)), default=none)
        best = min(best, self._wholes.first(path, none))
        for order, pattern in self._patterns:
            if order > best:
                break
            if pattern.match(path):
                best = order
                break
        if best == none:
            return None
        self._hits[best] = True
        return self._order[best]

    def unused(self, near: NearNames) -> Iterator[str]:
        for key, hit in zip(self._order, self._hits, strict=True):
            if not hit:
                close = near(key.strip("^$").replace("\\.", ".")) if simple(key) else ""
                yield f"{self._field}: {key!r} decides for no targeted module{close}"


class _Templates:
    """Texts with places where any character may stand, looked up without running through them.

    A text is stored with "." at those places; a candidate is given the same dots, once for each set of places that
    occurs among the texts of its length.
    """

    def __init__(self) -> None:
        self._places: dict[int, list[tuple[int, ...]]] = {}
        self._first: dict[tuple[tuple[int, ...], str], int] = {}

    def add(self, text: str, wild: tuple[int, ...], order: int) -> None:
        places = self._places.setdefault(len(text), [])
        if wild not in places:
            places.append(wild)
        self._first.setdefault((wild, text), order)

    def first(self, text: str, none: int) -> int:
        """The lowest order of a stored text that fits, or `none`."""
        best = none
        for wild in self._places.get(len(text), ()):
            letters = list(text)
            for place in wild:
                letters[place] = "."
            best = min(best, self._first.get((wild, "".join(letters)), none))
        return best
