"""Merging and unmerging of every kind of layer: rounded once, and reversible to the bit."""

from __future__ import annotations

import pytest
import torch

from contract.rows import (
    ROWS,
    assert_forward,
    assert_near,
    blocks_for,
    data,
    dense_delta,
    each,
    every_dtype,
    expected,
    facts,
    make,
    rows_where,
    spec_for,
    weight_of,
)
from lorakit.errors import AdapterStateError
from models import Snapshot, bits

grouped = rows_where(lambda row: row.unit > 1)


# ---- there and back -------------------------------------------------------------------------------------


@each
@every_dtype
def test_unmerge_gives_the_very_bits_and_objects_back(row, dtype):
    layer = make(row, dtype, ("a", "b"), lora_bias=True)
    before, untouched = Snapshot(layer), facts(row, layer)
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert layer.merged
    layer.unmerge()
    assert not layer.merged
    before.assert_same(layer)
    layer.unmerge()  # nothing is merged: nothing happens
    before.assert_same(layer)
    assert facts(row, layer) == untouched


FIRST = {row.kind: row for row in reversed(ROWS)}.values()


@pytest.mark.parametrize(
    ("row", "cycles"), [pytest.param(row, 1000 if row in FIRST else 50, id=str(row)) for row in ROWS]
)
def test_a_thousand_cycles_in_bf16_change_no_bit(row, cycles):
    layer, x = make(row, torch.bfloat16, ("a", "b")), data(row, torch.bfloat16)
    before, output = Snapshot(layer), layer(x)
    for _ in range(cycles):
        layer.merge()
        layer.unmerge()
    before.assert_same(layer)
    assert torch.equal(layer(x), output)


@each
def test_unmerge_restores_whatever_happened_to_the_adapter(row):
    layer, x = make(row, torch.bfloat16), data(row, torch.bfloat16)
    weight_bits, groups = bits(weight_of(row, layer)), getattr(layer.get_base_layer(), "groups", None)
    layer.merge()
    with torch.no_grad():
        layer.stored("a").A.add_(1)
        layer.stored("a").B.mul_(-3)
    layer.scaling["a"] = 77.0
    layer.unmerge()
    assert bits(weight_of(row, layer)) == weight_bits
    assert getattr(layer.get_base_layer(), "groups", None) == groups
    assert_forward(row, layer, x, ("a",), torch.bfloat16)


@each
def test_unmerge_restores_what_was_done_to_the_merged_weight(row):
    layer = make(row)
    untouched = facts(row, layer)
    layer.merge()
    with torch.no_grad():
        weight_of(row, layer).fill_(9)
    layer.unmerge()
    assert facts(row, layer) == untouched


# ---- what is merged -------------------------------------------------------------------------------------


@each
@every_dtype
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merged_output_is_the_unmerged_one(row, dtype, lora_bias):
    layer, x = make(row, dtype, ("a", "b"), lora_bias=lora_bias), data(row, dtype)
    wanted = expected(row, layer, x, ("a", "b"))
    layer.merge()
    # one rounding of the weight, one of the output (a scaled embedding's twice), and the sum of the products
    assert_near(layer(x), wanted, dtype, steps=2)
    assert torch.equal(layer(x), layer.get_base_layer()(x)), "a merged layer computes with its base alone"


@each
@every_dtype
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_weight_is_rounded_once(row, dtype, adapter_dtype):
    layer = make(row, dtype, ("a", "b"), adapter_dtype=adapter_dtype)
    wanted = layer.get_delta_weight("a").double() * 0
    size = wanted.clone()
    dense = layer.layout.make_dense(weight_of(row, layer).detach()).double()
    for name in "ab":
        A, B, _ = layer.stored(name)
        s = layer.scaling[name]
        wanted += s * dense_delta(row, A.detach().double(), B.detach().double())
        size += s * dense_delta(row, A.detach().double().abs(), B.detach().double().abs())
    wanted, size = (wanted + dense), size + dense.abs()
    layer.merge()
    found = weight_of(row, layer).detach()
    assert found.dtype == dtype
    if dtype in {torch.bfloat16, torch.float16}:
        assert (found == wanted.to(dtype)).double().mean() >= 0.99
    assert (
        (found.double() - wanted).abs() <= (1 if dtype.itemsize == 2 else 6) * torch.finfo(dtype).eps * size
    ).all()


@grouped
def test_merging_ungroups_and_unmerging_groups(row):
    layer, x = make(row, lora_bias=True), data(row)
    base, groups, shape = layer.base_layer, layer.base_layer.groups, layer.base_layer.weight.shape
    unmerged = layer(x)
    layer.merge()
    assert base.groups == 1
    assert tuple(base.weight.shape) == (shape[0], shape[1] * groups, *shape[2:])
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-4, atol=1e-4)
    layer.enable_adapters(False)
    assert base.groups == groups
    assert base.weight.shape == shape
    layer.enable_adapters(True)
    assert base.groups == 1
    layer.unmerge()
    assert base.groups == groups
    assert base.weight.shape == shape


@grouped
def test_merging_in_steps_starts_from_the_grouped_weight(row):
    layer, x = make(row, names=("a", "b")), data(row)
    wanted = expected(row, layer, x, ("a", "b"))
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert_near(layer(x), wanted, torch.float32, steps=2)


