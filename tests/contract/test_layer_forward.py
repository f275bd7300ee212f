"""What a layer computes: its base plus the sum of its active adapters, whatever kind it is of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from contract.rows import (
    IN,
    KINDS,
    OUT,
    ROWS,
    WORDS,
    adapter_output,
    assert_forward,
    data,
    dense_delta,
    each,
    each_with_bias,
    every_dtype,
    make,
    of_delta,
    rows_where,
    run,
    weight_of,
)
from lorakit.layers import kind_of

HALF = (torch.bfloat16, torch.float16)
has_modules = rows_where(lambda row: row.has_modules)


def test_each_kind_has_a_row_here():
    assert {row.kind for row in ROWS} == set(KINDS)


@each
def test_kind_is_found_by_the_module(row):
    found = kind_of(row.base(True))
    assert (found and found.name) == (None if row.kind == "parameter" else row.kind)


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(3), nn.ConvTranspose1d(2, 2, 1), nn.EmbeddingBag(3, 3)], ids=repr
)
def test_other_modules_are_of_no_kind(module):
    assert kind_of(module) is None


# ---- the sum --------------------------------------------------------------------------------------------


@each_with_bias
@every_dtype
@pytest.mark.parametrize("names", [(), ("a",), ("a", "b"), ("a", "b", "c")], ids=len)
def test_forward_is_base_plus_sum(row, bias, dtype, names):
    layer, x = make(row, dtype, names, bias=bias), data(row, dtype)
    with torch.no_grad():
        assert_forward(row, layer, x, names, dtype, steps=2)
        assert torch.equal(layer(x), layer(x))
        if names:
            assert (layer(x) - layer.get_base_layer()(x)).abs().max() > 0.3


@each
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")], ids=len)
def test_it_is_the_same_sum_where_gradients_are_recorded(row, names):
    layer, x = make(row, names=names, lora_bias=True), data(row)
    assert_forward(row, layer, x, names, torch.float32, steps=2)
    layer.get_base_layer().requires_grad_(False)
    assert_forward(row, layer, x, names, torch.float32, steps=2)


@each
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fp32_adapters_over_a_half_base_keep_the_dtype_of_the_base(row, dtype):
    layer = make(row, dtype, ("a", "b"), adapter_dtype=torch.float32, lora_bias=True)
    assert_forward(row, layer, data(row, dtype), ("a", "b"), dtype, steps=2)


@each
def test_half_adapters_over_an_fp32_base(row):
    layer = make(row, torch.float32, ("a",), adapter_dtype=torch.bfloat16)
    wanted_steps = 2 if not row.runs_whole else 2 * torch.finfo(torch.bfloat16).eps / torch.finfo().eps
    assert_forward(row, layer, data(row), ("a",), torch.float32, steps=wanted_steps)


@rows_where(lambda row: row.has_bias)
@every_dtype
def test_bias_of_B_is_scaled_and_added(row, dtype):
    layer = make(row, dtype, names=("a", "b"), lora_bias=True)
    assert all(layer.stored(name).bias is not None for name in "ab")
    assert_forward(row, layer, data(row, dtype), ("a", "b"), dtype)


@each
def test_nothing_given_is_written_to(row):
    layer, x = make(row, names=("a", "b")), data(row)
    kept = x.clone()
    with torch.no_grad():
        layer(x)
    assert torch.equal(x, kept)


# ---- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        pytest.param(row, shape, id=f"{row}-{shape}")
        for row in ROWS
        for shape in ((), (1,), (4,), (0, 3), (2, 3, 4))
        if (row.kind in {"linear", "conv1d", "embedding"} or row.name == "matrix")
        and (row.kind, shape) != ("conv1d", ())  # transformers' Conv1D takes no vector
    ],
)
def test_any_leading_shape(row, shape):
    layer = make(row)
    x = torch.randint(WORDS, shape) if row.kind == "embedding" else torch.randn(*shape, IN)
    found = layer(x)
    assert tuple(found.shape) == (*shape, OUT)
    if x.numel():
        assert_forward(row, layer, x, ("a",), torch.float32)


@rows_where(lambda row: row.kind == "conv")
def test_an_empty_batch_of_a_convolution(row):
    layer, x = make(row, lora_bias=True), data(row)[:0]
    assert layer(x).shape == layer.base_layer(x).shape


@rows_where(
    lambda row: row.kind == "conv" and row.name != "volume_groups"
)  # torch replicates no unbatched one
def test_a_convolution_without_a_batch(row):
    layer, x = make(row, lora_bias=True), data(row)[0]
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@each
def test_x_that_is_not_contiguous(row):
    layer, x = make(row), data(row)
    x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not x.is_contiguous()
    assert_forward(row, layer, x, ("a",), torch.float32)


@rows_where(lambda row: row.name.startswith("image"))
def test_channels_last_stays_so(row):
    layer = make(row).to(memory_format=torch.channels_last)
    x = data(row).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_forward(row, layer, x, ("a",), torch.float32)
        assert layer(x).stride() == layer.base_layer(x).stride()


@rows_where(lambda row: row.kind == "embedding")
def test_ids_of_32_bits(row):
    layer, x = make(row), data(row)
    assert torch.equal(layer(x.int()), layer(x))


# ---- scaling, active, disabled --------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_scaling_is_read_at_each_forward(row, kind):
    layer, x = make(row), data(row)
    with torch.no_grad():
        base, with_it = layer.get_base_layer()(x), layer(x)
        layer.scaling["a"] = kind(layer.scaling["a"] * -2)
        torch.testing.assert_close(layer(x) - base, -2 * (with_it - base), rtol=1e-4, atol=1e-5)
        layer.scaling["a"] = kind(0.0)
        torch.testing.assert_close(layer(x), base)


@each
def test_only_the_active_act(row):
    layer, x = make(row, names=("a", "b", "c")), data(row)
    layer.set_adapter(["c", "a", "unknown here"])
    assert layer.active_adapters == ["c", "a", "unknown here"]
    assert_forward(row, layer, x, ("a", "c"), torch.float32)
    flags = {name: {p.requires_grad for p in layer.parameters_of(name)} for name in "abc"}
    assert flags == {"a": {True}, "b": {False}, "c": {True}}
    layer.set_adapter("b", inference_mode=True)
    assert_forward(row, layer, x, ("b",), torch.float32)
    assert not any(p.requires_grad for name in "abc" for p in layer.parameters_of(name))


@each
@every_dtype
def test_disabled_is_the_base_bit_for_bit(row, dtype):
    layer, x = make(row, dtype, ("a", "b")), data(row, dtype)
    wanted = layer.get_base_layer()(x)
    layer.enable_adapters(False)
    assert layer.disable_adapters
    assert torch.equal(layer(x), wanted)
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), wanted)


@each
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_that_is_no_change_changes_no_bit(row, training):
    layer, x = make(row, names=("a", "b"), dropout=0.5).train(training), data(row)
    with torch.no_grad():
        for name in "ab":
            layer.stored(name).B.zero_()
        if row.runs_whole and row.unit > 1:  # as an ungrouped convolution, which sums in another order
            torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
        else:
            assert torch.equal(layer(x), layer.get_base_layer()(x))


@each
@pytest.mark.parametrize("name", ["a", "b"])
def test_removing_leaves_the_others(row, name):
    layer, x = make(row, names=("a", "b")), data(row)
    layer.remove(name)
    (left,) = {"a", "b"} - {name}
    assert layer.adapters == (left,)
    assert layer.active_adapters == [left]
    assert_forward(row, layer, x, (left,), torch.float32)
    layer.remove(left)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert set(layer.state_dict()) == {f"base_layer.{key}" for key in layer.get_base_layer().state_dict()}


# ---- dropout --------------------------------------------------------------------------------------------

DRAWS = 3000
SEES_TWICE = (
    "image_groups_reflect",
    "volume_groups",
)  # the padding shows an element again in the same window


def many(x):
    """Each sample DRAWS times."""
    return x.repeat_interleave(DRAWS, dim=0)


@rows_where(lambda row: row.drops)
def test_dropout_is_unbiased_in_training_and_off_in_eval(row):
    layer, x = make(row, dropout=0.3), data(row)[:1]
    with torch.no_grad():
        base = layer.base_layer(x)
        wanted = (layer(x) - base)[0]
        assert torch.equal(layer(x), layer(x))
        layer.train()
        draws = layer(many(x)) - layer.base_layer(many(x))
    spread = draws.std(dim=0)
    assert spread.max() > 0.05
    error = (draws.mean(dim=0) - wanted).abs() / (spread / DRAWS**0.5).clamp(min=1e-6)
    assert error.max() < 4.5  # standard errors of the mean


@rows_where(lambda row: row.drops and row.name not in SEES_TWICE)
@pytest.mark.parametrize("p", [0.2, 0.6])
def test_dropout_drops_each_element_by_itself(row, p):
    """So the variance is the sum over x of its squared share, times p / (1 - p)."""
    layer, x = make(row, dropout=p), data(row)[:1]
    layer.train()
    plain = of_delta(layer.base_layer)
    A, B, _ = (None if part is None else part.detach().double() for part in layer.stored("a"))
    squares = run(row, plain, x.double().square(), dense_delta(row, A, B).square())[0]
    wanted = layer.scaling["a"] ** 2 * squares * p / (1 - p)
    with torch.no_grad():
        draws = layer(many(x)) - layer.base_layer(many(x))
    found = draws.double().var(dim=0)
    matters = wanted > 0.02 * wanted.max()
    # over all elements of the output: their average is far surer than each of them
    assert (found[matters] / wanted[matters]).mean().item() == pytest.approx(1, abs=0.05)


@rows_where(lambda row: not row.drops)
def test_dropout_does_not_act_on_ids_and_parameters(row):
    layer, x = make(row, dropout=0.5), data(row)
    wanted = layer(x)
    assert torch.equal(layer.train()(x), wanted)


def test_the_reference_of_an_embedding_is_its_dense_delta():
    """The one row whose reference is built of two steps."""
    for row in (row for row in ROWS if row.kind == "embedding"):
        layer = make(row, torch.float64)
        plain, x = of_delta(layer.base_layer), data(row)
        A, B, _ = layer.stored("a")
        torch.testing.assert_close(
            adapter_output(row, plain, x, A, B), run(row, plain, x, dense_delta(row, A, B))
        )
        assert weight_of(row, layer).shape == dense_delta(row, A, B).shape
