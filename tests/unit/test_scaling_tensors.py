"""A scaling that is a 0-d tensor, as hot-swapping on compiled models needs it, gives what the number gives, everywhere."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call, grad

from lorakit import prepare_model_for_compiled_hotswap, rescale_adapter_scale
from lorakit.ops import Term, lora_add, lora_linear, lora_reference
from models import another, bits, ids, logits, registry_of, tiny, with_adapter
from zoo import ATTENTION, EXPERTS, KINDS, adapted_zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def with_numbers(**changes):
    """A zoo with two active adapters, of scalings that no binary fraction is; on modules alone."""
    changes = {"target_modules": KINDS, "target_parameters": None, **changes}
    model = adapted_zoo(lora_alpha=7, use_rslora=True, **changes)
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    model.set_adapter(["default", "other"])
    return model


def with_tensors():
    model = with_numbers()
    prepare_model_for_compiled_hotswap(model)
    return model


def plain(dtype=torch.float32, **changes):
    """Linears alone, whose forward is one node."""
    model = with_adapter(tiny(dtype=dtype), lora_alpha=7, use_rslora=True, r=3, **changes)
    another(model, "other", r=2, lora_alpha=3)
    model.set_adapter(["default", "other"])
    return model


def gradients(model):
    model(ids()).square().mean().backward()
    return {name: bits(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def of_weights(model):
    return {name: bits(p) for name, p in model.named_parameters()}


def merged(model):
    model.merge_adapter()
    found = of_weights(model)
    model.unmerge_adapter()
    return found


def hooked(model):
    for layer in registry_of(model).layers.values():
        for module in layer.modules_of("default"):
            module.register_forward_hook(lambda *_: None)
    return bits(logits(model))


def under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return bits(logits(model))


def for_one_call(model):
    with torch.no_grad(), model.base_model.use_adapter("other"):
        return bits(model(ids()))


def transformed(model):
    inner = model.get_base_model()
    values = {name: p.detach() for name, p in inner.named_parameters() if p.requires_grad}
    found = grad(lambda v: functional_call(inner, v, (ids(),)).square().mean())(values)
    return {name: bits(value) for name, value in found.items()}


PATHS = {
    "forward": lambda model: bits(logits(model)),
    "gradients": gradients,
    "merged": merged,
    "merged for good": lambda model: of_weights(model.merge_and_unload()),
    "deltas": lambda model: {p: bits(layer.get_delta_weight("default")) for p, layer in registry_of(model).layers.items()},
    "with hooks": hooked,
    "one adapter for a call": for_one_call,
    "names of the state": lambda model: list(model.state_dict()),
}  # fmt: skip
PLAIN_PATHS = {"autocast": under_autocast, "transforms": transformed}


@pytest.mark.parametrize("path", PATHS)
def test_bit_for_bit(path):
    assert PATHS[path](with_tensors()) == PATHS[path](with_numbers())


@pytest.mark.parametrize("path", [*PATHS, *PLAIN_PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_linears_bit_for_bit(path, dtype, dropout):
    work = {**PATHS, **PLAIN_PATHS}[path]
    if path == "autocast" and dtype is torch.bfloat16:
        dtype = torch.float64
    found = []
    for ready in (False, True):
        model = plain(dtype, lora_dropout=dropout).train(bool(dropout) and path != "transforms")
        if ready:
            prepare_model_for_compiled_hotswap(model)
        torch.manual_seed(5)
        found.append(work(model))
    assert found[0] == found[1]


def test_parameters_and_attention():
    """Where the sum of a weight is rounded in another order."""
    everything = {"target_modules": KINDS + ATTENTION, "target_parameters": EXPERTS}
    numbers, tensors = with_numbers(**everything), with_numbers(**everything)
    prepare_model_for_compiled_hotswap(tensors)
    torch.testing.assert_close(logits(tensors), logits(numbers), rtol=1e-12, atol=1e-12)
    assert merged(tensors) == merged(numbers)
    for model in (numbers, tensors):
        model(ids()).square().mean().backward()
    wanted = dict(numbers.named_parameters())
    for name, parameter in tensors.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-10, atol=1e-12, msg=name)


def test_factors_give_numbers():
    for layer in registry_of(with_tensors()).layers.values():
        assert all(type(block.scaling) is float for block in layer.blocks("default"))


MIXED = [["default", "other"], ["other", "__base__"], ["default", "default"]]


@pytest.mark.parametrize("names", MIXED, ids="+".join)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("build", [plain, with_numbers])
def test_each_sample_its_own_adapter(names, trains, build):
    numbers, tensors = build(), build()
    prepare_model_for_compiled_hotswap(tensors)
    with torch.set_grad_enabled(trains):
        for factor in (1, 0.5, 3):  # stacked factors must not outlive a change of scaling
            with rescale_adapter_scale(numbers, factor), rescale_adapter_scale(tensors, factor):
                wanted = numbers(ids(), adapter_names=names)
                found = tensors(ids(), adapter_names=names)
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_copies_have_scalings_of_their_own():
    model = with_tensors()
    twin = copy.deepcopy(model)
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    output = logits(model)
    for other in (twin, again):
        assert torch.equal(logits(other), output)
        with rescale_adapter_scale(other, 0.0):
            assert torch.equal(logits(model), output)


# ---- the ops ------------------------------------------------------------------------------------------


def parts(scaling, *, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, W, b = draw(5, 6), draw(4, 6), draw(4)
    return x, W, b, [Term(draw(2, 6), draw(4, 2), draw(4) if bias else None, scaling, 0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
def test_ops_take_both(dtype, kept):
    x, W, b, terms = parts(0.7, dtype=dtype)
    other = [terms[0]._replace(scaling=torch.tensor(0.7, dtype=kept))]
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
    for op in (
        lambda terms: lora_linear(x, W, b, terms),
        lambda terms: lora_add(x @ W.T, x, terms),
        lambda terms: lora_reference(x @ W.T, x, terms),
    ):
        torch.testing.assert_close(op(other), op(terms), rtol=tolerance, atol=tolerance)
        assert op(other).dtype == dtype


def test_a_scaling_that_is_differentiated_gets_its_gradient():
    x, W, b, terms = parts(torch.tensor(0.7, requires_grad=True))
    terms[0].A.requires_grad_()
    lora_linear(x, W, b, terms).sum().backward()
    A, B, bias = terms[0].A.detach(), terms[0].B, terms[0].bias
    torch.testing.assert_close(terms[0].scaling.grad, (x @ A.T @ B.T + bias).sum())
    with torch.no_grad():
        wanted = x @ W.T + b + 0.7 * (x @ A.T @ B.T + bias)
        torch.testing.assert_close(lora_linear(x, W, b, terms), wanted)


def test_a_scaling_without_data_stays_one():
    x, W, b, terms = parts(torch.tensor(0.7, device="meta"))
    y = lora_linear(
        x.to("meta"), W.to("meta"), b.to("meta"), [Term(*(t.to("meta") for t in terms[0][:4]), 0.0)]
    )
    assert y.is_meta
    assert y.shape == (5, 4)
