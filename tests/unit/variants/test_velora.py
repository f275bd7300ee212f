"""VeLoRA: forward is plain LoRA's to the bit pattern of its ops; A's gradient is that of a naively projected input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lorakit import LoraConfig, PeftModel, VeloraConfig, get_peft_model
from lorakit.errors import PlanError
from lorakit.ops.velora import (
    Projection,
    group_size,
    mean_direction,
    normalised,
    projected_linear,
    projected_reference,
)
from models import bits, randomise, registry_of, tiny

IN, OUT, R = 12, 10, 3
GROUPS = [1, 3, 5, 12, 20]  # 5 does not divide, 20 are more than there are features
INITS = ["batch_average", "batch_average_once", "random"]


class Only(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(IN, OUT)

    def forward(self, x):
        return self.only(x)


def model_of(dtype=torch.float32, groups=3, scale=1.5, init="batch_average", adapter_dtype=None, **changes):
    torch.manual_seed(0)
    options = VeloraConfig(num_groups=groups, scale=scale, init_type=init)
    config = LoraConfig(r=R, lora_alpha=6, target_modules=["only"], velora_config=options, **changes)
    model = get_peft_model(Only().to(dtype), config)
    generator = torch.Generator().manual_seed(1)
    layer = layer_of(model)
    with torch.no_grad():
        for factor in layer.stored("default")[:2]:
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
    return model.train()


def layer_of(model):
    return registry_of(model).layers["only"]


def direction_of(model):
    return layer_of(model).lora_velora_embed["default"].detach()


def inputs(seed=2, dtype=torch.float32, rows=(4, 6)):
    x = torch.randn(*rows, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return x.to(dtype)


def projected(x, direction, groups, scale):
    """The input as the gradient of A sees it: each group's part along the direction, by loops."""
    size = math.ceil(IN / groups)
    rows = torch.nn.functional.pad(x.reshape(-1, IN), (0, groups * size - IN))
    for row in rows:
        for group in range(groups):
            part = row[group * size : (group + 1) * size]
            part.copy_((part @ direction) * direction * scale)
    return rows[:, :IN]


def gradients(model, x, weights):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    model.zero_grad(set_to_none=True)
    return y.detach(), {name.split(".")[-3] if "lora" in name else name: g for name, g in found.items()}


