"""Merging in models with quantised layers: all or none, reported, and undone to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import (
    LoraConfig,
    LossyMergeError,
    MergeReport,
    UnsupportedError,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from lorakit.weights import find_codec
from models import Snapshot, randomise, registry_of, tiny, with_adapter
from quantised import BY_NAME, IN, KINDS, OUT, Pair, make, pieces

NAMES = ["up", "down", "widen"]
QUANTISED = ["up", "down"]
some = pytest.mark.parametrize(
    "kind", [BY_NAME[name] for name in ("nf4-double", "int8", "torchao-int8", "hqq-4")], ids=str
)


def ids():
    return torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(3))


def peft_of(kind, *, scale=0.3, dtype=torch.float32, **changes):
    peft = get_peft_model(Pair(kind, dtype), LoraConfig(**{"r": 4, "target_modules": NAMES, **changes}))
    randomise(peft, scale=scale)
    return peft.eval()


def layers(peft):
    return {path: layer for path, layer in registry_of(peft).layers.items() if path in QUANTISED}


def held(peft):
    return {path: pieces(layer.get_base_layer()) for path, layer in layers(peft).items()}


def out(model):
    with torch.no_grad():
        return model(ids())


def assert_near(found, wanted, near):
    assert (found.float() - wanted.float()).norm() <= near * wanted.float().norm()


@some
def test_a_lossy_merge_is_refused_whole(kind):
    peft = peft_of(kind, scale=0.01)
    before, bits = Snapshot(peft), held(peft)
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(
            LossyMergeError, match="2 of 2 quantised layers would lose more than 10%"
        ) as caught:
            merge()
        message = str(caught.value)
        for word in ("up: ", "down: ", "dequantize=True", "force=True"):
            assert word in message
        assert set(caught.value.report.errors) == set(QUANTISED)
        assert held(peft) == bits
        before.assert_same(peft)
    assert peft.merge_report is None


@some
def test_force_accepts_the_loss_and_the_report_tells_it(kind):
    peft = peft_of(kind, scale=0.01)
    y = out(peft)  # which packs 4-bit weights on some CPUs
    bits = held(peft)
    report = peft.merge_adapter(force=True)
    assert isinstance(report, MergeReport)
    assert peft.merge_report is report
    assert set(report.errors) == set(QUANTISED)
    assert min(report.errors.values()) > 0.1
    assert report.worst[0][1] == max(report.errors.values())
    assert f"{report.worst[0][1]:.1%}" in str(report)
    assert (held(peft) != bits) == (min(report.errors.values()) < 1)
    peft.unmerge_adapter()
    assert held(peft) == bits
    assert torch.equal(out(peft), y)


@pytest.mark.parametrize("kind", [BY_NAME["int8"], BY_NAME["torchao-int8"], BY_NAME["hqq-8"]], ids=str)
def test_a_merge_that_keeps_the_effect_needs_no_force(kind):
    peft = peft_of(kind)
    y = out(peft)
    report = peft.merge_adapter()
    assert 0 < max(report.errors.values()) < 0.1
    assert_near(out(peft), y, 0.05)
    merged = out(peft)
    model = peft.merge_and_unload()
    assert find_codec(model.up).on_grid
    assert torch.equal(out(model), merged)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_merge_and_unload_is_merging_and_then_taking_off(kind):
    there, here = peft_of(kind), peft_of(kind)
    there.merge_adapter(force=True)
    wanted = held(there)
    model = here.merge_and_unload(force=True)
    assert {path: pieces(getattr(model, path)) for path in QUANTISED} == wanted
    assert set(here.merge_report.errors) == set(QUANTISED)
    assert torch.equal(out(model), out(there))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dequantize_merges_into_full_precision(kind):
    peft = peft_of(kind)
    bases, y = {path: layer.base_layer for path, layer in layers(peft).items()}, out(peft)
    bits = held(peft)
    report = peft.merge_adapter(dequantize=True)
    assert not report.errors
    near = 0.02 if "bitsandbytes" in kind.codec.name else 1e-5  # those round more in eval mode
    assert_near(out(peft), y, near)
    merged = out(peft)
    with peft.disable_adapter():
        assert {path: layer.base_layer for path, layer in layers(peft).items()} == bases
    assert torch.equal(out(peft), merged)
    peft.unmerge_adapter()
    assert {path: layer.base_layer for path, layer in layers(peft).items()} == bases
    assert held(peft) == bits
    assert torch.equal(out(peft), y)
    model = peft.merge_and_unload(dequantize=True)
    assert {type(getattr(model, path)) for path in NAMES} == {nn.Linear}
    assert not any(
        parameter.requires_grad for path in QUANTISED for parameter in getattr(model, path).parameters()
    )
    assert torch.equal(out(model), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_full_precision_is_that_of_what_the_layers_are_called_with(dtype, prepared):
    model = Pair(BY_NAME["nf4"], dtype)
    if prepared:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=NAMES))
    randomise(peft)
    y = out(peft.eval())
    peft.merge_adapter(dequantize=True)
    wanted = torch.float32 if prepared else dtype
    assert {layer.base_layer.weight.dtype for layer in layers(peft).values()} == {wanted}
    assert_near(out(peft), y, 0.03)


def test_full_precision_of_a_model_of_quantised_layers_alone_is_that_of_their_numbers():
    model = nn.Sequential(make(BY_NAME["nf4"], dtype=torch.bfloat16))
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    merged = peft.merge_and_unload(dequantize=True)
    assert merged[0].weight.dtype == torch.bfloat16


@some
def test_a_layer_that_cannot_be_merged_keeps_the_others_unmerged(kind):
    peft = peft_of(kind, bias="none", lora_bias=True)
    peft.base_model.model.down.base_layer.bias = None
    before, bits = Snapshot(peft), held(peft)
    for options in ({"force": True}, {"dequantize": True}):
        for merge in (peft.merge_adapter, peft.merge_and_unload):
            with pytest.raises(UnsupportedError, match=r"down: .*no bias"):
                merge(**options)
            assert held(peft) == bits
            before.assert_same(peft)


def test_merging_dense_layers_reports_nothing():
    peft = with_adapter(tiny())
    report = peft.merge_adapter()
    assert report == MergeReport()
    assert "no quantised weight" in str(report)


@some
def test_an_adapter_that_does_nothing_changes_no_bit(kind):
    peft = get_peft_model(Pair(kind), LoraConfig(r=4, target_modules=NAMES))
    bits = held(peft)
    assert set(peft.merge_adapter().errors.values()) == {0.0}
    assert held(peft) == bits


@some
@pytest.mark.parametrize("options", [{"force": True}, {"dequantize": True}], ids=str)
def test_another_adapter_may_come_while_one_is_merged(kind, options):
    peft = peft_of(kind)
    bits = held(peft)
    peft.merge_adapter(**options)
    peft.add_adapter("other", LoraConfig(r=2, target_modules=QUANTISED))
    randomise(peft, "other", seed=8)
    with pytest.warns(UserWarning, match="unmerging"):
        peft.set_adapter("other")
    assert held(peft) == bits
    model = peft.unload()
    assert {path: pieces(getattr(model, path)) for path in QUANTISED} == bits
    for path in QUANTISED:
        assert not getattr(model, path)._forward_pre_hooks


@some
def test_delta_weights_are_floating_point(kind):
    for layer in layers(peft_of(kind)).values():
        delta = layer.get_delta_weight("default")
        A, B, _ = layer.stored("default")
        wanted = (B @ A * layer.scaling["default"]).to(delta.dtype)
        assert delta.shape == layer.layout.shape
        torch.testing.assert_close(delta, wanted, rtol=2e-3, atol=1e-5)


def test_the_shapes_of_the_pair_are_quantised_ones():
    assert [layer.layout.shape for layer in layers(peft_of(BY_NAME["nf4"])).values()] == [(OUT, IN)] * 2
