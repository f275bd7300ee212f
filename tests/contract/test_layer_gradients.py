"""Gradients of every kind of layer are those of the plain composition in fp64."""

from __future__ import annotations

import copy

import pytest
import torch

from contract.rows import (
    adapter_output,
    as_channels,
    data,
    each,
    make,
    of_delta,
    rows_where,
    weight_of,
)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), list(TOLERANCES.items()), ids=str)


def inputs_of(row, layer, x, names, *, base):
    """Whatever wants a gradient: x, the base's parameters, and A, B and bias of each adapter."""
    inputs = [x] if x.requires_grad else []
    if base:
        inputs += [weight_of(row, layer)]
        inputs += [layer.base_layer.bias] if getattr(layer.base_layer, "bias", None) is not None else []
    return inputs + [part for name in names for part in layer.stored(name) if part is not None]


def wanted_gradients(row, layer, x, names, direction, *, base):
    """The same by torch's own modules, in fp64."""
    wide_x = x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    module = layer.get_base_layer()
    twin, plain = copy.deepcopy(module).double().requires_grad_(base), of_delta(module)
    inputs = [wide_x] if wide_x.requires_grad else []
    inputs += list(twin.parameters()) if base else []
    y = twin(wide_x)
    for name in names:
        A, B, bias = (
            part if part is None else part.detach().double().requires_grad_() for part in layer.stored(name)
        )
        inputs += [part for part in (A, B, bias) if part is not None]
        y = y + layer.scaling[name] * adapter_output(row, plain, wide_x, A, B)
        y = y if bias is None else y + as_channels(row, layer.scaling[name] * bias, y)
    return torch.autograd.grad((y * direction.double()).sum(), inputs)


@each
@every_dtype
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")], ids=len)
@pytest.mark.parametrize("base", [False, True], ids=["frozen", "trained"])
def test_gradients_are_those_of_the_plain_composition(row, dtype, tolerance, names, base):
    layer = make(row, dtype, names, lora_bias=True)
    layer.get_base_layer().requires_grad_(base)
    x = data(row, dtype)
    x = x.requires_grad_() if x.is_floating_point() else x
    y = layer(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = torch.autograd.grad((y * direction).sum(), inputs_of(row, layer, x, names, base=base))
    wanted = wanted_gradients(row, layer, x, names, direction, base=base)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert want.abs().max() > 0
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@each
def test_fp32_adapters_over_a_half_base_get_fp32_gradients(row):
    layer = make(row, torch.bfloat16, ("a", "b"), adapter_dtype=torch.float32, lora_bias=True)
    layer.get_base_layer().requires_grad_(False)
    x = data(row, torch.bfloat16)
    y = layer(x)
    found = torch.autograd.grad(y.float().sum(), inputs_of(row, layer, x, ("a", "b"), base=False))
    wanted = wanted_gradients(row, layer, x, ("a", "b"), torch.ones(y.shape), base=False)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() <= 4e-2 * want.abs().max()


@each
def test_the_inactive_and_the_merged_get_no_gradient(row):
    layer, x = make(row, names=("a", "b")), data(row)
    layer.set_adapter("b")
    layer(x).square().sum().backward()
    assert all(p.grad is None for p in layer.parameters_of("a"))
    assert all(p.grad is not None for p in layer.parameters_of("b"))
    layer.zero_grad(set_to_none=True)
    layer.merge()
    layer(x).square().sum().backward()
    assert all(p.grad is None for name in "ab" for p in layer.parameters_of(name))


@each
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_gets_none_and_the_other_its_own(row, frozen):
    layer, x = make(row, torch.float64), data(row, torch.float64)
    layer.get_base_layer().requires_grad_(False)
    stored = layer.stored("a")
    wanted = dict(zip("AB", torch.autograd.grad(layer(x).square().sum(), stored[:2]), strict=True))
    getattr(stored, frozen).requires_grad_(False)
    layer(x).square().sum().backward()
    (other,) = {"A", "B"} - {frozen}
    assert getattr(stored, frozen).grad is None
    torch.testing.assert_close(getattr(stored, other).grad, wanted[other], rtol=1e-10, atol=1e-12)


@rows_where(lambda row: row.name in {"embedding_padded", "embedding_by_freq", "embedding_scaled"})
def test_the_padding_gets_no_gradient(row):
    layer, x = make(row), data(row)
    layer(x).square().sum().backward()
    padding = layer.base_layer.padding_idx
    gradient = layer.lora_embedding_A["a"].grad
    assert (x == padding).any()
    assert gradient[:, padding].abs().max() == 0
    others = [token for token in x.unique().tolist() if token != padding]
    assert (gradient[:, others].abs().amax(dim=0) > 0).all()


@each
def test_gradients_accumulate_and_keep_the_strides_of_their_parameters(row):
    layer, x = make(row, names=("a",), lora_bias=True), data(row)
    layer(x).square().sum().backward()
    once = [p.grad.clone() for p in layer.parameters_of("a")]
    layer(x).square().sum().backward()
    for parameter, first in zip(layer.parameters_of("a"), once, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(parameter.grad, 2 * first)


@rows_where(lambda row: row.drops)
def test_dropout_of_backward_is_that_of_forward(row):
    """The output is linear in B, so its gradient along B gives the output's own change, dropped elements and all."""
    layer, x = make(row, torch.float64, dropout=0.5), data(row, torch.float64)
    layer.base_layer.requires_grad_(False)
    layer.train()
    torch.manual_seed(4)
    y = layer(x)
    direction = torch.randn_like(y)
    B = layer.stored("a").B
    (gradient,) = torch.autograd.grad((y * direction).sum(), B)
    change = ((y - layer.base_layer(x)) * direction).sum().item()
    assert (gradient * B).sum().item() == pytest.approx(change, rel=1e-10)
