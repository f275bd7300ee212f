"""Every kind of layer as a module: its keys, its copies, its modes, and what an adapter on it consists of."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch

from contract.rows import (
    assert_forward,
    blocks_for,
    data,
    each,
    make,
    rows_where,
    spec_for,
    weight_of,
)
from lorakit.errors import AdapterNameError
from models import Snapshot, bits


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---- copies ---------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle, through_torch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_their_own(row, copier, merged):
    layer, x = make(row, names=("a", "b"), lora_bias=True), data(row)
    original_bits = bits(weight_of(row, layer))
    groups = getattr(layer.get_base_layer(), "groups", None)
    if merged:
        layer.merge()
    twin = copier(layer)
    assert torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert bits(weight_of(row, twin)) == original_bits
    assert getattr(twin.get_base_layer(), "groups", None) == groups
    assert layer.merged == merged
    with torch.no_grad():
        before = layer(x)
        twin.stored("a").B.add_(1)
        weight_of(row, twin).add_(1)
        assert torch.equal(layer(x), before)
        assert not torch.equal(twin(x), before)
    assert {k: tuple(v.shape) for k, v in twin.state_dict().items()} == {
        k: tuple(v.shape) for k, v in layer.state_dict().items()
    }
    twin.merge()
    assert twin.merged_adapters == ["a", "b"]
    assert sum(f"base_layer.{row.attribute}" in key for key in twin.state_dict()) == 1
    assert twin.owner is not layer.owner


@each
def test_a_merged_copy_shows_the_unmerged_state(row):
    layer = make(row)
    twin = copy.deepcopy(layer)
    twin.merge()
    assert bits(twin.state_dict()[f"base_layer.{row.attribute}"]) == bits(weight_of(row, layer))


# ---- keys -----------------------------------------------------------------------------------------------


def keys_of(row, name, *, file):
    """The names below a layer of an adapter's tensors, in a file or in the state dict."""
    infix = "" if file else f".{name}"
    if row.kind == "embedding":
        return [f"lora_embedding_A{infix}", f"lora_embedding_B{infix}"]
    names = [f"lora_A{infix}.weight", f"lora_B{infix}.weight"]
    return [*names, f"lora_B{infix}.bias"] if row.has_bias else names


@each
def test_keys_of_the_state_dict(row):
    layer = make(row, names=("a", "b"), lora_bias=True)
    base = {f"base_layer.{key}" for key in layer.base_layer.state_dict()}
    adapters = {key for name in "ab" for key in keys_of(row, name, file=False)}
    assert set(layer.state_dict()) == base | adapters
    assert {name for name, _ in layer.named_parameters()} == base | adapters


@each
def test_tensors_are_named_as_in_the_state_dict_and_in_files(row):
    layer = make(row, names=("a", "b"), lora_bias=True)
    state = layer.state_dict(keep_vars=True)
    for name in "ab":
        items = list(layer.tensors(name))
        assert [item.file_suffix for item in items] == keys_of(row, name, file=True)
        assert [item.state_suffix for item in items] == keys_of(row, name, file=False)
        assert all(item.tensor is state[item.state_suffix] for item in items)
        stored = [part for part in layer.stored(name) if part is not None]
        assert [id(part) for part in stored] == [id(item.tensor) for item in items]
        assert [id(part) for part in layer.parameters_of(name)] == [id(item.tensor) for item in items]
    assert list(layer.tensors("not here")) == []


@each
def test_names_and_shapes_are_those_that_the_spec_promises(row):
    layer = make(row, names=())
    for n in range(3):
        spec = spec_for(row, layer.layout, n, lora_bias=row.has_bias)
        layer.add(f"n{n}", blocks_for(spec, seed=n), spec, use_rslora=False)
        found = {item.file_suffix: tuple(item.tensor.shape) for item in layer.tensors(f"n{n}")}
        assert found == {spec.file_names[part]: shape for part, shape in spec.shapes.items()}
        assert sum(p.numel() for p in layer.parameters_of(f"n{n}")) == spec.parameters
        assert sum(p.numel() * p.itemsize for p in layer.parameters_of(f"n{n}")) == spec.bytes


@each
def test_state_dict_goes_back_in(row):
    layer, other = make(row, names=("a",), lora_bias=True), make(row, names=("a",), lora_bias=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(data(row)), layer(data(row)))


# ---- adding and removing --------------------------------------------------------------------------------


