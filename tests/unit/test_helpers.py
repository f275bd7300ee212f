"""Scaling adapters for a while, and telling whether a folder holds one."""

from __future__ import annotations

import pytest
import torch

from lorakit import (
    check_if_peft_model,
    hotswap_adapter,
    inject_adapter_in_model,
    rescale_adapter_scale,
)
from lorakit import prepare_model_for_compiled_hotswap as prepare
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError
from models import another, config, logits, randomise, registry_of, tiny, with_adapter
from zoo import Picture, adapted_zoo, zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def two(active=("default", "other"), *, ready=False):
    """Two adapters of different scalings, active together unless said otherwise."""
    model = with_adapter(tiny(dtype=torch.float64))
    another(model, "other", r=2, lora_alpha=3, use_rslora=True)
    model.set_adapter(list(active))
    if ready:
        prepare(model, target_rank=8)
    return model


def exact(model, factor, names):
    """The output with each of these adapters' change of every weight built and multiplied by `factor`."""
    base = tiny(dtype=torch.float64)
    with torch.no_grad():
        for path, layer in registry_of(model).layers.items():
            weight = base.get_submodule(path).weight
            for name in names:
                own = layer.lora_alpha[name] / layer.r[name] ** (0.5 if layer.use_rslora[name] else 1)
                part = layer.stored(name)
                delta = part.B @ part.A * (own * factor)
                weight.add_(delta.T if weight.shape != delta.shape or layer.layout.transposed else delta)
    return logits(base)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


READY = pytest.mark.parametrize("ready", [False, True], ids=["numbers", "tensors"])


# ---- for a while --------------------------------------------------------------------------------------


@READY
@pytest.mark.parametrize("factor", [0.0, 0.5, 1, 2, -1.5])
def test_the_effect_is_exact_and_over_afterwards(factor, ready):
    model = two(ready=ready)
    before, output = Picture(model), logits(model)
    with rescale_adapter_scale(model, factor):
        close(logits(model), exact(model, factor, ["default", "other"]))
        model.set_adapter("other")
        close(logits(model), exact(model, factor, ["other"]))  # those that are not active are scaled too
        model.set_adapter(["default", "other"])
    before.assert_same(model)
    assert torch.equal(logits(model), output)


@READY
def test_contexts_inside_each_other(ready):
    model = two(ready=ready)
    before = Picture(model)
    with rescale_adapter_scale(model, 0.5):
        half = Picture(model)
        with rescale_adapter_scale(model, 3):
            close(logits(model), exact(model, 1.5, ["default", "other"]))
        half.assert_same(model)
        with rescale_adapter_scale(model, 0):
            close(logits(model), logits(tiny(dtype=torch.float64)))
        half.assert_same(model)
    before.assert_same(model)


@READY
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside(error, ready):
    model = two(ready=ready)
    before = Picture(model)
    with pytest.raises(error), rescale_adapter_scale(model, 0.5):
        raise error
    before.assert_same(model)


@READY
def test_a_failure_while_scaling_leaves_nothing_scaled(monkeypatch, ready):
    model = two(ready=ready)
    before = Picture(model)
    import lorakit.helpers as helpers

    real, calls = helpers._put, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(helpers, "_put", failing)
    with pytest.raises(KeyboardInterrupt), rescale_adapter_scale(model, 0.5):
        pass
    before.assert_same(model)


@READY
def test_what_is_set_inside_is_forgotten(ready):
    model = two(ready=ready)
    before = Picture(model)
    with rescale_adapter_scale(model, 0.5):
        for layer in registry_of(model).layers.values():
            layer.set_scale("default", 7)
            layer.scale_layer(3)
    before.assert_same(model)


def test_adapters_that_come_and_go_inside(tmp_path):
    model = two()
    with_adapter(tiny(dtype=torch.float64), seed=8, lora_alpha=20).save_pretrained(tmp_path)
    with rescale_adapter_scale(model, 0.5):
        hotswap_adapter(model, tmp_path, "default")
        model.delete_adapter("other")
        model.load_adapter(tmp_path, "third")
    scalings = [dict(layer.scaling) for layer in registry_of(model).layers.values()]
    assert all(found == {"default": 5.0, "third": 5.0} for found in scalings)
    with rescale_adapter_scale(model, 0.5):
        model.load_adapter(tmp_path, "third", replace=True)
        model.unload()


@pytest.mark.parametrize("kind", ["LoraModel", "injected", "compiled"])
def test_models_of_every_kind(kind):
    model = two()
    taken = {
        "LoraModel": model.base_model,
        "injected": model.get_base_model(),
        "compiled": torch.compile(model, backend="eager"),
    }[kind]
    with rescale_adapter_scale(taken, 0.25):
        close(logits(model), exact(model, 0.25, ["default", "other"]))


