"""What changed between two checkpoints of one model, read piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.header import DTYPE_CODES
from lorakit.checkpoint.merging.names import make_names
from lorakit.checkpoint.merging.weight import WeightReader
from lorakit.checkpoint.shards import ShardReader
from lorakit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    from torch import Tensor, nn

    from lorakit.checkpoint.merging.weight import Weight
    from lorakit.checkpoint.shards import ModelShards
    from lorakit.checkpoint.storing import Progress

_AT_ONCE = 1 << 20  # elements compared at a time: in fp64, with the difference beside them, 24 MB


class Numbers:
    """The weights of one checkpoint by the names that a model's modules give them.

    Args:
        shards: the checkpoint.
        known: names of the model's tensors, each with the first name of the same tensor (tied ones share it).
        stack: closes the files.

    Raises:
        UnsupportedError: the checkpoint is quantised, or holds a weight in a form that cannot be read piece by piece.
    """

    def __init__(self, shards: ModelShards, known: Mapping[str, str], stack: ExitStack) -> None:
        if "quantization_config" in shards.config:
            raise UnsupportedError(
                f"{shards.folder}: is quantised, its numbers are not those of the weights; give the checkpoint that it was "
                "quantised from"
            )
        self.folder = shards.folder
        names = make_names(shards, set(known.values()))
        self._weights = {name: names.find(name) for name in dict.fromkeys(known.values())}
        self._reader = WeightReader(shards, stack.enter_context(ShardReader(shards)))
        self._known = known
        used = {piece.tensor for weight in self._weights.values() if weight for piece in weight.pieces}
        self.strange = sorted(shards.places.keys() - used - known.keys())

    def find(self, name: str) -> Weight | None:
        """The weight of that name; None where the checkpoint does not have it."""
        return self._weights[self._known[name]]

    def elements(self, weight: Weight, begin: int) -> Tensor:
        """Some of its elements, from `begin` on, in the dtype of the checkpoint."""
        return self._reader.elements(weight, begin, min(_AT_ONCE, weight.count - begin))

    def whole(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight in its shape, in another dtype or in that of the checkpoint."""
        weight = self.find(name)
        assert weight is not None
        return self._reader.whole(weight, dtype or weight.dtype)


@dataclass(frozen=True, slots=True)
class Change:
    """How one tensor of a model changed.

    Attributes:
        name: in the model.
        size: the Frobenius norm of the change relative to that of the weight, the larger of before and after; None where
            the two cannot be subtracted.
        why_not: why they cannot: it is in one checkpoint alone, its shape differs, or it holds no floating-point numbers.
    """

    name: str
    size: float | None
    why_not: str = ""

    def __str__(self) -> str:
        return f"{self.name}: " + (self.why_not or f"changed by {self.size:.2e} of its norm")


def known_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and saved buffer of a model by each of its names, with the first name of the same tensor."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
    }


def find_changes(
    base: Numbers, tuned: Numbers, known: Mapping[str, str], tolerance: float, progress: Progress
) -> dict[str, Change]:
    """Every tensor that is not the same in both, by its first name.

    Two are the same if they have the same numbers, those of the base rounded to the dtype of the other; or if they differ
    by no more than `tolerance` of the norm.

    Raises:
        ConfigError: no tensor is in both with one shape.
    """
    found = {}
    names = list(dict.fromkeys(known.values()))
    for done, name in enumerate(names):
        progress("comparing", done, len(names))
        change = _change(name, base, tuned)
        # NaN is no small change
        if change is not None and not (change.size is not None and change.size <= tolerance):
            found[name] = change
    progress("comparing", len(names), len(names))
    if len(found) == len(names) and all(change.size is None for change in found.values()):
        some = next(iter(found.values()))
        raise ConfigError(
            f"{base.folder} and {tuned.folder} are not of one model: no weight of one can be taken off its counterpart "
            f"({some}); give the base that was fine-tuned"
        )
    return found


def _change(name: str, base: Numbers, tuned: Numbers) -> Change | None:
    before, after = base.find(name), tuned.find(name)
    if before is None or after is None:
        if after is before:
            return None
        return Change(name, None, f"is only in {(base if after is None else tuned).folder}")
    if before.shape != after.shape:
        return Change(name, None, f"its shape is {before.shape} in the base and {after.shape} in the other")
    if {before.dtype, after.dtype} <= DTYPE_CODES.keys():
        return _subtracted(name, base, before, tuned, after)
    equal = before.dtype == after.dtype and all(
        torch.equal(base.elements(before, begin), tuned.elements(after, begin))
        for begin in range(0, before.count, _AT_ONCE)
    )
    return None if equal else Change(name, None, f"holds {before.dtype} and {after.dtype}, and changed")


def _subtracted(name: str, base: Numbers, before: Weight, tuned: Numbers, after: Weight) -> Change | None:
    change: list[float] = []
    norms: tuple[list[float], list[float]] = [], []
    for begin in range(0, before.count, _AT_ONCE):
        old, new = base.elements(before, begin), tuned.elements(after, begin)
        norms[0].append(_norm(old))
        norms[1].append(_norm(new))
        # what differs only since it was rounded to a narrower dtype did not change
        change.append(0.0 if torch.equal(old.to(new.dtype), new) else _norm(new.double() - old.double()))
    total = math.hypot(*change)
    if total == 0.0:
        return None
    return Change(name, total / max(math.hypot(*own) for own in norms))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