@each
def test_a_new_adapter_is_not_active_and_is_on_its_own_memory_once(row):
    layer, x = make(row), data(row)
    before = layer(x)
    spec = spec_for(row, layer.layout, 1, lora_bias=row.has_bias)
    blocks = blocks_for(spec)
    layer.add("b", blocks, spec, use_rslora=True)
    assert torch.equal(layer(x), before)
    assert layer.adapters == ("a", "b")
    assert layer.active_adapters == ["a"]
    assert (layer.r["b"], layer.lora_alpha["b"]) == (spec.r, spec.lora_alpha)
    assert (layer.scaling["b"], layer.use_rslora["b"]) == (spec.scaling, True)
    assert layer.lora_bias == {"a": False, "b": row.has_bias}
    for mine, given in zip(layer.blocks("b"), blocks, strict=True):
        assert torch.equal(mine.A, given.A)
        assert torch.equal(mine.B, given.B)
        assert mine.scaling == given.scaling
    if len(blocks) == 1:
        assert layer.stored("b").A.data_ptr() == blocks[0].A.data_ptr(), "the tensors given become parameters"
        assert layer.stored("b").B.data_ptr() == blocks[0].B.data_ptr()


@each
def test_adding_and_removing_leaves_nothing_behind(row):
    layer = make(row)
    before = Snapshot(layer)
    spec = spec_for(row, layer.layout, 1, dropout=0.3)
    layer.add("b", blocks_for(spec), spec, use_rslora=False)
    layer.remove("b")
    before.assert_same(layer)
    for values in (layer.r, layer.lora_alpha, layer.scaling, layer.use_rslora, layer.lora_bias):
        assert list(values) == ["a"]
    assert list(layer.lora_dropout) == ["a"]
    with pytest.raises(AdapterNameError, match="b"):
        layer.stored("b")


@each
def test_a_name_is_taken_once(row):
    layer = make(row)
    spec = spec_for(row, layer.layout)
    with pytest.raises(AssertionError, match="already"):
        layer.add("a", blocks_for(spec), spec, use_rslora=False)


@each
@pytest.mark.parametrize("training", [False, True])
def test_what_is_added_takes_the_mode_of_the_layer(row, training):
    layer = make(row).train(training)
    spec = spec_for(row, layer.layout, 1, dropout=0.3)
    layer.add("b", blocks_for(spec), spec, use_rslora=False)
    assert {module.training for module in layer.modules()} == {training}


@each
def test_blocks_of_lesser_rank_are_filled_up(row):
    """As factors come from a combination of adapters, whose blocks may differ in rank."""
    layer, x = make(row, torch.float64, names=()), data(row, torch.float64)
    if layer.layout.blocks == 1:
        return
    spec = spec_for(row, layer.layout, 1, torch.float64)
    blocks = blocks_for(spec)
    first = blocks[0]
    blocks[0] = replace(first, A=first.A[:1], B=first.B[:, :1])
    layer.add("a", blocks, spec, use_rslora=False)
    layer.set_adapter("a")
    assert torch.equal(layer.blocks("a")[0].delta(torch.float64), blocks[0].delta(torch.float64))
    assert_forward(row, layer, x, ("a",), torch.float64)


# ---- facts that models look at --------------------------------------------------------------------------


@rows_where(lambda row: row.kind != "parameter")
def test_weight_and_bias_are_the_bases_own(row):
    layer = make(row)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is getattr(layer.base_layer, "bias", None)
    layer.merge()
    assert layer.weight is layer.base_layer.weight


@each
def test_layout_says_the_shapes(row):
    layer = make(row)
    weight = weight_of(row, layer)
    out, inner = layer.layout.shape
    assert layer.out_features == out
    assert layer.layout.make_dense(weight).numel() == out * inner * max(layer.layout.experts, 1)
    layer.merge()
    assert layer.layout.shape == (out, inner)
    assert layer.layout.groups == row.unit


@each
def test_repr_names_the_layer_and_what_it_wraps(row):
    text = repr(make(row))
    assert text.startswith("lora.")
    assert "base_layer" in text


@each
def test_moves_take_everything_along(row):
    layer = make(row, names=("a",), lora_bias=True)
    layer.to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert_forward(row, layer, data(row, torch.bfloat16), ("a",), torch.bfloat16)


@rows_where(lambda row: row.kind == "parameter")
def test_a_module_may_call_something_else_its_bias(row):
    layer, x = make(row), data(row)
    layer.base_layer.bias = True
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)
