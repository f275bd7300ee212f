"""A deeper model from the layers of a shallower one: copies that share its weights (`layer_replication`).

The copies of one layer are modules of their own, so each carries adapters of its own, over one set of base weights.
Nothing is installed while planning.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lorakit.layers import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_GROWTH = 4
"""A file may ask for any depth; more than this many times the base's own is refused."""


class Replication(NamedTuple):
    """A list of layers and the one that takes its place."""

    ranges: tuple[tuple[int, int], ...]
    place: Place
    before: nn.ModuleList
    after: nn.ModuleList

    def install(self, model: nn.Module) -> None:
        """Put the longer list in place, and its length into the model's config."""
        setattr(self.place.owner, self.place.attribute, self.after)
        _set_depth(model, len(self.after))

    def undo(self, model: nn.Module) -> None:
        """Put the former list back."""
        setattr(self.place.owner, self.place.attribute, self.before)
        _set_depth(model, len(self.before))


def plan_replication(
    model: nn.Module, ranges: Sequence[tuple[int, int]], problems: list[str]
) -> Replication | None:
    """The replicated layers of a model, or None and a problem."""
    place = _layer_list(model)
    if place is None:
        problems.append(
            "layer_replication: this model has no list of layers at a known place (layers, h, encoder.layer, blocks)"
        )
        return None
    before = getattr(*place)
    bad = [[start, end] for start, end in ranges if not 0 <= start < end <= len(before)]
    total = sum(end - start for start, end in ranges)
    if bad:
        problems.append(
            f"layer_replication: {bad} are not ranges [start, end) of the {len(before)} layers of this model"
        )
    elif total > MOST_GROWTH * len(before):
        problems.append(
            f"layer_replication: {total} layers out of {len(before)}, at most {MOST_GROWTH} times as many are made"
        )
    else:
        after = nn.ModuleList(
            _shared_copy(before[index], number)
            for number, index in enumerate(index for start, end in ranges for index in range(start, end))
        )
        return Replication(tuple(map(tuple, ranges)), place, before, after.train(before.training))  # type: ignore[arg-type]
    return None


def _layer_list(model: nn.Module) -> Place | None:
    """Where the list of the model's layers is."""
    inner: nn.Module = model
    while isinstance(inner._modules.get("model"), nn.Module):
        inner = inner.model  # type: ignore[assignment]
    for name in ("bert", "transformer", "encoder"):
        found = inner._modules.get(name)
        if found is not None and not any(key in inner._modules for key in _LISTS):
            inner = found
    for name in _LISTS:
        if isinstance(inner._modules.get(name), nn.ModuleList):
            return Place(inner, name)
    encoder = inner._modules.get("encoder")
    if encoder is not None and isinstance(encoder._modules.get("layer"), nn.ModuleList):
        return Place(encoder, "layer")
    return None


_LISTS = ("layers", "h", "layer", "blocks")


def _shared_copy(layer: nn.Module, number: int) -> nn.Module:
    """A copy of a layer that shares its parameters and buffers, and knows its own place in the list."""
    memo = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    made = copy.deepcopy(layer, memo)
    for module in made.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = number  # type: ignore[assignment]  # an int, as it was
    return made


def _set_depth(model: nn.Module, depth: int) -> None:
    config = getattr(model, "config", None)
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, depth)
            return
