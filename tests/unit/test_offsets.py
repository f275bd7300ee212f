"""Adapters that take something off the base for themselves, on every kind of layer; the base is never touched."""

from __future__ import annotations

import copy
from types import MappingProxyType

import pytest
import torch

from lorakit import LoraConfig, PeftModel
from lorakit.errors import AdapterFormatError, AdapterNotFoundError
from lorakit.init import INITIALISERS, InitResult
from lorakit.init import registry as schemes
from lorakit.types import Factors
from models import Snapshot, ids, logits, randomise, registry_of
from zoo import adapted_zoo, zoo, zoo_config

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def begins_from_weight(context):
    """A scheme like PiSSA: rows of the weight itself, and the same as offset, so that nothing changes at first."""
    W = context.read_weight(torch.float32).to(context.spec.dtype)
    r = context.rank
    left = torch.eye(W.shape[0], r, dtype=W.dtype) * 0.5
    rows = W[:r] if W.shape[0] >= r else torch.cat([W, W.new_ones(r - W.shape[0], W.shape[1])])
    factors = Factors(rows.contiguous(), left, context.spec.scaling)
    return InitResult(factors, offset=Factors(factors.A.clone(), factors.B.clone(), factors.scaling))


@pytest.fixture(autouse=True)
def _scheme(monkeypatch):
    """The scheme under the name of another one, so that the tests do not depend on what any real one computes."""
    monkeypatch.setattr(
        schemes, "INITIALISERS", MappingProxyType({**INITIALISERS, "gaussian": begins_from_weight})
    )


def begun(name="default", **changes):
    from lorakit import get_peft_model

    return get_peft_model(zoo(), zoo_config(init_lora_weights="gaussian", **changes), name)


def moved(model, name="default", seed=3):
    """The same with the factors trained away from where they began."""
    generator = torch.Generator().manual_seed(seed)
    for layer in registry_of(model).layers.values():
        if name in layer.r:
            for tensor in layer.stored(name)[:2]:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1
                tensor.data.add_(noise.to(tensor.dtype))
    return model


def dense_reference(model, name="default"):
    """The base with the changes written into its weights, element by element of the deltas."""
    plain = zoo()
    for path, layer in registry_of(model).layers.items():
        A, B, _ = (part if part is None else part.detach() for part in layer.stored(name))
        offset = layer.lora_offset[name]
        change = (
            layer.layout.dense(A, B) * layer.scaling[name]
            - layer.layout.dense(offset.A, offset.B) * offset.scaling
        )
        owner, _, attribute = path.rpartition(".")
        module = (
            plain.get_submodule(path)
            if not isinstance(getattr(plain.get_submodule(owner), attribute), torch.nn.Parameter)
            else None
        )
        target = module if module is not None else plain.get_submodule(owner)
        key = "weight" if module is not None else attribute
        weight = getattr(target, key)
        if getattr(target, "groups", 1) > 1:
            setattr(target, key, torch.nn.Parameter(layer.layout.make_dense(weight.detach()) + change))
            target.groups = 1
        else:
            weight.data += change.to(weight.dtype)
    return plain


def test_it_begins_as_no_change_and_leaves_the_base_alone():
    model = begun()
    assert torch.allclose(logits(model), logits(zoo()), atol=1e-12)
    assert model.get_base_model().line.base_layer.weight.equal(zoo().line.weight)
    layers = registry_of(model).layers
    assert all(layer.lora_offset is not None for layer in layers.values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("lora_offset" in name for name in trained)


def test_the_offset_is_taken_off_on_every_kind_of_layer():
    model = moved(begun())
    assert not torch.allclose(logits(model), logits(zoo()), atol=1e-2)
    assert torch.allclose(logits(model), logits(dense_reference(model)), atol=1e-10)


def test_it_is_not_dropped_out_and_not_scaled_with_the_adapter():
    model = moved(begun())
    before = logits(model)
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 0.0)
    residual = logits(model)
    assert not torch.allclose(residual, logits(zoo()), atol=1e-3)
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 1.0)
    assert torch.equal(logits(model), before)


def test_merging_gives_the_same_and_unmerging_the_very_bits():
    model = moved(begun())
    wanted, picture = logits(model), Snapshot(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-10)
    model.unmerge_adapter()
    picture.assert_same(model)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=1e-10)


def test_get_delta_weight_is_all_that_the_adapter_changes():
    model = moved(begun())
    layer = registry_of(model).layers["line"]
    merged = copy.deepcopy(layer)
    merged.merge(adapter_names=["default"])
    change = merged.base_layer.weight - layer.base_layer.weight
    assert torch.allclose(layer.get_delta_weight("default"), change, atol=1e-12)


