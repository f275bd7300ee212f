"""Which codec serves a base module: the first that owns it, judged by the object in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.weights.dense import DenseCodec
from lorakit.weights.parameter import ParameterCodec

if TYPE_CHECKING:
    from torch import nn

    from lorakit.weights.codec import WeightCodec

CODECS: tuple[WeightCodec, ...] = (DenseCodec(),)


def find_codec(base: nn.Module, parameter: str | None = None) -> WeightCodec | None:
    """The codec for `base`, or for its parameter of a given name; None when no codec knows how it is stored."""
    codecs = CODECS if parameter is None else (ParameterCodec(parameter),)
    return next((codec for codec in codecs if codec.owns(base)), None)
