"""Which codec serves a base module: the first that owns it, judged by the object in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.weights.dense import DenseCodec

if TYPE_CHECKING:
    from torch import nn

    from lorakit.weights.codec import WeightCodec

CODECS: tuple[WeightCodec, ...] = (DenseCodec(),)


def find_codec(base: nn.Module) -> WeightCodec | None:
    """The codec for `base`, or None when no codec knows how its weight is stored."""
    return next((codec for codec in CODECS if codec.owns(base)), None)
