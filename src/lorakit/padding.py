"""An adapter's tensors as its file has them, where the model has room for more ranks than the adapter needs.

A hot-swapped adapter sits in parameters whose shape it did not choose. The ranks that it does not use hold zeros, which
change nothing and, since their gradients are zero, stay zero in training. A layer that its config does not target holds
zeros only. Neither is part of the adapter: a file has the tensors that the config describes, and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lorakit.config import Matcher, ends_in
from lorakit.errors import AdapterStateError
from lorakit.layers import ParamWrapper
from lorakit.specs import FACTOR_OF
from lorakit.surgery.describe import is_read_by_parent
from lorakit.surgery.naming import Names
from lorakit.surgery.paths import joined

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layers import LoraLayer
    from lorakit.layouts import Layout
    from lorakit.surgery import AdapterRegistry

FACTORS = {name: part for name, part in FACTOR_OF.items() if part != "bias"}
"""Which factor a tensor is, by its name below the layer in a file."""


def fitted(layout: Layout, factor: str, tensor: Tensor, rank: int) -> Tensor:
    """A stored factor with another rank: zeros in the ranks that it lacks, or without its last ones.

    Args:
        layout: of the weight. Ranks belong to blocks, and each block gains or loses its own.
        factor: "A" or "B".
        tensor: shaped as `layout.factor_shapes` says of some rank.
        rank: the one to have.

    Returns:
        Of `layout.factor_shapes(rank)`; of a smaller rank it may share memory with `tensor`.
    """
    shape = shape_of(layout, factor, rank)
    if rank_of(layout, factor, tensor) > rank:
        return first_ranks(layout, factor, tensor, rank).reshape(shape)
    larger = tensor.new_zeros(shape)
    part = first_ranks(layout, factor, larger, rank_of(layout, factor, tensor))
    part.copy_(tensor.reshape(part.shape))
    return larger


def first_ranks(layout: Layout, factor: str, tensor: Tensor, rank: int) -> Tensor:
    """The first ranks of each block of a stored factor, as a view: (blocks, rank, ...) of A, (out, rank, ...) of B."""
    if factor == "A":
        by_rank = tensor.view(layout.blocks, -1, *layout.row)
    else:
        by_rank = tensor.view(layout.out, -1, max(layout.experts, 1))
    return by_rank[:, : layout.block_rank(rank)]


def shape_of(layout: Layout, factor: str, rank: int) -> tuple[int, ...]:
    """The shape of a stored factor."""
    return layout.factor_shapes(rank)["AB".index(factor)]


def rank_of(layout: Layout, factor: str, tensor: Tensor) -> int:
    """The rank that a stored factor has room for; 0 where it is not stored as such, but flattened or sharded."""
    if tensor.ndim != len(layout.row) + 1:
        return 0
    first, second, *kernel = tensor.shape
    if factor == "A":
        ranks, fits = first, (second, *kernel) == layout.row
    else:
        ranks, fits = second * layout.groups, first == layout.out and all(size == 1 for size in kernel)
    rank, rest = divmod(ranks, max(layout.experts, 1))
    return rank if fits and not rest else 0


class Spot(NamedTuple):
    """Where a factor is: on which layer, which one, and of what rank the adapter is there."""

    path: str
    layout: Layout
    factor: str
    rank: int


class Entry(NamedTuple):
    """One tensor of an adapter, in the model and in a file.

    Attributes:
        file_name: its name in a file.
        state_name: its name in the model's state dict; empty for one that is another's, seen from a tied module.
        tensor: what the model holds.
        spot: where, for a factor; None for any other tensor.
    """

    file_name: str
    state_name: str
    tensor: Tensor
    spot: Spot | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in a file."""
        return shape_of(*self.spot[1:]) if self.is_padded and self.spot else tuple(self.tensor.shape)

    @property
    def is_padded(self) -> bool:
        """Whether the model has room for more ranks here than the adapter has."""
        return self.spot is not None and rank_of(*self.spot[1:3], self.tensor) > self.spot.rank

    def in_file(self, value: Tensor | None = None) -> Tensor:
        """The tensor without its padding, sharing memory where it can.

        Args:
            value: one of the model's shape in its place; None takes the model's own, detached.

        Raises:
            AdapterStateError: the padding was written to, so the tensor is more than its config says.
        """
        tensor, spot = self.tensor.detach() if value is None else value, self.spot
        if spot is None or not self.is_padded:
            return tensor
        own = fitted(spot.layout, spot.factor, tensor, spot.rank)
        if own.count_nonzero() != tensor.count_nonzero():
            raise AdapterStateError(
                f"{self.file_name}: the adapter has rank {spot.rank} and its parameter {tuple(tensor.shape)} has room "
                "for more, but what should be zero there was written to; put zeros there again"
            )
        return own

    def in_model(self, value: Tensor) -> Tensor:
        """A tensor of the file's shape in the shape that the model has."""
        if self.spot is None or not self.is_padded:
            return value
        layout, factor = self.spot.layout, self.spot.factor
        return fitted(layout, factor, value, rank_of(layout, factor, self.tensor))


