"""Merging adapters into layers that hold one weight: the weight stays one where their changes are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorakit.layers.holding import HoldingLayer


def merged_with(layer: HoldingLayer, names: Collection[str]) -> HoldingLayer | None:
    """The layer whose weight with these adapters merged is this layer's too; None where it needs one of its own.

    Args:
        layer: which may take its factors or rows from another one.
        names: every adapter that will be merged into either of the two.
    """
    sources = {tied[name] for tied in (layer.tied, layer.tied_rows) for name in names if name in tied}
    if len(sources) != 1:
        return None
    (source,) = sources
    one_weight = layer.original_weight is source.original_weight
    return source if one_weight and all(_is_alike(layer, source, name) for name in names) else None


def _is_alike(layer: HoldingLayer, source: HoldingLayer, name: str) -> bool:
    """Whether an adapter changes the weight of both in the same way: either may carry a part that the other lacks."""
    return (
        (name in layer.tied) == (name in layer.r) == (name in source.r)
        and (name in layer.tied_rows) == _has_rows(layer, name) == _has_rows(source, name)
        and layer.scaling.get(name) == source.scaling.get(name)
        and {layer.tied.get(name, source), layer.tied_rows.get(name, source)} == {source}
    )


def _has_rows(layer: HoldingLayer, name: str) -> bool:
    return layer.token_adapter is not None and name in layer.token_adapter.adapters
