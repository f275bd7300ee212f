"""`nn.MultiheadAttention`: the names and files of PEFT; its numbers, but for one term that PEFT counts twice.

PEFT 0.21.2 merges before every call of the attention, and its merge adds the change of `out_proj` two times: once into the
weight and once more by `out_proj.merge`. So its outputs, merged or not, are those of an adapter whose `out_proj` is
scaled by two, while gradients of `out_proj` are those of the single change. Here the change counts once, as it does on
every other layer.

In eval mode `nn.TransformerEncoderLayer` does not call its attention but reads the weights; PEFT's show no adapter there.
So the encoder is compared in train mode, without dropout.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from parity.models import NAMED_WARNINGS, adapter_parameters, copy_trained, peft, randomize

pytestmark = NAMED_WARNINGS

WIDTH, HEADS, TOKENS = 16, 4, 5


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        y, _ = self.attn(x, x, x, need_weights=False)
        return self.head(y)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


CASES = {
    "batch first": (lambda: Model(batch_first=True), "attn"),
    "batch second": (Model, "attn"),
    "no bias": (lambda: Model(bias=False), "attn"),
    "bias_kv": (lambda: Model(add_bias_kv=True, batch_first=True), "attn"),
    "zero_attn": (lambda: Model(add_zero_attn=True, batch_first=True), "attn"),
    "encoder": (Encoder, "self_attn"),
}
EACH = pytest.mark.parametrize("case", CASES)


def build(case):
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def fields_of(case):
    return {"r": 4, "lora_alpha": 6, "target_modules": [CASES[case][1]]}


def pair(case, *, out_proj=True):
    """Our adapter and PEFT's, random and equal; without its `out_proj` both libraries mean the same."""
    theirs = peft.get_peft_model(build(case), peft.LoraConfig(**fields_of(case)))
    randomize(theirs)
    if not out_proj:
        silence_out_proj(theirs)
    ours = lorakit.get_peft_model(build(case), lorakit.LoraConfig(**fields_of(case)))
    copy_trained(theirs, ours)
    return ours.train(), theirs.train()


@torch.no_grad()
def silence_out_proj(model):
    for name, parameter in adapter_parameters(model).items():
        if "out_proj.lora_B" in name:
            parameter.zero_()


def count_twice(ours):
    """What PEFT's outputs are: the change of out_proj two times."""
    for path, layer in ours.base_model.registry.layers.items():
        if path.endswith("out_proj"):
            layer.set_scale("default", 2.0)


def x():
    return torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def shapes(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@EACH
def test_same_names_and_shapes(case):
    ours, theirs = pair(case)
    assert shapes(adapter_parameters(ours)) == shapes(adapter_parameters(theirs))
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    mine, wanted = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert shapes(mine) == shapes(wanted)
    assert all(torch.equal(mine[key], value) for key, value in wanted.items())


@EACH
def test_same_outputs_and_gradients_where_out_proj_is_silent(case):
    ours, theirs = pair(case, out_proj=False)
    outputs = [model(x()) for model in (ours, theirs)]
    close(*outputs)
    assert (outputs[0] - build(case)(x())).abs().max() > 1e-2, "the adapter has an effect"
    for output in outputs:
        output.square().sum().backward()
    wanted = adapter_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        close(parameter.grad, wanted[name].grad, 1e-5)


@EACH
def test_peft_counts_out_proj_twice_in_calls_and_in_merges(case):
    ours, theirs = pair(case)
    once = ours(x())
    merged = {
        "ours": copy.deepcopy(ours).merge_and_unload()(x()),
        "theirs": copy.deepcopy(theirs).merge_and_unload()(x()),
    }
    close(merged["ours"], once, 1e-5)
    assert (theirs(x()) - once).abs().max() > 1e-2
    assert (merged["theirs"] - once).abs().max() > 1e-2
    count_twice(ours)
    close(ours(x()), theirs(x()))
    close(ours(x()), merged["theirs"], 1e-5)


@EACH
def test_merged_weights_are_the_base_plus_one_change(case):
    ours, theirs = pair(case)
    base, deltas = build(case).state_dict(), {}
    for path, layer in ours.base_model.registry.layers.items():
        weight = path if path.endswith("in_proj_weight") else f"{path}.weight"
        deltas[weight] = layer.get_delta_weight("default")
    mine, wanted = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert mine.keys() == wanted.keys() == base.keys()
    for name, tensor in mine.items():
        times = 2 if "out_proj" in name else 1
        close(tensor, base[name] + deltas.get(name, 0))
        close(wanted[name], base[name] + times * deltas.get(name, 0))


@EACH
def test_each_loads_the_other(case, tmp_path):
    ours, theirs = pair(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, wanted = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[key], value) for key, value in wanted.items())
    loaded = lorakit.PeftModel.from_pretrained(build(case), tmp_path / "theirs").train()
    close(loaded(x()), ours(x()))
    count_twice(loaded)
    close(loaded(x()), theirs(x()))
    close(peft.PeftModel.from_pretrained(build(case), tmp_path / "ours").train()(x()), theirs(x()))


def test_peft_forgets_the_adapter_where_an_encoder_reads_the_weights():
    ours, theirs = pair("encoder")
    trained = ours(x())
    with torch.no_grad():
        plain = build("encoder")(x())
        close(theirs.eval()(x()), plain)
        close(ours.eval()(x()), trained, 1e-5)
    assert (trained - plain).abs().max() > 1e-2


def test_a_file_with_dropout_loads_and_a_config_of_the_user_does_not(tmp_path):
    """PEFT takes lora_dropout on attention, and drops nothing."""
    theirs = peft.get_peft_model(
        build("batch first"), peft.LoraConfig(**fields_of("batch first"), lora_dropout=0.5)
    )
    randomize(theirs)
    silence_out_proj(theirs)
    theirs.eval().save_pretrained(tmp_path)
    assert torch.equal(theirs.train()(x()), theirs.eval()(x()))
    close(lorakit.PeftModel.from_pretrained(build("batch first"), tmp_path)(x()), theirs(x()))
    with pytest.raises(lorakit.PlanError, match="lora_dropout cannot act here"):
        lorakit.get_peft_model(
            build("batch first"), lorakit.LoraConfig(**fields_of("batch first"), lora_dropout=0.5)
        )


def test_separate_projections_are_refused_there_and_work_here():
    options = {"kdim": 8, "vdim": 12}
    with pytest.raises(ValueError, match="Only same embed"):
        peft.get_peft_model(Model(**options), peft.LoraConfig(r=4, target_modules=["attn"]))
    ours = lorakit.get_peft_model(Model(**options), lorakit.LoraConfig(r=4, target_modules=["attn"]))
    assert sorted(path for path in ours.base_model.registry.layers) == [
        "attn.k_proj_weight",
        "attn.out_proj",
        "attn.q_proj_weight",
        "attn.v_proj_weight",
    ]
