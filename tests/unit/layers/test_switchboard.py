"""A switch of a whole model finds what was changed by hand, and asks no layer by itself that needs no asking."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lorakit.layers.merging import MergingLayer
from models import another, ids, registry_of, tiny, with_adapter

NAMES = ("default", "other", "third")


def three():
    model = with_adapter(tiny())
    another(model, "other")
    another(model, "third")
    model.set_adapter("default")
    return model


def flags(model):
    return {name: {item.tensor.requires_grad for item in registry_of(model).tensors(name)} for name in NAMES}


def only(active):
    return {name: {name == active} for name in NAMES}


@pytest.fixture
def asked(monkeypatch):
    """The layers that were switched by themselves."""
    found, real = [], MergingLayer.set_adapter

    def counting(self, *args, **kwargs):
        found.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(MergingLayer, "set_adapter", counting)
    return found


def test_no_layer_is_asked_and_what_is_known_outlives_switches_and_other_adapters(asked):
    model = three()
    board = registry_of(model).board
    for name in NAMES:
        model.set_adapter(name)
        assert flags(model) == only(name)
    another(model, "fourth")
    model.delete_adapter("fourth")
    another(model, "fourth")
    model.set_adapter("fourth")
    assert {item.tensor.requires_grad for item in registry_of(model).tensors("fourth")} == {True}
    assert flags(model) == only(None)
    assert registry_of(model).board is board
    assert not asked


def new_parameter(layer):
    layer.lora_A["other"].weight = nn.Parameter(torch.randn_like(layer.lora_A["other"].weight))


def new_module(layer):
    layer.lora_A["other"] = nn.Linear(layer.in_features, layer.r["other"], bias=False)


def new_holder(layer):
    layer.lora_B = nn.ModuleDict(dict(layer.lora_B.items()))
    layer.lora_B["other"] = nn.Linear(layer.r["other"], layer.out_features, bias=False)


def set_by_hand(layer):
    layer.lora_B["other"].weight.requires_grad_(True)


@pytest.mark.parametrize("change", [new_parameter, new_module, new_holder, set_by_hand])
@pytest.mark.parametrize("then_add", [False, True])
def test_what_was_put_in_by_hand_follows_the_switch(change, then_add):
    model = three()
    layer = next(iter(registry_of(model).layers.values()))
    change(layer)
    assert flags(model)["other"] != {False}
    if then_add:
        another(model, "fourth")
    for name in ("third", "other", "default"):
        model.set_adapter(name)
        assert flags(model) == only(name)


def test_a_parametrized_factor_leaves_its_layer_to_itself(asked):
    model = three()
    layer = next(iter(registry_of(model).layers.values()))
    parametrize.register_parametrization(layer.lora_A["third"], "weight", nn.Identity())
    layer.lora_A["third"].parametrizations.weight.original.requires_grad_(False)
    model.set_adapter("other")
    assert set(asked) == {layer}
    assert layer.active_adapters == ["other"]
    assert layer.lora_B["other"].weight.requires_grad


def test_a_layer_that_was_disabled_by_hand_stays_so():
    model = three()
    layer = next(iter(registry_of(model).layers.values()))
    layer.enable_adapters(False)
    model.set_adapter("other")
    assert layer.acting() == ((), None)
    layer.enable_adapters(True)
    assert layer.acting() == (("other",), None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_switches_by_itself(copied):
    model = three()
    with torch.no_grad():
        before = model(ids())
        model.set_adapter("other")
        after = model(ids())
        model.set_adapter("default")
    twin = copied(model)
    twin.set_adapter("other")
    assert flags(model) == only("default")
    assert flags(twin) == only("other")
    with torch.no_grad():
        assert torch.equal(model(ids()), before)
        assert torch.equal(twin(ids()), after)


@pytest.mark.parametrize("end", [lambda model: model.delete_adapter("default"), lambda model: model.unload()])
def test_what_is_taken_off_is_not_kept(end):
    model = with_adapter(tiny())
    model.set_adapter("default")
    kept = [weakref.ref(item.tensor) for item in registry_of(model).tensors("default")]
    registry = registry_of(model)
    end(model)
    gc.collect()
    assert registry is not None
    assert not [ref for ref in kept if ref() is not None]
