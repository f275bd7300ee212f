"""Modules made without torch's constructors are what those make; flags reach everything that an adapter consists of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lorakit import get_peft_model
from lorakit.layers.factors import bare, plain_linear
from models import another, config, registry_of, tiny, with_adapter
from zoo import adapted_zoo, zoo_config

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


@pytest.mark.parametrize("kind", [nn.Module, nn.ModuleDict, nn.Identity])
def test_a_bare_module_is_one_of_torch(kind):
    made, again, theirs = bare(kind), bare(kind), kind()
    assert vars(made) == vars(theirs)
    assert {key: type(value) for key, value in vars(made).items()} == {
        key: type(value) for key, value in vars(theirs).items()
    }
    shared = [
        key
        for key, value in vars(made).items()
        if isinstance(value, (dict, set)) and value is vars(again)[key]
    ]
    assert not shared


@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_linear_is_one_of_torch(bias):
    theirs = nn.Linear(3, 5, bias=bias)
    made = plain_linear(theirs.weight.detach(), theirs.bias.detach() if bias else None)
    assert vars(made).keys() == vars(theirs).keys()
    assert made._parameters.keys() == theirs._parameters.keys()
    assert (made.in_features, made.out_features) == (3, 5)
    assert made.weight.data_ptr() == theirs.weight.data_ptr()
    x = torch.randn(2, 3)
    assert torch.equal(made(x), theirs(x))
    assert not any(parameter.requires_grad for parameter in made.parameters())


def trainable(model, name):
    return [item.tensor.requires_grad for item in registry_of(model).tensors(name)]


@pytest.mark.parametrize(
    ("build", "new"), [(lambda: with_adapter(tiny()), config), (adapted_zoo, zoo_config)], ids=["tiny", "zoo"]
)
def test_after_a_switch_exactly_the_active_adapter_trains_whatever_was_set_by_hand(build, new):
    model = build()
    model.add_adapter("other", new())
    model.add_adapter("third", new())
    base = [p for name, p in model.named_parameters() if ".base_layer." in name]
    for active in ("other", "third", "default"):
        for name in ("default", "other", "third"):
            for item in registry_of(model).tensors(name):
                item.tensor.requires_grad_(name != active)
        model.set_adapter(active)
        for name in ("default", "other", "third"):
            assert set(trainable(model, name)) == {name == active}
        model.set_adapter(active, inference_mode=True)
        assert not any(flag for name in ("default", "other", "third") for flag in trainable(model, name))
    assert base
    assert not any(parameter.requires_grad for parameter in base)


class Sharded(nn.Linear):
    """What FSDP2 does to a module: its class becomes another."""


def test_a_factor_of_another_class_is_reached():
    model = with_adapter(tiny())
    another(model, "other")
    layer = next(iter(registry_of(model).layers.values()))
    factor = layer.lora_A["other"]
    factor.__class__ = Sharded
    factor.weight.requires_grad_(True)
    model.set_adapter("default")
    assert not factor.weight.requires_grad
    model.set_adapter("other")
    assert factor.weight.requires_grad


def test_a_factor_that_holds_modules_follows_the_mode():
    model = with_adapter(tiny())
    layer = next(iter(registry_of(model).layers.values()))
    parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Identity())
    for mode in (False, True):
        model.train(mode)
        assert layer.lora_A["default"].parametrizations.weight[0].training is mode


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_mode_of_a_model_reaches_every_module(dropout):
    model = get_peft_model(tiny().eval(), config(lora_dropout=dropout))
    another(model, "other", lora_dropout=dropout)
    holders = {"lora_A", "lora_B", "lora_dropout"}
    new = [m for name, m in model.named_modules() if not holders.isdisjoint(name.split("."))]
    assert len(new) > 10
    assert {m.training for m in new if len(m._modules) == 0} == {False}  # as the base was
    for mode in (True, False):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    with pytest.raises(ValueError, match="boolean"):
        model.train("yes")
