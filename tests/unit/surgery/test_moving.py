"""What waits outside the module tree (kept weights, inactive biases) follows when the model is moved or cast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lorakit import AdapterStateError, LoraConfig
from models import Snapshot, tiny, with_adapter


def parameters_of(model):
    return {(p.device, p.dtype) for p in model.parameters()}


def test_unmerge_after_a_cast():
    model = tiny(0)
    base = copy.deepcopy(model)
    peft = with_adapter(model, seed=1, target_modules="all-linear")
    peft.merge_adapter()
    peft.to(torch.float64)
    peft.unmerge_adapter()
    assert {dtype for _, dtype in parameters_of(peft)} == {torch.float64}
    plain = peft.unload()
    for name, parameter in base.to(torch.float64).named_parameters():
        assert torch.equal(dict(plain.named_parameters())[name], parameter)


def test_merging_more_after_a_cast():
    peft = with_adapter(tiny(0), seed=1, target_modules="all-linear")
    peft.merge_adapter()
    peft.to(torch.float64)
    with peft.disable_adapter():
        assert {dtype for _, dtype in parameters_of(peft)} == {torch.float64}
    assert {dtype for _, dtype in parameters_of(peft)} == {torch.float64}


def test_biases_follow():
    peft = with_adapter(tiny(0), seed=1, target_modules="all-linear", bias="all")
    peft.to(torch.float64)
    with peft.disable_adapter():
        assert {dtype for _, dtype in parameters_of(peft)} == {torch.float64}
    assert {dtype for _, dtype in parameters_of(peft.unload())} == {torch.float64}


def test_adding_an_adapter_leaves_merged_ones_merged():
    peft = with_adapter(tiny(0), seed=1, target_modules="all-linear")
    peft.merge_adapter()
    weights = {name: p.detach().clone() for name, p in peft.named_parameters() if "base_layer" in name}
    peft.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert peft.base_model.registry.merged == ("default",)
    for name, parameter in peft.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])
        if ".second." in name:
            assert not parameter.requires_grad


def test_a_copied_and_a_pickled_model_are_independent():
    peft = with_adapter(tiny(0), seed=1, target_modules="all-linear", bias="all")
    for twin in (copy.deepcopy(peft), pickle.loads(pickle.dumps(peft))):
        assert list(twin.state_dict()) == list(peft.state_dict())
        registry = twin.base_model.registry
        assert registry.model is twin.get_base_model()
        twin.merge_adapter()
        assert registry.merged
        assert not peft.base_model.registry.merged
        twin.unmerge_adapter()
        for mine, other in zip(peft.parameters(), twin.parameters(), strict=True):
            assert mine is not other
            assert torch.equal(mine, other)


def test_a_refused_merge_for_good_changes_nothing():
    peft = with_adapter(tiny(0), seed=1, target_modules=["q_proj"], modules_to_save=["norm"])
    peft.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    peft.base_model.disable_adapter_layers()
    before = Snapshot(peft)
    with pytest.raises(AdapterStateError, match="only one of them"):
        peft.merge_and_unload(adapter_names=["default", "second"])
    before.assert_same(peft)
