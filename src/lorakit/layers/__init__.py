"""Floor 4a: the modules that carry adapters inside a model."""

from lorakit.layers.base import LoraLayer
from lorakit.layers.linear import Linear
from lorakit.layers.registry import LAYER_KINDS, LayerKind, kind_of
from lorakit.layers.saved import ModulesToSaveWrapper
from lorakit.layers.slot import ParameterSlot, Place

__all__ = [
    "LAYER_KINDS",
    "LayerKind",
    "Linear",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "ParameterSlot",
    "Place",
    "kind_of",
]
