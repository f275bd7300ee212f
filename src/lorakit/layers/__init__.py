"""Floor 4a: the modules that carry adapters inside a model."""

from lorakit.layers.base import LoraLayer
from lorakit.layers.chosen import BASE, Owner, carrying, choosing
from lorakit.layers.conv import Conv
from lorakit.layers.embedding import Embedding
from lorakit.layers.linear import Linear
from lorakit.layers.merging import MergingLayer
from lorakit.layers.parameter import ParamWrapper
from lorakit.layers.prepared import PreparedMerge
from lorakit.layers.registry import LAYER_KINDS, PARAMETER, LayerKind, attention_parts, kind_of
from lorakit.layers.saved import ModulesToSaveWrapper
from lorakit.layers.slot import ParameterSlot, Place

__all__ = [
    "BASE",
    "LAYER_KINDS",
    "PARAMETER",
    "Conv",
    "Embedding",
    "LayerKind",
    "Linear",
    "LoraLayer",
    "MergingLayer",
    "ModulesToSaveWrapper",
    "Owner",
    "ParamWrapper",
    "ParameterSlot",
    "Place",
    "PreparedMerge",
    "attention_parts",
    "carrying",
    "choosing",
    "kind_of",
]
