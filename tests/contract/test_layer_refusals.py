"""What every kind of layer refuses to merge or to let go, with nothing changed."""

from __future__ import annotations

import pytest
import torch

from contract.rows import (
    assert_forward,
    assert_near,
    data,
    each,
    expected,
    facts,
    make,
    rows_where,
    weight_of,
)
from lorakit.errors import AdapterStateError, NonFiniteError, UnsupportedError
from models import Snapshot, bits


def spoil(part, value):
    def change(layer):
        tensor = getattr(layer.stored("b"), part)
        with torch.no_grad():
            tensor.view(-1)[0] = value

    return change


def overflow(value):
    def change(layer):
        with torch.no_grad():
            layer.stored("b").A.fill_(1)
            layer.stored("b").B.fill_(value)

    return change


BAD = {
    "NaN in A": (torch.float32, spoil("A", float("nan"))),
    "NaN at the end of A": (
        torch.float32,
        lambda layer: layer.stored("b").A.data.view(-1)[-1:].fill_(float("nan")),
    ),
    "infinity in B": (torch.float32, spoil("B", float("inf"))),
    "overflow of fp16": (torch.float16, overflow(60000.0)),
    "overflow of fp32": (torch.float32, overflow(3e38)),
    "scaling": (torch.float32, lambda layer: layer.scaling.update(b=float("nan"))),
    "infinite scaling": (torch.float32, lambda layer: layer.scaling.update(b=float("inf"))),
}


@each
@pytest.mark.parametrize("fault", list(BAD))
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_is_not_finite_is_refused(row, fault, merged_before):
    dtype, spoil_it = BAD[fault]
    layer = make(row, dtype, ("a", "b"))
    spoil_it(layer)
    if merged_before:
        layer.merge(adapter_names=["a"])
    for call in (layer.merge, layer.check_merge, layer.prepare_merge):
        before = str(facts(row, layer))  # as text: NaN is NaN
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            call(adapter_names=["b"]) if call == layer.merge else call(["b"])
        assert str(facts(row, layer)) == before


@each
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_base_that_is_not_finite_is_refused(row, value):
    layer = make(row)
    with torch.no_grad():
        weight_of(row, layer).view(-1)[-1] = value
    before = facts(row, layer)
    for call in (layer.merge, layer.check_merge):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            call()
        assert facts(row, layer) == before


@rows_where(lambda row: row.has_bias)
def test_a_bias_that_overflows_is_refused(row):
    layer = make(row, torch.float16, ("a", "b"), lora_bias=True)
    with torch.no_grad():
        layer.stored("b").bias.fill_(60000.0)
    before, bias = facts(row, layer), bits(layer.base_layer.bias)
    for call in (layer.merge, layer.check_merge):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            call()
        assert facts(row, layer) == before
        assert bits(layer.base_layer.bias) == bias


@rows_where(lambda row: row.has_bias and row.kind != "conv1d")  # which always has one
def test_lora_bias_needs_a_bias_to_merge_into(row):
    layer = make(row, bias=False, lora_bias=True)
    before = Snapshot(layer)
    with pytest.raises(UnsupportedError, match="lora_bias"):
        layer.merge()
    before.assert_same(layer)


@each
def test_removing_a_merged_adapter_is_refused(row):
    layer, x = make(row, names=("a", "b")), data(row)
    layer.merge(adapter_names=["a"])
    before = Snapshot(layer)
    with pytest.raises(AdapterStateError, match=r"'a' is merged.*unmerge"):
        layer.remove("a")
    before.assert_same(layer)
    layer.unmerge()
    layer.remove("a")
    assert layer.adapters == ("b",)
    assert_forward(row, layer, x, ("b",), torch.float32)


@each
def test_a_merge_for_good_leaves_no_way_back(row):
    layer, x = make(row, names=("a", "b")), data(row)
    wanted = expected(row, layer, x, ("a",))
    layer.commit_merge_for_good(layer.prepare_merge(["a"]))
    assert_near(layer(x), wanted, torch.float32, steps=2)
    for call in (layer.unmerge, lambda: layer.prepare_merge(["b"]), lambda: layer.set_adapter("b")):
        with pytest.raises(AdapterStateError, match="merge_and_unload"):
            call()
    assert_near(layer(x), wanted, torch.float32, steps=2)
