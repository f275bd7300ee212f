"""Floor 2: how to read and replace the weight of a base module, whatever it is stored as."""

from lorakit.weights.codec import WeightCodec, WeightState
from lorakit.weights.parameter import ParameterCodec
from lorakit.weights.quantised import InFull
from lorakit.weights.registry import CODECS, find_codec, is_quantised_linear

__all__ = [
    "CODECS",
    "InFull",
    "ParameterCodec",
    "WeightCodec",
    "WeightState",
    "find_codec",
    "is_quantised_linear",
]
