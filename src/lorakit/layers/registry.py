"""Which layer wraps which module. A new layer type is one class and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lorakit.layers.conv import Conv
from lorakit.layers.embedding import Embedding
from lorakit.layers.linear import Linear
from lorakit.layers.parameter import ParamWrapper
from lorakit.weights import is_quantised_linear
from lorakit.weights.dense import CONVOLUTIONS, is_conv1d

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.layers.base import LoraLayer
    from lorakit.weights import WeightCodec


class LayerKind(NamedTuple):
    """One kind of base module.

    Attributes:
        name: as a plan shows it.
        matches: whether a module is of this kind.
        layer: the wrapper.
        is_linear: whether `target_modules="all-linear"` means it.
        drops: whether `lora_dropout` has an effect.
        has_bias: whether B may have a bias (`lora_bias`).
    """

    name: str
    matches: Callable[[nn.Module], bool]
    layer: Callable[[nn.Module, WeightCodec], LoraLayer]
    is_linear: bool = False
    drops: bool = True
    has_bias: bool = True


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, also a quantised one that does not come from torch's."""
    return isinstance(module, nn.Linear) or is_quantised_linear(module)


LAYER_KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", _is_linear, Linear, is_linear=True),
    LayerKind("conv1d", is_conv1d, Linear, is_linear=True),
    LayerKind("embedding", lambda module: isinstance(module, nn.Embedding), Embedding, has_bias=False),
    LayerKind("conv", lambda module: isinstance(module, CONVOLUTIONS), Conv),
)

PARAMETER = LayerKind("parameter", lambda _: False, ParamWrapper, drops=False, has_bias=False)
"""A bare parameter, found by its name and not by its module's type."""


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of `module`, or None when no layer type adapts it."""
    return next((kind for kind in LAYER_KINDS if kind.matches(module)), None)


def attention_parts(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    """What an adapter on `nn.MultiheadAttention` consists of: names inside it, and whether each is a parameter.

    The output projection is a layer whose weight the module reads. Other modules have no parts.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return ()
    names = ("in_proj_weight",) if module._qkv_same_embed_dim else _SEPARATE
    return (*((name, True) for name in names), ("out_proj", False))


_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
