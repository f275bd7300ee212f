"""The scaling of the adapters on every kind of layer, and the dense change that they make."""

from __future__ import annotations

import pytest
import torch

from contract.rows import (
    assert_forward,
    assert_near,
    data,
    dense_delta,
    each,
    every_dtype,
    expected,
    facts,
    make,
    rows_where,
    weight_of,
)
from lorakit.errors import AdapterNameError, AdapterStateError, UnsupportedError

# ---- scaling --------------------------------------------------------------------------------------------


@each
def test_scale_unscale_and_set_scale(row):
    layer, x = make(row, names=("a", "b", "c")), data(row)
    layer.set_adapter(["a", "b"])
    own = dict(layer.scaling)
    layer.scale_layer(3.0)
    assert layer.scaling == {"a": 3 * own["a"], "b": 3 * own["b"], "c": own["c"]}
    assert_forward(row, layer, x, ("a", "b"), torch.float32)
    layer.unscale_layer(3.0)
    assert layer.scaling == pytest.approx(own)
    layer.scale_layer(5.0)
    layer.unscale_layer()
    assert layer.scaling == own
    layer.set_scale("c", 2.0)
    layer.set_scale("not here", 2.0)
    assert layer.scaling == {**own, "c": 2 * own["c"]}


@each
def test_a_scaling_in_a_tensor_stays_in_it(row):
    layer, x = make(row), data(row)
    kept = layer.scaling["a"] = torch.tensor(layer.scaling["a"])
    layer.scale_layer(2.0)
    assert layer.scaling["a"] is kept
    assert kept.item() == pytest.approx(2 * 0.75)
    assert_forward(row, layer, x, ("a",), torch.float32)
    wanted = expected(row, layer, x, ("a",))
    layer.merge()
    assert_near(layer(x), wanted, torch.float32, steps=2)


@each
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.set_scale("b", 2.0),
    ],
    ids=["scale", "unscale", "reset", "set"],
)
def test_scaling_a_merged_adapter_is_refused_and_nothing_is_scaled(row, change):
    layer = make(row, names=("a", "b"))
    layer.scaling["a"] = 5.0
    layer.merge(adapter_names=["b"])
    before = facts(row, layer)
    with pytest.raises(AdapterStateError, match=r"'b' is merged.*scaling"):
        change(layer)
    assert facts(row, layer) == before
    layer.scale_layer(1)  # no change at all


# ---- factors and delta ----------------------------------------------------------------------------------


@each
@every_dtype
@pytest.mark.parametrize("merged", [False, True])
def test_delta_weight_has_the_shape_and_dtype_of_the_base(row, dtype, merged):
    layer = make(row, dtype)
    base = weight_of(row, layer)
    if merged:
        layer.merge()
    delta = layer.get_delta_weight("a")
    assert delta.shape == layer.layout.make_dense(base).shape
    assert delta.shape == base.shape or row.unit > 1
    assert delta.dtype == dtype
    assert not delta.requires_grad
    A, B, _ = layer.stored("a")
    wanted = 0.75 * dense_delta(row, A.detach().double(), B.detach().double())
    near = 4 * torch.finfo(dtype).eps  # computed in the dtype of the base, or in fp32
    torch.testing.assert_close(delta, wanted.to(dtype), rtol=near, atol=near)


@each
def test_factors_of_one_block_and_of_several(row):
    layer = make(row, lora_bias=True)
    blocks = layer.blocks("a")
    assert len(blocks) == layer.layout.blocks
    if len(blocks) == 1:
        found = layer.factors("a")
        assert found.A.data_ptr() == layer.stored("a").A.data_ptr()
        assert found.B.data_ptr() == layer.stored("a").B.data_ptr()
        assert not found.A.requires_grad
    else:
        with pytest.raises(UnsupportedError, match=rf"{len(blocks)} pairs.*blocks\(\)"):
            layer.factors("a")
    for call in (layer.factors, layer.blocks, layer.stored, layer.get_delta_weight):
        with pytest.raises(AdapterNameError, match=r"nope.*\['a'\]"):
            call("nope")


@rows_where(lambda row: row.has_bias)
def test_the_bias_of_a_merge_is_summed_and_rounded_once(row):
    layer = make(row, torch.bfloat16, ("a", "b"), lora_bias=True)
    base = layer.base_layer.bias.detach().double()
    wanted = base + sum(layer.scaling[n] * layer.stored(n).bias.detach().double() for n in "ab")
    layer.merge()
    assert torch.equal(layer.base_layer.bias, wanted.to(torch.bfloat16))