def test_a_model_that_was_injected_into():
    base = tiny(dtype=torch.float64)
    inject_adapter_in_model(config(), base)
    randomise(base)
    with rescale_adapter_scale(base, 0.25):
        assert {layer.scaling["default"] for layer in registry_of(base).layers.values()} == {0.5}


def test_layers_of_every_kind():
    model = adapted_zoo()
    before, output = Picture(model), logits(model)
    with rescale_adapter_scale(model, 0):
        close(logits(model), logits(zoo()))
    with rescale_adapter_scale(model, 0.5):
        half = logits(model)
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 0.5)
    close(half, logits(model))
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 1)
    before.assert_same(model)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize(
    ("multiplier", "error"),
    [("2", TypeError), (None, TypeError), (True, TypeError), (torch.ones(()), TypeError), ([1], TypeError)]
    + [(value, ConfigError) for value in (float("nan"), float("inf"), -float("inf"))],
    ids=repr,
)
def test_multipliers_that_are_none(multiplier, error):
    model = two()
    before = Picture(model)
    with pytest.raises(error, match="multiplier"), rescale_adapter_scale(model, multiplier):
        pass
    before.assert_same(model)


def test_models_that_cannot_be_scaled():
    with pytest.raises(AdapterNameError, match="carries no adapter"), rescale_adapter_scale(tiny(), 0.5):
        pass
    model = with_adapter(tiny())
    model.merge_adapter()
    before = Picture(model)
    with pytest.raises(AdapterStateError, match="unmerge_adapter"), rescale_adapter_scale(model, 0.5):
        pass
    before.assert_same(model)
    model.unmerge_adapter()
    with rescale_adapter_scale(model, 0.5), pytest.raises(ZeroDivisionError):
        model.merge_adapter()  # the scaled change is what is merged
        merged = logits(model)
        model.unmerge_adapter()
        torch.testing.assert_close(merged, logits(model), rtol=1e-5, atol=1e-6)
        _ = 1 / 0


# ---- layer by layer -----------------------------------------------------------------------------------


@READY
def test_layers_scale_their_active_adapters_alone(ready):
    model = two(active=("other",), ready=ready)
    layers = registry_of(model).layers.values()
    natural = {name: float(next(iter(layers)).scaling[name]) for name in ("default", "other")}
    for scale, wanted in ((2, 2.0), (0.25, 0.5), (1, 0.5), (4, 2.0)):
        for layer in layers:
            layer.scale_layer(scale)
            assert float(layer.scaling["other"]) == natural["other"] * wanted
            assert float(layer.scaling["default"]) == natural["default"]
        close(logits(model), exact(model, wanted, ["other"]))
    for layer in layers:
        layer.unscale_layer(4)
        assert float(layer.scaling["other"]) == natural["other"] * 0.5
        layer.unscale_layer()
        assert float(layer.scaling["other"]) == natural["other"]
        layer.set_scale("default", 3)
        layer.set_scale("nobody", 3)
        assert float(layer.scaling["default"]) == natural["default"] * 3
    model.set_adapter(["default", "other"])
    for layer in layers:
        layer.unscale_layer()
    close(logits(model), exact(model, 1, ["default", "other"]))


@READY
def test_scaling_a_merged_layer_is_refused(ready):
    model = two(ready=ready)
    model.merge_adapter(["default"])
    before, output = Picture(model), logits(model)
    layer = next(iter(registry_of(model).layers.values()))
    for call in (
        lambda: layer.set_scale("default", 2),
        lambda: layer.scale_layer(2),
        lambda: layer.unscale_layer(2),
        lambda: layer.unscale_layer(),
    ):
        with pytest.raises(AdapterStateError, match="unmerge_adapter"):
            call()
        before.assert_same(model)
    assert torch.equal(logits(model), output)


# ---- is it one? ---------------------------------------------------------------------------------------


def test_check_if_peft_model(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with_adapter(tiny()).save_pretrained(tmp_path / "adapter")
    assert check_if_peft_model(tmp_path / "adapter")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert check_if_peft_model(tmp_path / "adapter")  # the config alone is asked for
    for number, text in enumerate(
        ("{}", "", "not JSON", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": "8"}')
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "adapter_config.json").write_text(text)
        assert not check_if_peft_model(tmp_path / str(number))
    (tmp_path / "empty").mkdir()
    assert not check_if_peft_model(tmp_path / "empty")
    assert not check_if_peft_model(tmp_path / "absent")
    assert not check_if_peft_model(tmp_path / "adapter" / "adapter_config.json")
    assert not check_if_peft_model(None)


def test_check_if_peft_model_on_the_hub(monkeypatch):
    import huggingface_hub.errors as hub

    def absent(*_args, **_kwargs):
        raise hub.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    assert not check_if_peft_model("nobody/nothing")
