"""What attaching asks once for many modules, and that the short ways answer as the long ones do."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, get_peft_model
from lorakit.surgery import wrap
from lorakit.surgery.describe import describe
from lorakit.weights import CODECS, find_codec
from models import config, registry_of, tiny, with_adapter


def counted(monkeypatch, where, name):
    calls, real = [], getattr(where, name)

    def counting(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(where, name, counting)
    return calls


def test_the_kind_is_asked_once_for_a_class(monkeypatch):
    model = tiny(layers=5)
    calls = counted(monkeypatch, sys.modules[describe.__module__], "kind_of")
    described = describe(model)
    classes = {type(module) for module in model.modules()}
    assert len(calls) == len(classes) < len(described.nodes)
    assert {node.kind.name for node in described.nodes.values() if node.kind} == {
        "linear",
        "conv1d",
        "embedding",
    }


def test_siblings_are_grouped_once_for_a_parent(monkeypatch):
    calls = counted(monkeypatch, wrap, "group_of")
    model = get_peft_model(tiny(layers=3), config(target_modules=["q_proj", "v_proj", "c_fc"]))
    assert len(calls) == 3
    for path, layer in registry_of(model).layers.items():
        assert len(layer.group.layers) == 3, path


def test_a_second_adapter_groups_only_what_is_new(monkeypatch):
    model = get_peft_model(tiny(layers=3), config(target_modules=["q_proj", "v_proj"]))
    layers = registry_of(model).layers
    layers["layers.0.q_proj"].group.leave(layers["layers.0.q_proj"])
    calls = counted(monkeypatch, wrap, "group_of")
    model.add_adapter("other", config(target_modules=["q_proj", "down"]))
    assert {name for (siblings,) in calls for name in siblings} == {"down"}
    assert [len(layer.group.layers) for layer in layers.values() if layer.group] == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 4),
        nn.Embedding(3, 4),
        nn.Conv1d(3, 4, 2),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.Conv3d(3, 4, 1),
        Conv1D(3, 4),
        nn.Linear(3, 4, device="meta"),
        nn.Linear(3, 4, dtype=torch.complex64),
        nn.LayerNorm(3),
    ],
    ids=repr,
)
def test_the_short_way_to_a_codec_is_the_long_one(module):
    assert find_codec(module) is next((codec for codec in CODECS if codec.owns(module)), None)


def test_two_modules_of_a_class_that_may_be_quantised_are_asked_each():
    kind = type("EetqLinear", (nn.Module,), {"__module__": "eetq"})
    plain, quantised = kind(), kind()
    plain.weight = nn.Parameter(torch.zeros(4, 3))
    quantised.register_buffer("weight", torch.zeros(4, 3, dtype=torch.int8))
    found = describe(nn.ModuleDict({"plain": plain, "quantised": quantised})).nodes
    assert found["plain"].kind is None
    assert found["quantised"].kind.name == "linear"


class Counting(nn.Module):
    """A parent that looks at what is set on it."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.proj = nn.Linear(3, 3)

    def __setattr__(self, name, value):
        if "seen" in self.__dict__:
            self.seen.append(name)
        super().__setattr__(name, value)

    def forward(self, x):
        return self.proj(x)


def test_a_parent_with_a_way_of_its_own_to_set_attributes_is_asked():
    parent = Counting()
    parent.seen.clear()
    model = get_peft_model(parent, LoraConfig(r=2, target_modules=["proj"]))
    assert parent.seen == ["proj"]
    model.unload()
    assert parent.seen == ["proj", "proj"]
    assert type(parent.proj) is nn.Linear


def test_a_state_dict_of_a_merged_layer_is_that_of_the_base():
    model = with_adapter(tiny())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(layer._state_dict_hooks) for layer in registry_of(model).layers.values()]
    model.merge_adapter()
    after = model.state_dict()
    assert set(hooks) == {1}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
