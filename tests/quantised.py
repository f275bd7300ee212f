"""Quantised linear layers of every library that runs here, and pictures of all that they hold."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes as bnb
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from lorakit.weights.bitsandbytes4 import Bitsandbytes4Codec
from lorakit.weights.bitsandbytes8 import Bitsandbytes8Codec
from lorakit.weights.hqq import HqqCodec
from lorakit.weights.torchao import TorchaoCodec
from models import bits

if TYPE_CHECKING:
    from collections.abc import Callable

OUT, IN = 64, 128
"""Multiples of what bitsandbytes packs for the CPU, and of every group below."""


class Kind(NamedTuple):
    """A way of quantising.

    Attributes:
        name: of the row.
        codec: the class that owns it.
        quantised: makes the layer of a plain one, which it may use up.
        step: the largest distance of two neighbouring numbers of the grid, as a share of the largest in the block.
    """

    name: str
    codec: type
    quantised: Callable[[nn.Linear], nn.Module]
    step: float

    def __str__(self):
        return self.name


def four_bits(**options):
    def make(linear):
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            **options,
        )
        made.weight = bnb.nn.Params4bit(linear.weight.detach(), module=made, **options)
        made.bias = linear.bias
        return made.to("cpu")

    return make


def eight_bits(linear):
    made = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    made.weight = bnb.nn.Int8Params(linear.weight.detach().half(), requires_grad=False)
    made.bias = linear.bias
    return made.to("cpu")


def torchao(config):
    def make(linear):
        holder = nn.Sequential(linear)
        quantize_(holder, copy.deepcopy(config))
        return holder[0]

    return make


def hqq(nbits, axis=1):
    def make(linear):
        config = BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis)
        return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")

    return make


KINDS = (
    Kind("nf4", Bitsandbytes4Codec, four_bits(quant_type="nf4", compress_statistics=False), 0.31),
    Kind("nf4-double", Bitsandbytes4Codec, four_bits(quant_type="nf4", compress_statistics=True), 0.31),
    Kind("fp4", Bitsandbytes4Codec, four_bits(quant_type="fp4", compress_statistics=False), 0.34),
    Kind(
        "nf4-stored-bf16", Bitsandbytes4Codec, four_bits(quant_type="nf4", quant_storage=torch.bfloat16), 0.31
    ),
    Kind("int8", Bitsandbytes8Codec, eight_bits, 1 / 127),
    Kind("torchao-int8", TorchaoCodec, torchao(Int8WeightOnlyConfig()), 1 / 127),
    Kind(
        "torchao-int8-groups", TorchaoCodec, torchao(Int8WeightOnlyConfig(granularity=PerGroup(32))), 1 / 127
    ),
    Kind(
        "torchao-int4",
        TorchaoCodec,
        torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        1 / 7,
    ),
    Kind("torchao-float8", TorchaoCodec, torchao(Float8WeightOnlyConfig()), 1 / 8),
    Kind("hqq-4", HqqCodec, hqq(4), 2 / 15),
    Kind("hqq-3", HqqCodec, hqq(3, axis=0), 2 / 7),
    Kind("hqq-8", HqqCodec, hqq(8), 2 / 255),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def linear(bias=True, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def make(kind, bias=True, dtype=torch.float32, seed=1):
    """A quantised layer (IN, OUT)."""
    return kind.quantised(linear(bias, dtype, seed))


class Pair(nn.Module):
    """Two quantised layers with what is between them in full precision."""

    def __init__(self, kind, dtype=torch.float32, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, IN, dtype=dtype)
        self.up = make(kind, bias, dtype, seed=1)
        self.norm = nn.LayerNorm(OUT, dtype=dtype)
        self.widen = nn.Linear(OUT, IN, dtype=dtype)
        self.down = make(kind, bias, dtype, seed=2)

    def forward(self, ids):
        """(batch, tokens) of ids -> (batch, tokens, OUT)."""
        return self.down(torch.tanh(self.widen(self.norm(self.up(self.embed(ids))))))


def pieces(base: Any) -> dict[str, str]:
    """A digest of every tensor that a quantised layer computes with."""
    found: dict[str, Any] = {"bias": base.bias}
    if isinstance(base, HQQLinear):
        found |= {"W_q": base.W_q, **base.meta}
    elif isinstance(base, bnb.nn.Linear4bit):
        state = base.weight.quant_state
        assert base.quant_state is state
        found |= {"weight": base.weight.data, "absmax": state.absmax, "dtype": state.dtype}
        if state.nested:
            found |= {"offset": state.offset, "nested": state.state2.absmax, "code": state.state2.code}
    elif isinstance(base, bnb.nn.Linear8bitLt):
        scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        found |= {"weight": base.weight.data, "scales": scales}
    elif type(base.weight) is not nn.Parameter:
        names = [*base.weight.tensor_data_names, *getattr(base.weight, "optional_tensor_data_names", ())]
        found |= {name: getattr(base.weight, name) for name in names}
    else:
        found |= {"weight": base.weight}
    return {
        name: bits(value) if isinstance(value, torch.Tensor) else str(value) for name, value in found.items()
    }
