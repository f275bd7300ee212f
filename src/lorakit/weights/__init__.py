"""Floor 2: how to read and replace the weight of a base module, whatever it is stored as."""

from lorakit.weights.codec import WeightCodec, WeightState
from lorakit.weights.parameter import ParameterCodec
from lorakit.weights.registry import CODECS, find_codec

__all__ = ["CODECS", "ParameterCodec", "WeightCodec", "WeightState", "find_codec"]
