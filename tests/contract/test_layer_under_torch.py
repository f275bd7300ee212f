"""Every kind of layer gives the same numbers under torch's machinery as without it."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from contract.rows import (
    adapter_output,
    as_channels,
    data,
    each,
    expected,
    make,
    of_delta,
    rows_where,
    weight_of,
)

NAMES = ("a", "b")


def adapters(layer, names=NAMES):
    """The parameters of adapters by their names below the layer."""
    return {item.state_suffix: item.tensor for name in names for item in layer.tensors(name)}


def gradients(layer, output):
    parameters = adapters(layer)
    output.float().square().sum().backward()  # reentrant checkpointing knows no torch.autograd.grad
    found = {name: p.grad for name, p in parameters.items()}
    layer.zero_grad(set_to_none=True)
    return found


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * size, msg=name)


def frozen(row, dtype=torch.float32, **changes):
    """A layer as it is trained: the base has no gradients."""
    layer = make(row, dtype, NAMES, lora_bias=True, **changes)
    layer.get_base_layer().requires_grad_(False)
    return layer, data(row, dtype)


# ---- compile --------------------------------------------------------------------------------------------


@rows_where(lambda row: row.name != "image_causal_groups")  # whose double for a call has other groups
def test_compiles_to_one_graph(row):
    layer, x = frozen(row)
    wanted = layer(x)
    wanted_gradients = gradients(layer, wanted)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert_same(gradients(layer, found), wanted_gradients)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), wanted.detach(), rtol=1e-5, atol=1e-5)


# ---- autocast -------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(row, dtype):
    layer, x = frozen(row)
    wide, _ = expected(row, layer, x, NAMES)
    wanted_gradients = gradients(layer, layer(x))
    with torch.autocast("cpu", dtype=dtype):
        found, base = layer(x), layer.get_base_layer()(x)
    assert found.dtype == base.dtype
    assert (found.double() - wide).abs().max() <= 4 * torch.finfo(dtype).eps * wide.abs().max()
    for name, gradient in gradients(layer, found).items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted_gradients[name]).norm() <= 0.05 * wanted_gradients[name].norm(), name


@each
def test_autocast_to_another_half_precision_than_the_bases(row):
    layer, x = frozen(row, torch.bfloat16, adapter_dtype=torch.float32)
    wide, _ = expected(row, layer, x, NAMES)
    with torch.autocast("cpu", dtype=torch.float16):
        found, base = layer(x), layer.get_base_layer()(x)
    assert found.dtype == base.dtype
    assert (found.double() - wide).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * wide.abs().max()


@each
def test_autocast_of_a_merged_layer(row):
    layer, x = frozen(row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = layer(x)
        layer.merge()
        merged = layer(x)
    assert merged.dtype == unmerged.dtype
    assert (merged - unmerged).abs().max() <= 0.04 * unmerged.abs().max()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merging_inside_autocast_is_as_exact_as_outside(row, dtype):
    outside, _ = frozen(row, torch.bfloat16, adapter_dtype=torch.float32)
    inside, _ = frozen(row, torch.bfloat16, adapter_dtype=torch.float32)
    outside.merge()
    wanted = outside.get_delta_weight("a")
    with torch.autocast("cpu", dtype=dtype):
        inside.merge()
        assert torch.equal(inside.get_delta_weight("a"), wanted)
    for mine, other in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(mine, other)


# ---- checkpointing --------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(row, reentrant, dropout):
    layer, x = frozen(row, dropout=dropout)
    layer.train()
    start = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient

    def run(start, x):
        return layer(x + start if x.is_floating_point() else x) + start

    def seeded(call):
        torch.manual_seed(5)
        return call()

    wanted = gradients(layer, seeded(lambda: run(start, x)))
    found = gradients(layer, seeded(lambda: checkpoint(run, start, x, use_reentrant=reentrant)))
    assert_same(found, wanted)


# ---- function transforms --------------------------------------------------------------------------------


@each
def test_func_grad(row):
    layer, x = frozen(row)
    values = {name: p.detach() for name, p in adapters(layer).items()}

    def loss(values, x):
        return functional_call(layer, values, (x,)).square().sum()

    assert_same(grad(loss)(values, x), gradients(layer, layer(x)))


@each
def test_vmap_over_inputs(row):
    layer, x = frozen(row)
    xs = torch.stack([x, x.flip(0), x.roll(1, 0)])
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            found = vmap(layer)(xs)
            wanted = torch.stack([layer(one) for one in xs])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each
def test_vmap_over_adapters(row):
    """Several sets of factors at once on one input: an ensemble."""
    layer, x = frozen(row)
    values = {name: torch.stack([p.detach(), -2 * p.detach()]) for name, p in adapters(layer).items()}

    def call(values):
        return functional_call(layer, values, (x,))

    for context in (torch.enable_grad, torch.no_grad):
        with context():
            found = vmap(call)(values)
            wanted = torch.stack([call({name: p[n] for name, p in values.items()}) for n in range(2)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use
def test_forward_mode(row):
    layer, x = frozen(row, torch.float64)
    values = {name: p.detach() for name, p in adapters(layer).items()}
    directions = {name: torch.randn_like(p) for name, p in values.items()}

    def call(values):
        return functional_call(layer, values, (x,))

    _, found = jvp(call, (values,), (directions,))
    step = 1e-6
    ahead, behind = (
        call({name: p + sign * step * directions[name] for name, p in values.items()}) for sign in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


# ---- second derivatives ---------------------------------------------------------------------------------


def twice(function, inputs):
    """The gradient of a projection of the gradient."""
    first = torch.autograd.grad(function(inputs).pow(3).sum(), inputs, create_graph=True)
    torch.manual_seed(6)
    projected = sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in first)  # whatever its strides
    return torch.autograd.grad(projected, inputs)


@each
def test_second_derivatives_are_those_of_the_plain_composition(row):
    layer, x = frozen(row, torch.float64)
    x = x.requires_grad_() if x.is_floating_point() else x
    own = list(adapters(layer).values())
    inputs = ([x] if x.requires_grad else []) + own
    found = twice(lambda _: layer(x), inputs)
    base, plain = layer.get_base_layer(), of_delta(layer.get_base_layer())

    def composed(_):
        y = base(x)
        for name in NAMES:
            A, B, bias = layer.stored(name)
            y = y + layer.scaling[name] * adapter_output(row, plain, x, A, B)
            y = y if bias is None else y + as_channels(row, layer.scaling[name] * bias, y)
        return y

    wanted = twice(composed, inputs)
    for got, want in zip(found, wanted, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


# ---- modes ----------------------------------------------------------------------------------------------


@each
def test_inference_mode(row):
    layer, x = frozen(row)
    wanted = layer(x)
    with torch.inference_mode():
        found = layer(x)
        assert found.is_inference()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        layer.merge()
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer(x), wanted)


@each
def test_what_is_merged_in_inference_mode_can_be_trained_after_unmerging(row):
    layer, x = frozen(row)
    with torch.inference_mode():
        layer.merge()
        layer.unmerge()
    assert all(g is not None for g in gradients(layer, layer(x)).values())
    assert not weight_of(row, layer).is_inference()


@each
def test_on_meta(row):
    layer, x = frozen(row)
    y = layer(x)
    layer.to("meta")
    found = layer(x.to("meta"))
    assert found.is_meta
    assert found.shape == y.shape
