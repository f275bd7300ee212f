"""A deeper model from the layers of a shallower one: copies that share its weights (`layer_replication`).

The copies of one layer are modules of their own, so each carries adapters of its own, over one set of base weights.
A layer's first place in the deeper list is taken by the layer itself. Nothing is changed while planning.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lorakit.layers import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_GROWTH = 4
"""A file may ask for any depth; more than this many times the base's own is refused."""

_LISTS = ("layers", "h", "layer", "blocks")
_INNER = ("model", "transformer", "bert", "encoder", "decoder")


class Setting(NamedTuple):
    """An attribute that says which layer this is, or how many there are."""

    owner: Any
    attribute: str
    before: Any
    after: Any


class Replication(NamedTuple):
    """A list of layers and the one that takes its place."""

    ranges: tuple[tuple[int, int], ...]
    place: Place
    before: nn.ModuleList
    after: nn.ModuleList
    settings: tuple[Setting, ...]

    def install(self) -> None:
        """Put the longer list in place, and its length into the model's config."""
        setattr(self.place.owner, self.place.attribute, self.after)
        for owner, attribute, _, value in self.settings:
            setattr(owner, attribute, value)

    def undo(self) -> None:
        """Put the former list back. Layers that the other one lacks follow the mode that the model was put in."""
        setattr(self.place.owner, self.place.attribute, self.before)
        for owner, attribute, value, _ in self.settings:
            setattr(owner, attribute, value)
        self.before.training = self.after.training
        kept = set(self.after)
        for layer in self.before:
            if layer not in kept:
                layer.train(self.after.training)


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
    bad = [(start, end) for start, end in ranges if not 0 <= start < end <= len(before)]
    total = sum(end - start for start, end in ranges)
    if bad:
        problems.append(
            f"layer_replication: {shown(bad)} are not ranges [start, end) of the {len(before)} layers of this model"
        )
    elif total > MOST_GROWTH * len(before):
        problems.append(
            f"layer_replication: {total} layers out of {len(before)}, at most {MOST_GROWTH} times as many are made"
        )
    else:
        order = [index for start, end in ranges for index in range(start, end)]
        first = {index: order.index(index) for index in order}
        after = nn.ModuleList(
            before[index] if first[index] == number else _shared_copy(before[index])
            for number, index in enumerate(order)
        )
        after.training = before.training
        settings = (*_numbers(after), *_depths(place.owner, model, order, len(before)))
        return Replication(tuple((start, end) for start, end in ranges), place, before, after, settings)
    return None


def shown(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges for a message, the first few of them."""
    first = ", ".join(f"[{start}, {end}]" for start, end in ranges[:4])
    return f"[{first}{', ...' if len(ranges) > 4 else ''}]" if ranges else "none"


def _layer_list(model: nn.Module) -> Place | None:
    """Where the list of the model's layers is; an encoder-decoder has two and is not asked."""
    inner: nn.Module | None = model
    while inner is not None:
        inside = inner._modules
        for name in _LISTS:
            if isinstance(inside.get(name), nn.ModuleList):
                return Place(inner, name)
        if inside.keys() >= {"encoder", "decoder"}:
            return None
        names = (*_INNER, getattr(inner, "base_model_prefix", ""))
        inner = next((inside[name] for name in names if inside.get(name) is not None), None)
    return None


def _shared_copy(layer: nn.Module) -> nn.Module:
    """A copy of a layer that shares its parameters and buffers, and the model's config."""
    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    shared += [module.config for module in layer.modules() if hasattr(module, "config")]
    return copy.deepcopy(layer, {id(thing): thing for thing in shared})


def _numbers(layers: nn.ModuleList) -> Iterator[Setting]:
    """What tells each layer its place, by which it finds its keys and values in a cache."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            found = getattr(module, "layer_idx", None)
            if isinstance(found, int):
                yield Setting(module, "layer_idx", found, number)


def _depths(owner: nn.Module, model: nn.Module, order: Sequence[int], depth: int) -> Iterator[Setting]:
    """The depth in the config of the part that has the layers, and what it lists for each of them."""
    configs = (getattr(module, "config", None) for module in (owner, model))
    config = next(
        (item for item in configs if isinstance(getattr(item, "num_hidden_layers", None), int)), None
    )
    if config is None:
        return
    yield Setting(config, "num_hidden_layers", config.num_hidden_layers, len(order))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            yield Setting(config, name, value, [value[index] for index in order])
