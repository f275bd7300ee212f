"""DoRA against the formula of its paper, written with dense weights, on every kind of layer."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from contract.rows import ROWS, Mixture, adapter_output, data, dense_delta, of_delta, run, weight_of
from lorakit import DoraCaching, LoraConfig, PeftModel, get_peft_model
from lorakit.errors import ConfigError, PlanError, UnsupportedError
from lorakit.init import registry as initialisers
from models import Snapshot, another, logits, randomise, registry_of, tiny, with_adapter
from quantised import BY_NAME, IN, make

TABLE = [
    row
    for row in ROWS
    if row.kind != "parameter" and "groups" not in row.name and "depthwise" not in row.name
]
each = pytest.mark.parametrize("row", TABLE, ids=str)
DORA = {"use_dora": True, "r": 3, "lora_alpha": 5, "target_modules": ["0"]}


def model_of(row, dtype=torch.float64, **changes):
    torch.manual_seed(1)
    base = nn.Sequential(row.base(True).to(dtype))
    model = get_peft_model(base, LoraConfig(**{**DORA, **changes})).eval()
    layer = layer_of(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for item in layer.tensors("default"):
            noise = torch.randn(item.tensor.shape, generator=generator).to(item.tensor.dtype)
            item.tensor.mul_(1.2).add_(0.3 * noise)
    return model


def layer_of(model, path="0"):
    return registry_of(model).layers[path]


def own(layer, name="default"):
    """A, B and the magnitude."""
    return [item.tensor for item in layer.tensors(name)]


def per_output(row, numbers, weight):
    """(out,) numbers in the shape that multiplies the stored weight."""
    return numbers.view(-1, *(1,) * (weight.ndim - 1)) if row.stored in {"matrix", "conv"} else numbers


def norms_of(row, weight):
    """(out,), the norm of all that makes one output."""
    return weight.flatten(1).norm(dim=1) if row.stored in {"matrix", "conv"} else weight.norm(dim=0)


def gains(row, weight, A, B, magnitude, scaling):
    return magnitude.flatten() / norms_of(row, weight + scaling * dense_delta(row, A, B)).detach()


def composed(row, layer, x, names=("default",)):
    """`base(x) + sum of (g - 1) W x + g s B A x`, the change of each adapter by itself."""
    base, plain = layer.get_base_layer(), of_delta(layer.get_base_layer())
    weight = weight_of(row, layer).detach()
    y = run(row, copy.deepcopy(base), x, weight, None if layer.bias is None else layer.bias.detach())
    for name in names:
        A, B, magnitude = own(layer, name)
        scaling = layer.scaling[name]
        gain = gains(row, weight, A, B, magnitude, scaling)
        if row.whole:
            change = per_output(row, gain, weight) * (weight + scaling * dense_delta(row, A, B)) - weight
            y = y + run(row, plain, x, change)
            continue
        if row.kind == "embedding":  # how its own gradient counts tokens is no matter here
            y = y + (gain - 1) * base(x)
        else:
            y = y + run(row, plain, x, per_output(row, gain - 1, weight) * weight)
        y = y + scaling * adapter_output(row, plain, x, A, per_output_of_B(gain, B) * B)
    return y


def per_output_of_B(gain, B):
    return gain.view(-1, *(1,) * (B.ndim - 1))


def near(found, wanted, tolerance=1e-11):
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


# ---- what it computes -----------------------------------------------------------------------------------


@each
def test_outputs_and_gradients(row):
    model, x = model_of(row), data(row, torch.float64)
    layer = layer_of(model)
    x = x.requires_grad_() if x.is_floating_point() else x
    inputs = own(layer) + ([x] if x.requires_grad else [])
    wanted = composed(row, layer, x)
    near(model(x), wanted)
    with torch.no_grad():
        near(model(x), wanted)
        near(model(x), wanted)  # from what was kept
    dy = torch.randn(wanted.shape, dtype=torch.float64)
    found = torch.autograd.grad(model(x), inputs, dy)
    for got, want in zip(found, torch.autograd.grad(wanted, inputs, dy), strict=True):
        assert want.abs().max() > 0
        near(got, want)


@each
def test_the_magnitude_begins_as_the_norm(row):
    torch.manual_seed(1)
    for init in (True, "gaussian", False):
        model = get_peft_model(
            nn.Sequential(row.base(True).double()), LoraConfig(**DORA, init_lora_weights=init)
        )
        layer = layer_of(model)
        A, B, magnitude = own(layer)
        weight = weight_of(row, layer).detach()
        near(magnitude.flatten(), norms_of(row, weight + layer.scaling["default"] * dense_delta(row, A, B)))
        space = len(layer.layout.row) - 1
        assert magnitude.shape == ((1, layer.layout.out, *(1,) * space) if space else (layer.layout.out,))
        assert magnitude.requires_grad


def test_the_magnitude_begins_from_what_the_base_is_to_hold(monkeypatch):
    """A scheme that replaces the base weight comes first."""
    scheme = initialisers.INITIALISERS["gaussian"]

    def halving(context):
        return scheme(context)._replace(base_weight=context.read_weight(torch.float32) / 2)

    monkeypatch.setitem(initialisers.INITIALISERS, "gaussian", halving)
    base = nn.Linear(6, 4)
    norms = base.weight.detach().norm(dim=1)
    model = get_peft_model(nn.Sequential(base), LoraConfig(**DORA, init_lora_weights="gaussian"))
    near(own(layer_of(model))[2], norms / 2, 1e-5)


@pytest.mark.parametrize("row", [row for row in TABLE if row.drops], ids=str)
def test_under_dropout_the_base_sees_the_dropped_input_too(row):
    model, x = model_of(row, lora_dropout=0.4), data(row, torch.float64)
    layer = layer_of(model)
    with torch.no_grad():
        near(model(x), composed(row, layer, x))  # in eval mode there is none
    model.train()
    base, plain = layer.get_base_layer(), of_delta(layer.get_base_layer())
    A, B, magnitude = own(layer)
    weight, scaling = weight_of(row, layer).detach(), layer.scaling["default"]
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    gain = gains(row, weight, A, B, magnitude, scaling)
    wanted = base(x) + run(row, plain, dropped, per_output(row, gain - 1, weight) * weight)
    wanted = wanted + scaling * run(row, plain, dropped, dense_delta(row, A, per_output_of_B(gain, B) * B))
    near(found, wanted)
    for got, want in zip(
        torch.autograd.grad(found.square().sum(), [A, B, magnitude]),
        torch.autograd.grad(wanted.square().sum(), [A, B, magnitude]),
        strict=True,
    ):
        near(got, want)


def test_no_gradient_goes_through_the_norm():
    """With the magnitude alone trained to a multiple, the gradient of A is that of a constant gain."""
    row = ROWS[0]
    model, x = model_of(row), data(row, torch.float64)
    A, B, magnitude = own(layer_of(model))
    weight, s = weight_of(row, layer_of(model)).detach(), layer_of(model).scaling["default"]
    gain = gains(row, weight, A, B, magnitude, s).detach()
    (found,) = torch.autograd.grad(model(x).square().sum(), [A])
    wanted = linear(x, gain.unsqueeze(1) * (weight + s * B @ A), layer_of(model).bias).square().sum()
    near(found, torch.autograd.grad(wanted, [A])[0])


@each
def test_several(row):
    model, x = model_of(row), data(row, torch.float64)
    model.add_adapter("other", LoraConfig(**{**DORA, "r": 2}))
    randomise(model, "other", 5)
    model.base_model.set_adapter(["default", "other"])
    layer = layer_of(model)
    wanted = composed(row, layer, x, ("default", "other"))
    near(model(x), wanted)
    with torch.no_grad():
        near(model(x), wanted)
        near(model(x), wanted)
    model.merge_adapter()
    near(model(x), wanted)


def test_a_trained_bias_gets_its_gradient():
    model, x = with_adapter(tiny(dtype=torch.float64), use_dora=True, bias="all"), torch.tensor([[1, 2, 3]])
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert found
    loss = model(x).square().sum()
    loss.backward()
    for name, bias in found.items():
        step = 1e-6
        with torch.no_grad():
            bias[0] += step
            ahead = model(x).square().sum()
            bias[0] -= 2 * step
            behind = model(x).square().sum()
            bias[0] += step
        assert abs((ahead - behind) / (2 * step) - bias.grad[0]) <= 1e-5 * loss, name


# ---- what is kept ---------------------------------------------------------------------------------------


def counting(monkeypatch):
    """How often something reads a whole weight."""
    counts = {"squares": 0, "norms": 0}
    from lorakit.variants import dora

    for name in counts:
        function = getattr(dora, f"row_{name}")

        def counted(*args, name=name, function=function):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(dora, f"row_{name}", counted)
    return counts


def test_an_evaluation_reads_the_weight_once_and_a_step_computes_the_norm_alone(monkeypatch):
    model, x = model_of(ROWS[0], torch.float32), data(ROWS[0])
    counts = counting(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert counts == {"squares": 1, "norms": 1}
    for _ in range(2):
        model(x).sum().backward()
    assert counts == {"squares": 1, "norms": 3}
    with torch.no_grad():
        model(x)
        model(x)
    assert counts == {"squares": 1, "norms": 4}
    with torch.no_grad():
        weight_of(ROWS[0], layer_of(model)).mul_(2)
        model(x)
    assert counts == {"squares": 2, "norms": 5}


@pytest.mark.parametrize("way", ["merge", "cast", "delete"])
def test_what_is_kept_holds_no_weight_that_is_let_go(way):
    model, x = model_of(ROWS[0], torch.float32), data(ROWS[0])
    layer = layer_of(model)
    former = weakref.ref(layer.original_weight)
    memory = layer.original_weight.data_ptr()
    with torch.no_grad():
        model(x)
    assert layer.kept["default"]
    if way == "merge":
        layer.commit_merge_for_good(layer.prepare_merge())
        assert former() is None
    elif way == "cast":
        model.double()
        assert layer.original_weight.data_ptr() != memory
    else:
        model.delete_adapter("default")
    assert not layer.kept


def test_another_precision_of_the_same_evaluation():
    model, x = model_of(ROWS[0], torch.float32), data(ROWS[0])
    with torch.no_grad():
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert torch.equal(model(x), wanted)


def test_an_evaluation_after_compiled_steps_with_an_optimiser_that_counts_no_versions():
    torch._dynamo.reset()
    model = with_adapter(tiny(), use_dora=True)
    compiled = torch.compile(model, backend="aot_eager")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    logits(model)
    compiled(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimiser.step()
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


# ---- bases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "hqq-4"])
def test_on_a_quantised_base_as_on_the_numbers_that_are_stored(kind):
    base = make(BY_NAME[kind])
    model = get_peft_model(nn.Sequential(base), LoraConfig(**DORA)).eval()
    layer = layer_of(model)
    weight = layer.read_weight(torch.float32)
    near(own(layer)[2], weight.norm(dim=1), 1e-5)
    randomise(model, "default", 4)
    A, B, magnitude = own(layer)
    x, scaling = torch.randn(5, IN), layer.scaling["default"]
    plain = linear(x, weight, base.bias)
    gain = gains(ROWS[0], weight, A, B, magnitude, scaling)
    wanted = plain + linear(x, (gain - 1).unsqueeze(1) * weight + scaling * (gain.unsqueeze(1) * B) @ A)
    for found in (model(x), model(x)):
        near(found.detach(), wanted.detach(), 2e-2)  # the base multiplies in less than fp32
    with torch.no_grad():
        near(model(x), wanted, 2e-2)
    found = torch.autograd.grad(model(x).square().sum(), [A, B, magnitude])
    for got, want in zip(found, torch.autograd.grad(wanted.square().sum(), [A, B, magnitude]), strict=True):
        assert (got - want).norm() <= 3e-2 * want.norm()
    near(
        layer.get_delta_weight("default").float(),
        (gain.unsqueeze(1) * (weight + scaling * B @ A) - weight).detach(),
        1e-4,
    )


def test_a_layer_that_its_parent_reads():
    """An encoder layer in eval mode computes with the weights of its linear layers."""
    torch.manual_seed(1)
    base = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    model = get_peft_model(base, LoraConfig(use_dora=True, r=2, target_modules=["linear1", "linear2"])).eval()
    randomise(model)
    with torch.no_grad():
        found = model(x)
        near(found, model.merge_and_unload()(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_bases_and_half_adapters(dtype):
    exact = with_adapter(tiny(), use_dora=True, target_modules=["q_proj", "c_fc", "embed"])
    base = tiny().to(dtype)
    model = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "c_fc", "embed"]),
        autocast_adapter_dtype=False,
    )
    randomise(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    near(logits(model).float(), logits(exact), 5e-2)
    model(torch.tensor([[1, 2]])).float().sum().backward()
    model.merge_adapter()
    near(logits(model).float(), logits(exact), 5e-2)


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "error", "words"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2), {"r": 2}, PlanError, "0: DoRA on a grouped convolution"),
        (lambda: Mixture(4, 6), {"target_modules": [], "target_parameters": ["0.weights"]}, PlanError, "DoRA is not defined on a parameter"),
        (lambda: nn.MultiheadAttention(8, 2), {}, PlanError, "DoRA is not defined on a parameter"),
        (lambda: nn.Linear(4, 6), {"init_lora_weights": "pissa"}, PlanError, "pissa|init_lora_weights"),
        (lambda: nn.Embedding(9, 6), {"trainable_token_indices": {"0": [1]}}, PlanError, "DoRA and trainable_token_indices"),
        (lambda: nn.Linear(4, 6), {"use_qalora": True, "qalora_group_size": 2}, UnsupportedError, "use_dora"),
    ],
    ids=["groups", "parameter", "attention", "pissa", "tokens", "two variants"],
)  # fmt: skip
def test_refusals(base, changes, error, words):
    model = nn.Sequential(base())
    before = Snapshot(model)
    with pytest.raises(error, match=words):
        get_peft_model(model, LoraConfig(**{**DORA, **changes}))
    before.assert_same(model)


def test_a_bias_of_B_is_refused_by_the_config():
    with pytest.raises(ConfigError, match="lora_bias"):
        LoraConfig(use_dora=True, lora_bias=True)


def test_a_grouped_convolution_is_refused_in_a_file_too(tmp_path):
    get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3)), LoraConfig(**{**DORA, "r": 2})).save_pretrained(
        tmp_path
    )
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    before = Snapshot(model)
    with pytest.raises(PlanError, match="grouped convolution"):
        PeftModel.from_pretrained(model, tmp_path)
    before.assert_same(model)


def test_combining_is_refused_by_name():
    model = with_adapter(tiny(), use_dora=True)
    another(model, "other")
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match="DoRA rescales the weight"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "cat")
    before.assert_same(model)


def test_caching_is_asked_for_as_in_peft():
    model = with_adapter(tiny(), use_dora=True)
    wanted = logits(model)
    with DoraCaching():
        assert torch.equal(logits(model), wanted)
    switch = DoraCaching(enabled=False)
    switch(enabled=True)
    with switch, pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert torch.equal(logits(model), wanted)
