"""Which layer wraps which module. A new layer type is one class and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lorakit.layers.linear import Linear
from lorakit.weights.dense import is_conv1d

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.layers.base import LoraLayer
    from lorakit.weights import WeightCodec


class LayerKind(NamedTuple):
    """One kind of base module."""

    name: str
    matches: Callable[[nn.Module], bool]
    layer: Callable[[nn.Module, WeightCodec], LoraLayer]


LAYER_KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", lambda module: isinstance(module, nn.Linear), Linear),
    LayerKind("conv1d", is_conv1d, Linear),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of `module`, or None when no layer type adapts it."""
    return next((kind for kind in LAYER_KINDS if kind.matches(module)), None)
