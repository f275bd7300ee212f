"""The weights of a model by the names that its modules give them, wherever in a checkpoint their numbers lie.

As a rule a weight is one tensor of the same name. Beyond that:

- a checkpoint of a base model lacks the prefix that it has inside a model with a head (`bert.`), or the other way round;
- transformers (5.0 and later) stacks, fuses, cuts or renames tensors on loading (`conversions`).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lorakit.checkpoint.merging.conversions import converted
from lorakit.checkpoint.merging.weight import Piece, Weight
from lorakit.config import NearNames
from lorakit.errors import UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lorakit.checkpoint.shards import ModelShards


class _Prefix(NamedTuple):
    """What to do to a name that is not there: drop its first part, or put one before it."""

    dropped: str = ""
    added: str = ""

    def applied(self, name: str) -> str:
        if self.dropped and name.startswith(f"{self.dropped}."):
            return name.removeprefix(f"{self.dropped}.")
        return f"{self.added}.{name}" if self.added else name

    def undone(self, name: str) -> str:
        if self.added and name.startswith(f"{self.added}."):
            return name.removeprefix(f"{self.added}.")
        return f"{self.dropped}.{name}" if self.dropped else name


@dataclass(frozen=True)
class Names:
    """The weights of a checkpoint by their names in the model that an adapter was made for."""

    weights: Mapping[str, Weight]
    refused: Mapping[str, str]
    """Names whose numbers a checkpoint holds in a way that no adapter can be merged into, and which way."""
    prefix: _Prefix
    parts: frozenset[str] = frozenset()
    """Names that only the checkpoint has, of tensors that the model makes others of."""
    borrowed: frozenset[str] = frozenset()
    """Names of weights that are another one's, to which they are tied."""

    def find(self, name: str) -> Weight | None:
        """The weight of that name in the model, or None.

        Raises:
            UnsupportedError: the checkpoint holds it in another form.
        """
        for candidate in dict.fromkeys((name, self.prefix.applied(name))):
            if candidate in self.weights:
                return self.weights[candidate]
            if candidate in self.refused:
                raise UnsupportedError(
                    f"{name}: transformers makes it of the checkpoint's tensors by {self.refused[candidate]}, which cannot "
                    "be merged into; load the model, merge in memory (merge_and_unload) and save that"
                )
        return None

    def with_tied(self, weights: Mapping[str, Weight]) -> Names:
        """The same with weights that the checkpoint has under another name."""
        return replace(self, weights={**self.weights, **weights}, borrowed=frozenset(weights))

    def below(self, path: str) -> list[str]:
        """The names of a module's own parameters."""
        inner = self.prefix.applied(f"{path}.")
        starts = dict.fromkeys((f"{path}.", inner))
        return [
            path + name[len(start) - 1 :]
            for start in starts
            for name in (*self.weights, *self.refused)
            if name.startswith(start) and "." not in name[len(start) :]
        ]

    def everything(self) -> Iterable[tuple[str, Weight]]:
        """Each weight, with its name in the model."""
        for name, weight in self.weights.items():
            if name not in self.parts:
                yield self.prefix.undone(name), weight

    def near(self) -> NearNames:
        """Suggests names."""
        return NearNames(name.rpartition(".")[0] for name, _ in self.everything())

    def has_top(self, name: str) -> bool:
        """Whether the checkpoint has anything in the part of the model that a name begins with."""
        top = name.partition(".")[0]
        return any(other.partition(".")[0] == top for other, _ in self.everything())


def make_names(shards: ModelShards, wanted: Collection[str]) -> Names:
    """The names under which a checkpoint's weights are found.

    Args:
        shards: the checkpoint.
        wanted: names of weights that adapters change; some may be new.

    Raises:
        UnsupportedError: a prefix could be put before them in several ways.
    """
    plain = {name: _plain(name, place.info.shape, shards) for name, place in shards.places.items()}
    with suppress(UnsupportedError):  # which a conversion may settle
        found = Names(plain, {}, _prefix(plain, wanted))
        if all(found.find(name) is not None for name in wanted):
            return found
    more, refused = converted(shards)
    parts = frozenset(piece.tensor for weight in more.values() for piece in weight.pieces) - more.keys()
    weights = {**plain, **more}
    return Names(weights, refused, _prefix({**weights, **refused}, wanted), parts)


def _plain(name: str, shape: tuple[int, ...], shards: ModelShards) -> Weight:
    return Weight(name, shape, shards.places[name].info.dtype, (Piece(name, 0, math.prod(shape)),))


def _prefix(available: Collection[str], wanted: Collection[str]) -> _Prefix:
    """The one part that is to be dropped or put before names that are not there; none where that helps nothing."""
    tops = {name.partition(".")[0] for name in available}
    missing = [name for name in wanted if name not in available]
    dropped = {
        top
        for top, _, rest in (name.partition(".") for name in missing)
        if top not in tops and rest in available
    }
    if len(dropped) == 1:
        return _Prefix(dropped=dropped.pop())
    added = {top for top in tops for name in missing if f"{top}.{name}" in available}
    if len(added) == 1:
        return _Prefix(added=added.pop())
    if dropped or added:
        raise UnsupportedError(
            bullet_list(
                "the adapter's names could stand for several parts of the base",
                [
                    f"{missing[0]} with {top!r} {how}"
                    for tops, how in ((dropped, "dropped"), (added, "before it"))
                    for top in sorted(tops)
                ],
                "Merge into the checkpoint of the model that the adapter was trained on.",
            )
        )
    return _Prefix()
