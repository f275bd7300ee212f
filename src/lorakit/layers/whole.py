"""Bases that are subclasses of a torch layer with a forward of their own: they pad, look elsewhere, or normalise.

What such a forward does with its input is its own affair, so nothing can be added beside it. It is run as it is, on a
stand-in that holds the changed weight, and gives what the merged layer gives. The weight's change is built for each
call; dropout, which acts on an input, does not act.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.errors import UnsupportedError
from lorakit.layers.hooks import outside_autocast
from lorakit.layers.standin import stand_in
from lorakit.layers.varied import effect_of, offset_of, total_rows
from lorakit.weights.dense import CONVOLUTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lorakit.layers.base import LoraLayer

_KNOWN = (nn.Embedding, *CONVOLUTIONS)
_METHODS = ("forward", "_conv_forward")


def has_own_forward(base: nn.Module) -> bool:
    """Whether an embedding or a convolution computes otherwise than torch's own.

    An embedding that multiplies its output by its `embed_scale` is known, and no such one.
    """
    if isinstance(base, nn.Embedding) and base.max_norm is not None:
        return True  # it shortens the rows that it finds
    if isinstance(base, nn.Embedding) and hasattr(base, "embed_scale"):
        return False
    kind = next(kind for kind in _KNOWN if isinstance(base, kind))
    return any(getattr(type(base), name, None) is not getattr(kind, name, None) for name in _METHODS)


def acting_on_all(layer: LoraLayer, where: str) -> tuple[str, ...]:
    """The adapters that act in the running call on a layer that cannot tell samples apart.

    Raises:
        UnsupportedError: the call chose an adapter for each sample, and one of them is here.
    """
    names, by_sample = layer.acting()
    if names and by_sample is not None:
        raise UnsupportedError(
            f"adapters for each sample do not work {where}; {list(names)} are on it. "
            "Choose one adapter for the whole batch"
        )
    return names


def run_changed(layer: LoraLayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The forward of a layer's base with the changes of the acting adapters in its weight and bias.

    Raises:
        UnsupportedError: the call chose an adapter for each sample.
    """
    base = layer.get_base_layer()
    names = acting_on_all(layer, f"on a {type(base).__name__}, which has a forward of its own")
    twin = changed_stand_in(layer, names)
    if isinstance(twin, CONVOLUTIONS):
        twin.groups = 1
    return twin(*args, **kwargs)


def changed_stand_in(layer: LoraLayer, names: Sequence[str]) -> nn.Module:
    """A double of a layer's base that holds the weight and bias with the changes of these adapters."""
    base = layer.get_base_layer()
    with outside_autocast(base.weight.device):  # type: ignore[arg-type]  # its weight is a parameter
        changed = _changed(layer, names)
    return stand_in(base, {name: value for name, value in changed.items() if name in base._parameters})


def _changed(layer: LoraLayer, names: Sequence[str]) -> dict[str, Tensor | None]:
    """The weight, made dense, and the bias with the changes of these adapters."""
    state, layout = layer.codec.state(layer.get_base_layer()), layer.layout
    weight, bias = layout.make_dense(state.weight), state.bias
    if layer.token_adapter is not None:
        weight = layer.token_adapter.in_weight(weight, names)
    own = [name for name in names if name in layer.r]
    effects = {name: effect_of(layer, name) for name in own}
    rows = total_rows([effect.rows for effect in effects.values()])
    if rows is not None:
        weight = (weight * layout.by_output(rows)).to(weight.dtype)
    for name, effect in effects.items():
        scaling, offset, biased = layer.scaling[name], offset_of(layer, name), layer.stored(name).bias
        if offset is not None:
            weight = weight + (layout.dense(offset.A, offset.B) * offset.scaling).to(weight.dtype)
        weight = weight + (layout.dense(effect.A, effect.B) * scaling).to(weight.dtype)
        if biased is not None:
            scaled = (biased * scaling).to(weight.dtype)
            bias = scaled if bias is None else bias + scaled
    return dict(zip(layer.codec.names, (weight, bias), strict=True))
