"""Whatever hangs on a module, or takes its place, is called and not computed around."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from contract.rows import (
    assert_forward,
    assert_near,
    data,
    each,
    expected,
    make,
    rows_where,
    weight_of,
)

MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
every_mode = pytest.mark.parametrize("mode", list(MODES.values()), ids=list(MODES))
has_modules = rows_where(lambda row: row.has_modules)
wraps = rows_where(lambda row: not row.runs_whole)


@each
@every_mode
def test_a_hook_on_the_base_runs_once_and_changes_no_number(row, mode):
    layer, x, calls = make(row, names=("a", "b"), lora_bias=True), data(row), []
    handle = layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    with mode():
        found = layer(x)
        assert len(calls) == 1
        handle.remove()
        assert_near(found, expected(row, layer, x, ("a", "b")), torch.float32, steps=3)
        layer(x)
    assert len(calls) == 1


@has_modules
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
def test_a_hook_on_a_factor_runs_once_and_changes_no_number(row, where):
    layer, x, calls = make(row, names=("a", "b"), dropout=0.5, lora_bias=True), data(row), []
    handle = getattr(layer, where)["b"].register_forward_hook(lambda *_: calls.append(1))
    found = layer(x)
    assert len(calls) == 1
    handle.remove()
    assert_near(found, expected(row, layer, x, ("a", "b")), torch.float32, steps=3)
    layer(x)
    assert len(calls) == 1


@has_modules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hooked_fp32_factors_over_a_half_base_keep_the_dtype(row, dtype):
    layer, x = make(row, dtype, ("a", "b"), adapter_dtype=torch.float32, lora_bias=True), data(row, dtype)
    seen = []
    layer.lora_A["a"].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    assert_forward(row, layer, x, ("a", "b"), dtype, steps=3)
    assert seen == [torch.float32]


@wraps
def test_a_hook_may_replace_the_output_of_the_base(row):
    layer, x = make(row), data(row)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: output * 2)
    torch.testing.assert_close(layer(x), base * 2 + delta, rtol=1e-4, atol=1e-5)


@has_modules
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
def test_a_hook_may_replace_the_output_of_a_factor(row, where):
    layer, x = make(row), data(row)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    getattr(layer, where)["a"].register_forward_hook(lambda _module, _inputs, output: output * 2)
    torch.testing.assert_close(layer(x), base + delta * 2, rtol=1e-4, atol=1e-5)


@rows_where(lambda row: row.runs_whole)
def test_a_hook_on_a_module_that_runs_whole_sees_the_changed_output(row):
    layer, x = make(row), data(row)
    unhooked, seen = layer(x), []
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    layer(x)
    torch.testing.assert_close(seen, [unhooked])


@wraps
@every_mode
@pytest.mark.parametrize("trained", [False, True])
def test_a_hook_may_keep_what_the_base_gave(row, mode, trained):
    layer, x, kept = make(row, names=("a", "b")), data(row)[:1], []
    x = x[0] if row.stored != "conv" else x  # the product of a matrix is fresh, not a view
    layer.base_layer.requires_grad_(trained)
    wanted = layer.base_layer(x).clone()
    layer.base_layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with mode():
        out = layer(x)
    assert torch.equal(kept[0], wanted)
    assert not torch.equal(out, wanted)


@wraps
def test_a_hook_for_all_modules_may_keep_it_too(row):
    layer, x, kept = make(row), data(row), {}
    wanted = layer.base_layer(x).clone()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, output: kept.setdefault(module, output)
    )
    try:
        with torch.no_grad():
            layer(x)
    finally:
        hook.remove()
    assert torch.equal(kept[layer.base_layer], wanted)


def same_as(module, changes):
    """Let an object be of a subclass of its class."""
    module.__class__ = type(f"Own{type(module).__name__}", (type(module),), changes)


@wraps
def test_a_subclass_of_the_base_is_called(row):
    layer, x = make(row), data(row)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    parent = type(layer.base_layer)
    same_as(layer.base_layer, {"forward": lambda self, x: 2 * parent.forward(self, x)})
    torch.testing.assert_close(layer(x), 2 * base + delta, rtol=1e-4, atol=1e-5)


@wraps
@every_mode
def test_an_output_that_a_subclass_keeps_is_not_written_to(row, mode):
    layer, x = make(row), data(row)
    kept = layer.base_layer(x).detach()
    wanted, copied = layer(x), kept.clone()
    same_as(layer.base_layer, {"forward": lambda self, x: kept})
    with mode():
        torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(kept, copied)


@wraps
def test_a_replaced_forward_is_called(row):
    layer, x = make(row), data(row)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    old = layer.base_layer.forward
    layer.base_layer.forward = lambda x: old(x) * 3
    torch.testing.assert_close(layer(x), base * 3 + delta, rtol=1e-4, atol=1e-5)


class Wrapper(nn.Module):
    """What takes a module's place, as sharding and checkpointing do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


@wraps
@every_mode
def test_a_wrapper_that_takes_the_bases_place_is_called(row, mode):
    layer, x = make(row, names=("a", "b")), data(row)
    wanted = layer(x)
    layer.base_layer = Wrapper(layer.base_layer)
    with mode():
        torch.testing.assert_close(layer(x), wanted)
    assert layer.base_layer.calls == 1
    layer.enable_adapters(False)
    layer(x)
    assert layer.base_layer.calls == 2


@has_modules
@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
def test_a_parametrisation_of_a_factor_acts(row, where):
    class Twice(nn.Module):
        def forward(self, W):
            return W * 2

    layer, x = make(row), data(row)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    parametrize.register_parametrization(getattr(layer, where)["a"], "weight", Twice())
    torch.testing.assert_close(layer(x), base + delta * 2, rtol=1e-4, atol=1e-5)


@each
def test_hooks_on_the_layer_itself_see_the_whole(row):
    layer, x, seen = make(row), data(row), []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert layer(x) is seen[0]
    assert weight_of(row, layer).grad is None
