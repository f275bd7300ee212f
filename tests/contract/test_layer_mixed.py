"""A batch whose samples go through different adapters: each sample as if it ran alone, whatever kind the layer is of."""

from __future__ import annotations

import pytest
import torch

from contract.rows import ROWS, data, each, expected, make, rows_where
from lorakit.errors import UnsupportedError
from lorakit.layers import choosing

NAMES = ("a", "b", "c")
IDS = (2, -1, 0, 1, 0, -1)  # places in NAMES; -1 is the base alone
TABLE = [row for row in ROWS if not row.runs_whole]
mixes = pytest.mark.parametrize("row", TABLE, ids=str)


def six(row, dtype=torch.float32):
    """Six samples."""
    x = data(row, dtype)
    return torch.cat([x, x.flip(0) * (0.5 if x.is_floating_point() else 1)])


def mixed(layer, x, ids=IDS, names=NAMES):
    with choosing(layer.owner, names, ids):
        return layer(x)


def names_of(number):
    return () if number < 0 else (NAMES[number],)


@mixes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_each_sample_as_alone(row, dtype, lora_bias):
    layer, x = make(row, dtype, NAMES, lora_bias=lora_bias), six(row, dtype)
    with torch.no_grad():
        found = mixed(layer, x)
    assert found.dtype == dtype
    for sample, number in enumerate(IDS):
        y, size = expected(row, layer, x[sample : sample + 1], names_of(number))
        error = (found[sample].double() - y[0]).abs()
        assert (error <= 5 * torch.finfo(dtype).eps * size[0]).all(), f"sample {sample}"


@mixes
def test_fp32_adapters_over_a_half_base(row):
    layer = make(row, torch.bfloat16, NAMES, adapter_dtype=torch.float32, lora_bias=True)
    x = six(row, torch.bfloat16)
    found = mixed(layer, x)
    assert found.dtype == torch.bfloat16
    for sample, number in enumerate(IDS):
        y, size = expected(row, layer, x[sample : sample + 1], names_of(number))
        assert ((found[sample].double() - y[0]).abs() <= 4 * torch.finfo(torch.bfloat16).eps * size[0]).all()


@mixes
@pytest.mark.parametrize("bad", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_what_one_adapter_holds_reaches_no_sample_of_another(row, bad, training):
    layer, x = make(row, names=NAMES, lora_bias=True), six(row)
    with torch.no_grad():
        wanted = mixed(layer, x)
        for part in layer.stored(bad):
            if part is not None:
                part.fill_(float("nan"))
    x = x.requires_grad_(training) if x.is_floating_point() else x
    with torch.set_grad_enabled(training):
        found = mixed(layer, x)
    others = [sample for sample, number in enumerate(IDS) if names_of(number) != (bad,)]
    torch.testing.assert_close(found[others], wanted[others])
    if training:
        found[others].square().sum().backward()
        assert x.grad is None or x.grad[others].isfinite().all()
        for name in NAMES:
            if name != bad:
                assert all(p.grad.isfinite().all() for p in layer.parameters_of(name))


@mixes
def test_samples_of_the_base_are_the_bases_bit_for_bit(row):
    layer, x = make(row, names=NAMES), six(row)
    with torch.no_grad():
        found, wanted = mixed(layer, x), layer.base_layer(x)
        assert torch.equal(mixed(layer, x, [-1] * 6), wanted)
    for sample, number in enumerate(IDS):
        assert torch.equal(found[sample], wanted[sample]) == (number < 0)


@mixes
def test_gradients_are_those_of_each_adapters_own_samples(row):
    layer, x = make(row, torch.float64, NAMES, lora_bias=True), six(row, torch.float64)
    layer.base_layer.requires_grad_(False)
    x = x.requires_grad_() if x.is_floating_point() else x
    direction = torch.randn_like(layer.base_layer(x))
    with torch.enable_grad():
        (mixed(layer, x) * direction).sum().backward()
    found = {name: [p.grad for p in layer.parameters_of(name)] for name in NAMES}
    found_x = x.grad
    layer.zero_grad(set_to_none=True)
    own_x = torch.zeros_like(x)
    for number, name in enumerate(NAMES):
        samples = [sample for sample, mine in enumerate(IDS) if mine == number]
        part = x.detach()[samples]
        part = part.requires_grad_() if part.is_floating_point() else part
        layer.set_adapter(name)
        (layer(part) * direction[samples]).sum().backward()
        own_x[samples] = part.grad if part.requires_grad else 0
        for got, want in zip(found[name], layer.parameters_of(name), strict=True):
            torch.testing.assert_close(got, want.grad, rtol=1e-9, atol=1e-11)
    if found_x is not None:
        part = x.detach()[[1, 5]].requires_grad_()
        (layer.base_layer(part) * direction[[1, 5]]).sum().backward()
        own_x[[1, 5]] = part.grad
        torch.testing.assert_close(found_x, own_x, rtol=1e-9, atol=1e-11)


@rows_where(lambda row: row.drops)
def test_each_sample_has_the_dropout_of_its_own_adapter(row):
    layer, x = make(row, names=NAMES, dropout=0.5), six(row)
    layer.lora_dropout["c"] = torch.nn.Identity()
    layer.train()
    with torch.no_grad():
        draws = torch.stack([mixed(layer, x) for _ in range(300)])
        layer.eval()
        wanted = mixed(layer, x)
    spread = draws.std(dim=0).flatten(1)
    for sample, number in enumerate(IDS):
        assert (spread[sample].max() > 1e-3) == (number >= 0 and NAMES[number] != "c"), f"sample {sample}"
    error = (draws.mean(dim=0) - wanted).abs() / (draws.std(dim=0) / 300**0.5).clamp(min=1e-5)
    assert error.max() < 5


@each
def test_a_call_may_choose_one_adapter_for_all(row):
    layer, x = make(row, names=NAMES), data(row)
    layer.set_adapter("a")
    wanted = {}
    for name in NAMES:
        layer.set_adapter(name)
        wanted[name] = layer(x)
    for name in NAMES:
        with choosing(layer.owner, (name,), None):
            torch.testing.assert_close(layer(x), wanted[name])
    with choosing(layer.owner, (), None):
        assert torch.equal(layer(x), layer.get_base_layer()(x))


@rows_where(lambda row: row.runs_whole)
def test_what_runs_whole_does_not_see_samples(row):
    layer, x = make(row, names=NAMES), data(row)
    with pytest.raises(UnsupportedError, match=r"for each sample.*one adapter for the whole batch"):
        mixed(layer, x, (0, -1, 1))
    torch.testing.assert_close(mixed(layer, x, (-1, -1, -1), ()), layer.get_base_layer()(x))
