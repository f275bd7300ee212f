"""Which codec serves a base module: the first that owns it, judged by the object in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorakit.weights.bitsandbytes4 import Bitsandbytes4Codec
from lorakit.weights.bitsandbytes8 import Bitsandbytes8Codec
from lorakit.weights.dense import CONVOLUTIONS, DenseCodec, is_dense
from lorakit.weights.hqq import HqqCodec, is_hqq
from lorakit.weights.opaque import OpaqueCodec, backend_of
from lorakit.weights.parameter import ParameterCodec
from lorakit.weights.torchao import TorchaoCodec

if TYPE_CHECKING:
    from lorakit.weights.codec import WeightCodec

_DENSE = DenseCodec()
CODECS: tuple[WeightCodec, ...] = (
    OpaqueCodec(),  # some of its layers hold numbers that they do not multiply
    _DENSE,
    Bitsandbytes4Codec(),
    Bitsandbytes8Codec(),
    TorchaoCodec(),
    TorchaoCodec(can_write=False),
    HqqCodec(),
)
_OF_TORCH = frozenset({nn.Linear, nn.Embedding, *CONVOLUTIONS})


def find_codec(base: nn.Module, parameter: str | None = None) -> WeightCodec | None:
    """The codec for `base`, or for its parameter of a given name; None when no codec knows how it is stored."""
    if parameter is not None:
        codec = ParameterCodec(parameter)
        return codec if codec.owns(base) else None
    if type(base) in _OF_TORCH and is_dense(base._parameters.get("weight")):
        return _DENSE  # as would be found below, at a tenth of the cost
    return next((codec for codec in CODECS if codec.owns(base)), None)


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a quantised matrix though it is no `nn.Linear`."""
    return is_hqq(module) or backend_of(module) is not None