# ---- the maths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("init", INITS)
def test_gradients_are_those_of_the_projected_input(groups, init):
    model, x = model_of(torch.float64, groups, init=init), inputs(dtype=torch.float64)
    weights = torch.randn(4, 6, OUT, dtype=torch.float64)
    y, found = gradients(model, x, weights)
    layer = layer_of(model)
    A, B, _ = (part if part is None else part.detach() for part in layer.stored("default"))
    torch.testing.assert_close(y, layer.base_layer(x).detach() + 2 * (x @ A.T @ B.T))
    dh = 2 * weights.reshape(-1, OUT) @ B
    rows = projected(x.clone(), direction_of(model), groups, 1.5)
    torch.testing.assert_close(found["lora_A"], dh.T @ rows)
    torch.testing.assert_close(found["lora_B"], 2 * weights.reshape(-1, OUT).T @ (x.reshape(-1, IN) @ A.T))
    exact = weights @ layer.base_layer.weight.detach() + (dh @ A).view(4, 6, IN)
    torch.testing.assert_close(found["x"], exact)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_direction_is_the_mean_group(groups):
    x = inputs()
    size = group_size(IN, groups)
    parts = torch.nn.functional.pad(x.reshape(-1, IN), (0, groups * size - IN)).reshape(-1, size)
    wanted = parts.mean(dim=0)
    torch.testing.assert_close(mean_direction(x, groups), wanted / wanted.norm())
    assert mean_direction(torch.zeros(2, IN), groups).tolist() == pytest.approx([size**-0.5] * size)
    assert mean_direction(x.bfloat16(), groups).dtype == torch.float32
    assert normalised(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("groups", GROUPS)
def test_the_composition_has_the_same_gradients(groups):
    x, A = (
        inputs(dtype=torch.float64).requires_grad_(),
        torch.randn(R, IN, dtype=torch.float64).requires_grad_(),
    )
    direction, projection = mean_direction(x, groups), Projection(groups, 0.7)
    found = [apply(x, A, direction, projection) for apply in (projected_linear, projected_reference)]
    torch.testing.assert_close(*found)
    one, other = (torch.autograd.grad(h.square().sum(), (x, A)) for h in found)
    for mine, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_one_group_of_one_direction_is_exact():
    """An input that lies along the direction loses nothing."""
    direction = normalised(torch.randn(IN, dtype=torch.float64))
    x = torch.randn(7, 1, dtype=torch.float64) * direction
    A = torch.randn(R, IN, dtype=torch.float64, requires_grad=True)
    h = projected_linear(x, A, direction, Projection(1, 1.0))
    (found,) = torch.autograd.grad(h.square().sum(), A)
    (wanted,) = torch.autograd.grad((x @ A.T).square().sum(), A)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_dropout_is_the_same_in_backward(rate):
    x = torch.rand(50, IN, dtype=torch.float64).add_(0.5).requires_grad_()
    h = projected_linear(x, torch.eye(IN, dtype=torch.float64), torch.ones(1), Projection(IN, 1.0, rate, 11))
    (dx,) = torch.autograd.grad(h.sum(), x)
    assert 0.5 * rate < float((h == 0).double().mean()) < 1.5 * rate
    assert torch.equal(h == 0, dx == 0)
    torch.testing.assert_close(h.detach(), x.detach() * dx)


def test_gradients_have_no_gradients():
    A = torch.randn(R, IN, requires_grad=True)
    h = projected_linear(torch.randn(2, IN), A, torch.ones(4) / 2, Projection(3, 1.0))
    (first,) = torch.autograd.grad(h.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- when the direction is written ----------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_when_the_direction_changes(init):
    model = model_of(init=init)
    begun = direction_of(model).clone()
    assert begun.any() == (init == "random")
    first, second = inputs(3), -inputs(4)
    with torch.no_grad():
        model(first)
    model.eval()(first)
    assert torch.equal(direction_of(model), begun)
    model.train()(first)
    after_one = direction_of(model).clone()
    model(second)
    after_two = direction_of(model).clone()
    if init == "random":
        wanted = begun, begun
    elif init == "batch_average":
        wanted = mean_direction(first, 3), mean_direction(second, 3)
    else:
        wanted = mean_direction(first, 3), mean_direction(first, 3)
    assert torch.equal(after_one, wanted[0])
    assert torch.equal(after_two, wanted[1])
    assert float(after_two.norm()) == pytest.approx(1, abs=1e-6)


def test_a_loaded_direction_stays(tmp_path):
    """PEFT, which does not know it any more, takes a new one."""
    model = model_of(init="batch_average_once")
    model(inputs(3))
    kept = direction_of(model).clone()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Only(), tmp_path, is_trainable=True).train()
    loaded(inputs(4))
    assert torch.equal(direction_of(loaded), kept)
    made = copy.deepcopy(model)
    made(inputs(5))
    assert torch.equal(direction_of(made), kept)


def test_two_calls_before_one_backward():
    model = model_of()
    weights = torch.randn(4, 6, OUT)
    apart = [gradients(model, inputs(seed), weights)[1] for seed in (3, 4)]
    both = [(model(inputs(seed)) * weights).sum() for seed in (3, 4)]
    sum(both).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            key = name.split(".")[-3]
            torch.testing.assert_close(p.grad, apart[0][key] + apart[1][key])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_checkpointing(init, reentrant):
    model, weights = model_of(init=init, lora_dropout=0.3), torch.randn(4, 6, OUT)
    again = copy.deepcopy(model)
    torch.manual_seed(5)
    _, wanted = gradients(model, inputs(), weights)
    torch.manual_seed(5)
    x = inputs().requires_grad_()
    (checkpoint(again, x, use_reentrant=reentrant) * weights).sum().backward()
    assert torch.equal(x.grad, wanted["x"])
    for name, p in again.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, wanted[name.split(".")[-3]]), name


