"""Schemes that are meant to change the base (LoftQ): the base holds other weights from then on, or nothing is changed."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from lorakit import PeftModel, get_peft_model
from lorakit.errors import PlanError
from lorakit.init import INITIALISERS, InitResult
from lorakit.init import registry as schemes
from lorakit.layers import LoraLayer
from lorakit.surgery import find_registry
from models import Snapshot, config, logits, randomise, tiny, tiny_llama
from zoo import zoo, zoo_config

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def halves(context):
    """A base of half the weight, and factors that begin as no change."""
    plain = INITIALISERS["default"](context).factors
    return InitResult(plain, base_weight=context.read_weight(torch.float64) / 2)


@pytest.fixture(autouse=True)
def _scheme(monkeypatch):
    monkeypatch.setattr(schemes, "INITIALISERS", MappingProxyType({**INITIALISERS, "gaussian": halves}))
    for module in ("surgery.rows", "saving"):
        monkeypatch.setattr(f"lorakit.{module}.REPLACES_BASE", frozenset({"gaussian"}))


KINDS = ["embed", "image", "line", "turned"]


def begun(**changes):
    return get_peft_model(
        zoo(), zoo_config(init_lora_weights="gaussian", **{"target_modules": KINDS, **changes})
    )


def halved():
    plain = zoo()
    for path in KINDS:
        plain.get_submodule(path).weight.data /= 2
    plain.experts.weights.data /= 2
    return plain


def test_every_kind_of_base_holds_the_new_weight_from_then_on():
    model = begun()
    assert torch.equal(logits(model), logits(halved()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(halved()))
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {torch.float64}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert torch.equal(logits(model.unload()), logits(halved()))


def test_the_adapter_is_saved_for_the_new_base(tmp_path):
    model = begun()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(halved(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].init_lora_weights is True  # nothing is to be run on the changed base


def test_merging_and_unmerging():
    model = begun()
    randomise(model)
    wanted = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("at", [1, 3])
def test_a_failure_gives_the_former_weights_back(monkeypatch, at):
    model, real, calls = zoo(), LoraLayer.replace_base, []
    before = Snapshot(model)

    def failing(self, weight):
        calls.append(self)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(self, weight)

    monkeypatch.setattr(LoraLayer, "replace_base", failing)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, zoo_config(init_lora_weights="gaussian", target_modules=KINDS))
    before.assert_same(model)


def test_not_below_other_adapters():
    model = get_peft_model(tiny(), config())
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"replaces the base weights, for which the adapters \['default'\]"):
        model.add_adapter("second", config(init_lora_weights="gaussian"))
    before.assert_same(model)


def test_not_on_a_weight_that_is_anothers_too():
    model = tiny_llama(tie=True)
    before = Snapshot(model)
    with pytest.raises(PlanError, match="would untie"):
        get_peft_model(model, config(init_lora_weights="gaussian", target_modules=["embed_tokens", "q_proj"]))
    before.assert_same(model)
    assert find_registry(model) is None


def test_not_on_a_grouped_convolution():
    model = zoo()
    before = Snapshot(model)
    with pytest.raises(PlanError, match="wave: the grouped weight has no place"):
        get_peft_model(
            model, zoo_config(init_lora_weights="gaussian", target_modules=["wave"], target_parameters=None)
        )
    before.assert_same(model)
