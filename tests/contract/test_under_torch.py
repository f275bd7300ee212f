"""A model with adapters gives the same numbers under torch's machinery as without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from lorakit.layers import LoraLayer
from models import Tiny, another, ids, logits, tiny, with_adapter


def trained(**changes):
    return with_adapter(tiny(), target_modules=["q_proj", "v_proj", "c_fc"], **changes)


def gradients(model, output):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    output.square().mean().backward()  # reentrant checkpointing knows no torch.autograd.grad
    found = {name: p.grad for name, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * 0.1, msg=name)


@pytest.mark.parametrize("adapters", [1, 2])
def test_compile_equals_eager(adapters):
    model = trained()
    if adapters == 2:
        another(model, "other")
        model.set_adapter(["default", "other"])
    wanted = model(ids())
    inner = model.get_base_model()
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    found = compiled(ids())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same(gradients(inner, found), gradients(inner, wanted))


def test_compiled_model_follows_changes_of_state():
    model = trained()
    another(model, "other")
    compiled = torch.compile(model.get_base_model(), backend="eager")
    for change in (
        lambda: None,
        lambda: model.set_adapter("other"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
    ):
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids()), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(reentrant, dropout):
    model = trained(lora_dropout=dropout).train()
    inner = model.get_base_model()

    def run(call):
        torch.manual_seed(5)
        x = inner.embed(ids()).detach().requires_grad_()
        for layer in inner.layers:
            x = call(layer, x)
        return x

    wanted = gradients(inner, run(lambda layer, x: layer(x)))
    found = gradients(inner, run(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)))
    assert_same(found, wanted)


def through_modules(model):
    """The same model, made to call every module: what plain composition gives."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapters:
                module.lora_A[name].register_forward_hook(lambda *_: None)
    return twin


def test_autocast_bf16():
    model = trained()
    twin = through_modules(model)
    wide = model(ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = model(ids()), twin(ids())
    assert found.dtype == wanted.dtype == torch.bfloat16
    scale = wide.abs().max()
    assert (found.float() - wide).abs().max() <= 0.03 * scale
    assert (wanted.float() - wide).abs().max() <= 0.03 * scale
    mine, plain = gradients(model, found.float()), gradients(twin, wanted.float())
    for name, gradient in plain.items():
        assert mine[name].dtype == torch.float32
        assert (mine[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_func_grad_and_vmap():
    model = trained().get_base_model()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, batch):
        return functional_call(model, values, (batch,)).square().mean()

    assert_same(grad(loss)(parameters, ids()), gradients(model, model(ids())))
    batches = torch.stack([ids(seed) for seed in range(3)])
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, batches)
    for n, batch in enumerate(batches):
        assert_same({name: value[n] for name, value in each.items()}, gradients(model, model(batch)))


def test_deepcopy_of_a_model_is_its_own():
    model = trained()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    twin.merge_adapter()
    twin.unmerge_adapter()
    twin.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert isinstance(twin.get_base_model(), Tiny)
    assert torch.equal(logits(twin), logits(tiny()))
    assert list(model.peft_config) == ["default"]