@each
def test_merging_in_steps_rounds_once(row):
    together, steps = (make(row, torch.bfloat16, ("a", "b", "c")) for _ in range(2))
    together.merge()
    for name in ("a", "b", "c"):
        steps.merge(adapter_names=[name])
    assert bits(weight_of(row, steps)) == bits(weight_of(row, together))


@each
def test_merging_some_leaves_the_others_out(row):
    layer, x = make(row, names=("a", "b", "c")), data(row)
    wanted = expected(row, layer, x, ("c",))
    layer.merge(adapter_names=["c"])
    assert layer.merged_adapters == ["c"]
    assert_near(layer(x), wanted, torch.float32, steps=2)
    layer.unmerge()
    assert_forward(row, layer, x, ("a", "b", "c"), torch.float32)


@each
def test_a_merged_weight_has_the_strides_and_the_flag_of_the_base(row):
    layer = make(row)
    base = weight_of(row, layer)
    for flag in (True, False):
        base.requires_grad_(flag)
        layer.merge()
        assert weight_of(row, layer).requires_grad == flag
        assert weight_of(row, layer).is_contiguous()
        layer.unmerge()


@rows_where(lambda row: row.name.startswith("image") and row.name != "image_depthwise")
def test_a_weight_that_is_channels_last_stays_so(row):
    layer, x = make(row).to(memory_format=torch.channels_last), data(row)
    wanted = expected(row, layer, x, ("a",))
    original = weight_of(row, layer).stride()
    layer.merge()
    assert weight_of(row, layer).is_contiguous(memory_format=torch.channels_last)
    assert_near(layer(x), wanted, torch.float32, steps=2)
    layer.unmerge()
    assert weight_of(row, layer).stride() == original


@rows_where(lambda row: row.kind in {"linear", "conv1d", "embedding", "parameter"})
def test_a_weight_that_is_a_transposed_view(row):
    layer, x = make(row), data(row)
    weight = weight_of(row, layer)
    weight.data = weight.data.transpose(-1, -2).contiguous().transpose(-1, -2)
    wanted, stride = expected(row, layer, x, ("a",)), weight.stride()
    layer.merge()
    assert_near(layer(x), wanted, torch.float32, steps=2)
    assert weight_of(row, layer).stride() == stride


@each
def test_merging_again_or_elsewhere_does_nothing(row):
    layer = make(row)
    assert layer.prepare_merge(["not here"]) is None
    assert layer.prepare_merge([]) is None
    layer.merge()
    before = Snapshot(layer)
    layer.merge()
    layer.merge(adapter_names=["a", "a"])
    before.assert_same(layer)


@each
@every_dtype
def test_prepare_changes_nothing(row, dtype):
    layer = make(row, dtype)
    before, untouched = Snapshot(layer), facts(row, layer)
    assert layer.prepare_merge() is not None
    layer.check_merge()
    before.assert_same(layer)
    assert facts(row, layer) == untouched


@each
def test_adapters_may_come_and_go_beside_a_merged_one(row):
    layer, x = make(row, names=("a", "b")), data(row)
    base = facts(row, layer)
    layer.merge(adapter_names=["a"])
    merged = layer(x)
    spec = spec_for(row, layer.layout, 2)
    layer.add("c", blocks_for(spec, seed=2), spec, use_rslora=False)
    layer.remove("b")
    assert torch.equal(layer(x), merged)
    layer.merge(adapter_names=["c"])
    layer.unmerge()
    layer.set_adapter(["a", "c"])
    assert_forward(row, layer, x, ("a", "c"), torch.float32)
    assert facts(row, layer)[:3] == base[:3]


@each
def test_setting_active_adapters_unmerges(row):
    layer, x = make(row, names=("a", "b")), data(row)
    before = bits(weight_of(row, layer))
    layer.merge()
    layer.set_adapter("b")
    assert not layer.merged
    assert bits(weight_of(row, layer)) == before
    assert_forward(row, layer, x, ("b",), torch.float32)


# ---- while merged ---------------------------------------------------------------------------------------


@each
def test_disabling_a_merged_layer_is_the_base_bit_for_bit(row):
    layer, x = make(row, lora_bias=True), data(row)
    base = layer.get_base_layer()(x)
    layer.merge()
    merged = layer(x)
    assert not torch.equal(merged, base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert torch.equal(layer(x), merged)
    layer.enable_adapters(False)
    layer.unmerge()
    assert torch.equal(layer(x), base)


@each
def test_merging_while_disabled_acts_once_enabled(row):
    layer, x = make(row), data(row)
    base, wanted = layer.get_base_layer()(x), expected(row, layer, x, ("a",))
    layer.enable_adapters(False)
    layer.merge()
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    assert_near(layer(x), wanted, torch.float32, steps=2)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer()(x), base)


@each
def test_state_dict_of_a_merged_layer_is_the_unmerged_one(row):
    layer = make(row, names=("a", "b"), lora_bias=True)
    before = {key: bits(tensor) for key, tensor in layer.state_dict().items()}
    layer.merge()
    assert {key: bits(tensor) for key, tensor in layer.state_dict().items()} == before
    with pytest.raises(AdapterStateError, match="unmerge"):
        layer.load_state_dict(layer.state_dict())


@each
def test_a_merged_layer_follows_the_model_to_another_dtype(row):
    layer, x = make(row), data(row, torch.float64)
    unmerged = expected(row, layer, x, ())
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert weight_of(row, layer).dtype == torch.float64
    layer.enable_adapters(False)
    assert_near(layer(x), unmerged, torch.float64, steps=2)
