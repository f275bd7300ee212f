"""A model with adapters gives the same numbers under torch's machinery as without it."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from contract.rows import Mixture
from lorakit.layers import LoraLayer
from models import WIDTH, WORDS, Tiny, another, ids, logits, tiny, with_adapter

# said of grouped convolutions: what merging does to them
pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")


class Part(nn.Module):
    """Convolutions and bare parameters: (2, tokens, WIDTH) -> the same."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding="same", padding_mode="circular", groups=2)
        self.image = nn.Conv2d(1, 2, (3, 5), padding=(1, 2))
        self.mixture = Mixture(2, WIDTH, WIDTH, is_transposed=True)
        self.mix = Mixture(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.tanh(x + self.line(x.mT).mT)
        x = x + self.image(x.unsqueeze(1)).mean(dim=1)
        return x + self.mix(torch.tanh(self.mixture(x)))


class Zoo(nn.Module):
    """Every kind of layer: (2, tokens) of ids -> (2, tokens, WORDS)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=1)
        self.layers = nn.ModuleList(Part() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def zoo():
    torch.manual_seed(1)
    return Zoo().eval()


class Model(NamedTuple):
    """A base model and the config that adapts it."""

    make: object
    fields: dict

    def trained(self, **changes):
        return with_adapter(self.make(), **{**self.fields, **changes})

    def second(self, peft):
        another(peft, "other", **self.fields)
        return peft


MODELS = {
    "matrices": Model(tiny, {"target_modules": ["q_proj", "v_proj", "c_fc"]}),
    "every kind": Model(
        zoo,
        {
            "target_modules": ["embed", "line", "image", "head"],
            "target_parameters": ["mixture.weights", "mix.weights"],
        },
    ),
}
each = pytest.mark.parametrize("kind", list(MODELS))


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


def test_every_kind_is_in_the_zoo():
    layers = {
        type(module).__name__
        for module in MODELS["every kind"].trained().modules()
        if isinstance(module, LoraLayer)
    }
    assert layers == {"Embedding", "Conv", "ParamWrapper", "Linear"}


@each
@pytest.mark.parametrize("adapters", [1, 2])
def test_compile_equals_eager(kind, adapters):
    model = MODELS[kind].trained()
    if adapters == 2:
        MODELS[kind].second(model).set_adapter(["default", "other"])
    wanted = model(ids())
    inner = model.get_base_model()
    torch.compiler.reset()  # or graphs that another test compiled of the same code, in pieces, are taken
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    found = compiled(ids())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same(gradients(inner, found), gradients(inner, wanted))


@each
def test_compiled_model_follows_changes_of_state(kind):
    model = MODELS[kind].second(MODELS[kind].trained())
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


@each
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(kind, reentrant, dropout):
    fields = {"lora_dropout": dropout}
    if kind != "matrices" and dropout:
        fields["target_parameters"] = None  # on which dropout does not act
    model = MODELS[kind].trained(**fields).train()
    inner = model.get_base_model()

    def run(call):
        torch.manual_seed(5)
        x = inner.embed(ids()).detach().requires_grad_()
        for layer in inner.layers:
            x = call(layer, x)
        return inner.head(x)

    model.get_submodule("base_model.model.embed").requires_grad_(False)  # nothing of it is asked for here
    wanted = gradients(model, run(lambda layer, x: layer(x)))
    found = gradients(model, run(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)))
    assert_same(found, wanted)


def through_modules(model):
    """The same model, made to call every module: what plain composition gives."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapters:
                for factor in module.modules_of(name):
                    factor.register_forward_hook(lambda *_: None)
    return twin


@each
def test_autocast_bf16(kind):
    model = MODELS[kind].trained()
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


@each
def test_func_grad_and_vmap(kind):
    model = MODELS[kind].trained().get_base_model()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, batch):
        return functional_call(model, values, (batch,)).square().mean()

    assert_same(grad(loss)(parameters, ids()), gradients(model, model(ids())))
    batches = torch.stack([ids(seed) for seed in range(3)])
    each_one = vmap(grad(loss), in_dims=(None, 0))(parameters, batches)
    for n, batch in enumerate(batches):
        assert_same({name: value[n] for name, value in each_one.items()}, gradients(model, model(batch)))


@each
def test_deepcopy_of_a_model_is_its_own(kind):
    model = MODELS[kind].trained()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    twin.merge_adapter()
    twin.unmerge_adapter()
    twin.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert isinstance(twin.get_base_model(), (Tiny, Zoo))
    assert torch.equal(logits(twin), logits(MODELS[kind].make()))
    assert list(model.peft_config) == ["default"]


@each
def test_merging_for_good_gives_a_plain_model(kind):
    model = MODELS[kind].trained()
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    found = torch.compile(merged, backend="eager", fullgraph=True)(ids())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