def file_entries(registry: AdapterRegistry, name: str) -> list[Entry]:
    """The tensors of an adapter that a file has: those that its config describes.

    Raises:
        AdapterNameError: no such adapter.
    """
    registry.check_known([name])
    mine = {path: layer for path, layer in registry.layers.items() if name in layer.adapters}
    shared = {layer.tied[name] for layer in mine.values() if name in layer.tied}
    empty = [path for path, layer in mine.items() if layer not in shared and _holds_nothing(layer, name)]
    if empty:
        targets = Targets(registry.configs[name])
        mine = {
            path: layer for path, layer in mine.items() if path not in empty or targets.match(path, layer)
        }
    return list(entries(registry, name, mine))


def entries(registry: AdapterRegistry, name: str, layers: Mapping[str, LoraLayer]) -> Iterator[Entry]:
    """The tensors of an adapter on these layers and elsewhere, named as if it were on no other layers."""
    own, everywhere = _names(layers), registry.names()
    for path, layer in layers.items():
        in_file, in_state = own.layer(path), everywhere.layer(path)
        for item in layer.tensors(name):
            factor = FACTORS.get(item.file_suffix)
            yield Entry(
                joined(in_file, item.file_suffix),
                item.state_suffix and joined(in_state, item.state_suffix),
                item.tensor,
                None if factor is None else Spot(path, layer.layout, factor, layer.r[name]),
            )
    for path, wrapper in registry.saved.items():
        for key, tensor in wrapper.tensors(name):
            yield Entry(joined(path, key), joined(path, f"modules_to_save.{name}.{key}"), tensor)
    for parameter, slot in registry.slots.items():
        if name in slot.copies:
            yield Entry(own.parameter(parameter), everywhere.parameter(parameter), slot.copies[name])


def _names(layers: Mapping[str, LoraLayer]) -> Names:
    parameters = {
        path: layer.get_base_layer() for path, layer in layers.items() if isinstance(layer, ParamWrapper)
    }
    return Names.of(layers.keys() - parameters.keys(), parameters)


class Targets:
    """Which layers of a model a config means, without a walk of the model.

    Args:
        config: with `target_modules` resolved.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.matcher = Matcher(config)
        self._parameters = tuple(config.target_parameters or ())

    def match(self, path: str, layer: LoraLayer) -> str | None:
        """The path by which a layer is meant: its own, or that of the attention module whose part it is; or None."""
        module, _, _ = path.rpartition(".")
        base = layer.get_base_layer()
        if isinstance(layer, ParamWrapper):
            if isinstance(base, nn.MultiheadAttention) and self.matcher.target(module):
                return module
            return path if any(ends_in(path, name) for name in self._parameters) else None
        if is_read_by_parent(base):
            return module if self.matcher.target(module) else None
        return path if self.matcher.target(path) else None


def _holds_nothing(layer: LoraLayer, name: str) -> bool:
    """Whether both factors of an adapter's own are zero: no other adapter is so than one that lacks the layer."""
    has_rows = layer.token_adapter is not None and name in layer.token_adapter.adapters
    if name not in layer.r or name in layer.tied or has_rows:
        return False
    stored = layer.stored(name)
    return not any(_has_numbers(factor.detach()) for factor in (stored.A, stored.B))


def _has_numbers(tensor: Tensor) -> bool:
    """Whether anything in a tensor is not zero; its first number tells, as a rule."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return True
    return bool(tensor[(0,) * tensor.ndim]) or bool(tensor.any())