# ---- memory ---------------------------------------------------------------------------------------------


def saved_bytes(model, x):
    """Bytes of what a forward keeps for backward, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum()
    return sum(seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_is_kept_is_a_number_a_group(dropout):
    rows = 64
    x = inputs(rows=(rows,))
    groups = 3
    kept = saved_bytes(model_of(groups=groups, lora_dropout=dropout), x)
    wanted = 4 * (rows * (groups + R) + group_size(IN, groups))  # projections, A x, the direction
    assert kept == wanted
    plain = get_peft_model(Only(), LoraConfig(r=R, target_modules=["only"], lora_dropout=dropout)).train()
    assert saved_bytes(plain, x) >= 4 * rows * IN > kept


# ---- elsewhere ------------------------------------------------------------------------------------------


def test_a_frozen_a_is_plain_lora():
    model = model_of()
    layer_of(model).lora_A["default"].requires_grad_(False)
    weights = torch.randn(4, 6, OUT)
    _, found = gradients(model, inputs(), weights)
    _, wanted = gradients(model.eval(), inputs(), weights)
    assert found.keys() == wanted.keys() == {"x", "lora_B"}
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert not direction_of(model).any()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_half_precision(base):
    """Over a half-precision base, and under autocast."""
    weights = torch.randn(4, 6, OUT)
    model, x = model_of(base), inputs(dtype=base)
    reference = model_of()
    reference.load_state_dict(model.state_dict())
    y, wanted = gradients(reference, x.float(), weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
        found_y, found = gradients(model, x, weights)
    assert found["lora_A"].dtype == torch.float32
    torch.testing.assert_close(found_y.float(), y, rtol=0.03, atol=0.05)
    for key, value in wanted.items():
        assert (found[key].float() - value).abs().max() < 0.02 * value.abs().max(), key


def test_biased_factors_and_a_second_adapter():
    model = model_of(lora_bias=True)
    with torch.no_grad():
        layer_of(model).lora_B["default"].bias.normal_()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["only"]))
    randomise(model, "plain")
    model.base_model.set_adapter(["default", "plain"])
    x = inputs()
    y = model.train()(x).detach()
    torch.testing.assert_close(y, model.eval()(x).detach(), rtol=1e-5, atol=1e-5)


def test_mixed_batches_train():
    model = model_of()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["only"]))
    randomise(model, "plain")
    names, x = ["default", "plain", "__base__", "default"], inputs()
    model.train()(x, adapter_names=names).sum().backward()
    found = layer_of(model).lora_A["default"].weight.grad.clone()
    assert torch.equal(direction_of(model), mean_direction(x[[0, 3]], 3))
    model.zero_grad()
    model(x[[0, 3]]).sum().backward()
    torch.testing.assert_close(layer_of(model).lora_A["default"].weight.grad, found)


@pytest.mark.parametrize("init", INITS)
def test_compiled_training_is_one_graph(init):
    torch._dynamo.reset()
    model = model_of(init=init)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weights = torch.randn(4, 6, OUT)
    for seed in (3, 4):
        (compiled(inputs(seed)) * weights).sum().backward()
        (twin(inputs(seed)) * weights).sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_other_layers_are_refused_by_name():
    base = tiny()
    before = [bits(p) for p in base.parameters()]
    with pytest.raises(PlanError, match="embed: VeLoRA is not defined on a"):
        get_peft_model(base, LoraConfig(target_modules=["embed", "q_proj"], velora_config={}))
    assert [bits(p) for p in base.parameters()] == before
