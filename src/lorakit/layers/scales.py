"""Changing how strongly an adapter acts on a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.specs import scaling_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorakit.layers.holding import HoldingLayer


def own_scaling(layer: HoldingLayer, name: str) -> float:
    """What the rank and the alpha of an adapter say."""
    return scaling_of(layer.r[name], layer.lora_alpha[name], rslora=layer.use_rslora[name])


def rescale(layer: HoldingLayer, values: Mapping[str, float]) -> None:
    """Give adapters other scalings, all or none.

    Raises:
        AdapterStateError: one of them is merged.
    """
    for name in values:
        layer.check_unmerged(name, "changing its scaling")
    for name, value in values.items():
        current = layer.scaling[name]
        if isinstance(current, torch.Tensor):  # for hot-swapping: a compiled graph holds this very tensor
            current.fill_(float(value))
        else:
            layer.scaling[name] = value
