"""torchao's tensors that can be read and not written, or not even read, and what is kept of those that can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerTensor,
    quantize_,
)

from lorakit import LoraConfig, UnsupportedError, get_layer_status, get_peft_model
from lorakit.weights import find_codec
from models import Snapshot, bits, randomise


class Unwritten(Int8Tensor):
    """A kind that dequantises, and that nobody here knows how to quantise to."""


def layer(config=None, **changes):
    torch.manual_seed(1)
    holder = nn.Sequential(nn.Linear(32, 16)).requires_grad_(False)
    quantize_(holder, Int8WeightOnlyConfig() if config is None else config)
    weight = holder[0].weight
    for name, value in changes.items():
        setattr(weight, name, value)
    return holder


def unwritten():
    holder = layer()
    old = holder[0].weight
    new = Unwritten(old.qdata, old.scale, old.block_size, old.dtype, zero_point=old.zero_point)
    holder[0].weight = nn.Parameter(new, requires_grad=False)
    return holder


def with_adapter(holder):
    peft = get_peft_model(holder, LoraConfig(r=2, target_modules=["0"]))
    randomise(peft)
    return peft


def inputs():
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(2))


def test_what_dequantises_alone_is_read_and_merges_into_full_precision():
    peft = with_adapter(unwritten())
    base = peft.base_model.model[0].base_layer
    codec = find_codec(base)
    assert codec.can_read
    assert not codec.can_write
    with torch.no_grad():
        y, before = peft(inputs()), Snapshot(peft)
        for merge in (peft.merge_adapter, peft.merge_and_unload):
            with pytest.raises(UnsupportedError, match="dequantize=True"):
                merge(force=True)
            before.assert_same(peft)
        peft.merge_adapter(dequantize=True)
        torch.testing.assert_close(peft(inputs()), y, rtol=1e-5, atol=1e-5)
        peft.unmerge_adapter()
        before.assert_same(peft)
        assert bits(peft(inputs())) == bits(y)


@pytest.mark.parametrize("merging", [{"force": True}, {"dequantize": True}], ids=str)
def test_a_weight_whose_input_is_scaled_first_is_not_read(merging):
    peft = with_adapter(layer(act_pre_scale=torch.full((32,), 2.0)))
    (row,) = get_layer_status(peft)
    assert row.quantization_backend == "opaque"
    with torch.no_grad():
        assert peft(inputs()).shape == (4, 16)
    with pytest.raises(UnsupportedError, match="torchao Int8Tensor"):
        peft.merge_adapter(**merging)


KEPT = {
    "tensor": (Int8WeightOnlyConfig(granularity=PerTensor()), ("block_size", "dtype", "reduce_range")),
    "dynamic": (Int8DynamicActivationInt8WeightConfig(), ("block_size", "dtype", "act_quant_kwargs")),
    "off-centre": (
        IntxWeightOnlyConfig(
            weight_dtype=torch.int6, granularity=PerAxis(0), mapping_type=MappingType.ASYMMETRIC
        ),
        ("block_size", "dtype", "target_dtype", "activation_quantization"),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_quantising_again_keeps_the_settings(name):
    config, settings = KEPT[name]
    holder = layer(config)
    codec, old = find_codec(holder[0]), holder[0].weight
    W = torch.rand(16, 32) + 0.5  # all of one sign: scales about a zero point, where there is one
    new = codec.encode(holder[0], W).weight
    assert type(new) is type(old)
    for setting in settings:
        assert str(getattr(new, setting)) == str(getattr(old, setting)), setting
    assert (new.zero_point is None) == (old.zero_point is None)
    found = codec.read(holder[0], torch.float32, codec.encode(holder[0], W))
    steps = {"off-centre": 1 / 63}.get(name, 1.5 / 127)
    assert (found - W).abs().max() <= steps