def test_others_on_the_same_base_see_nothing_of_it():
    alone = adapted_zoo()
    other = moved(begun("first"))
    other.add_adapter("default", zoo_config())
    randomise(other)
    other.set_adapter("default")
    assert torch.allclose(logits(other), logits(alone), atol=1e-12)
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(zoo()))
    other.delete_adapter("first")
    assert torch.allclose(logits(other), logits(alone), atol=1e-12)
    assert all(layer.lora_offset is None for layer in registry_of(other).layers.values())
    back = other.unload()
    assert torch.equal(logits(back), logits(zoo()))


def test_a_second_one_is_begun_from_the_unmerged_base():
    model = adapted_zoo()
    model.merge_adapter()
    model.add_adapter("second", zoo_config(init_lora_weights="gaussian"))
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.allclose(logits(model), logits(zoo()), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_mixed_batches(training):
    model = moved(
        begun(
            "first",
            target_modules=["embed", "wave", "image", "volume", "line", "turned"],
            target_parameters=None,
        )
    )
    model.add_adapter("second", LoraConfig(r=4, target_modules=["embed", "line", "wave"]))
    randomise(model, "second")
    batch = ids()
    model.train(training)
    alone = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = model(batch)
    mixed = model(batch, adapter_names=["first", "second"])
    assert torch.allclose(mixed[0], alone["first"][0], atol=1e-10)
    assert torch.allclose(mixed[1], alone["second"][1], atol=1e-10)


@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_saved_as_plain_lora_of_twice_the_rank(rslora, tmp_path):
    model = moved(begun(use_rslora=rslora, rank_pattern={"turned": 2}, alpha_pattern={"embed": 3}))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo(), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-10)
    config = loaded.peft_config["default"]
    assert (config.r, config.rank_pattern, config.init_lora_weights) == (8, {"turned": 4}, True)
    assert all(layer.lora_offset is None for layer in registry_of(loaded).layers.values())


@pytest.mark.parametrize("part", ["A", "B"])
def test_the_same_rank_is_enough_where_one_factor_never_moved(part, tmp_path):
    model = begun()
    for layer in registry_of(model).layers.values():
        tensor = getattr(layer.stored("default"), part)
        tensor.data.add_(torch.randn(tensor.shape, dtype=tensor.dtype) * 0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo(), tmp_path)
    assert loaded.peft_config["default"].r == 4
    assert torch.allclose(logits(loaded), logits(model), atol=1e-10)


def test_a_state_dict_brings_both_back():
    model = moved(begun())
    other = begun()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_combining_takes_what_the_adapter_adds():
    model = moved(begun("first"))
    wanted = logits(model)
    model.add_weighted_adapter(["first"], [1.0], "same", combination_type="cat")
    model.set_adapter("same")
    assert torch.allclose(logits(model), wanted, atol=1e-6)


@pytest.mark.parametrize("name_of_scheme", ["gaussian", "pissa"])
def test_replacing_that_fails_brings_it_back(name_of_scheme, tmp_path, monkeypatch):
    from lorakit.layers import LoraLayer

    model = moved(begun())
    model.peft_config["default"].init_lora_weights = name_of_scheme  # a file of "pissa" would be refused
    adapted_zoo().save_pretrained(tmp_path)
    wanted, real, calls = logits(model), LoraLayer.add_stored, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError
        real(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "add_stored", failing)
    with pytest.raises(RuntimeError):
        model.load_adapter(tmp_path, "default", replace=True)
    assert torch.equal(logits(model), wanted)
    assert model.peft_config["default"].init_lora_weights == name_of_scheme


# ---- adapters on a base that was changed elsewhere ------------------------------------------------------


def test_where_an_adapter_began_can_be_taken_off(tmp_path):
    """As with PEFT: the adapter is on a base that lacks what it began from, and is saved for the whole base."""
    start = adapted_zoo(target_parameters=None, target_modules=["line", "turned"])
    start.save_pretrained(tmp_path / "start")
    residual = adapted_zoo(target_parameters=None, target_modules=["line", "turned"])
    lacking = zoo()
    for path, layer in registry_of(residual).layers.items():
        lacking.get_submodule(path).weight.data -= layer.get_delta_weight("default")
    model = moved(PeftModel.from_pretrained(copy.deepcopy(lacking), tmp_path / "start"))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(zoo(), tmp_path / "end")
    assert torch.allclose(logits(loaded), wanted, atol=1e-6)
    assert loaded.peft_config["default"].r == 8


def test_a_beginning_that_is_not_this_adapters_is_refused(tmp_path):
    model = adapted_zoo()
    adapted_zoo(r=2).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFormatError, match="is not how adapter 'default' began"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "other")
    with pytest.raises(AdapterNotFoundError):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "none")
    assert not (tmp_path / "end").exists()
