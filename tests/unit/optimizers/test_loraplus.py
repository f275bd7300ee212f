"""`create_loraplus_optimizer`: every trainable parameter in its group, whatever things are called; refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoraConfig, create_loraplus_optimizer, get_peft_model, inject_adapter_in_model
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError
from models import Snapshot, another, ids, tiny, tiny_llama, with_adapter

SETTINGS = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
GROUPS = {"A": (1e-3, 0.1), "embedding": (1e-5, 0.1), "B": (8e-3, 0.1), "without decay": (8e-3, 0.0)}


def grouped(model, optimizer_cls=torch.optim.AdamW, **changes):
    """Names of the parameters in each group, whose settings are checked."""
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **{**SETTINGS, **changes})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for (role, (lr, decay)), group in zip(GROUPS.items(), optimizer.param_groups, strict=True):
        assert group["lr"] == pytest.approx(lr)
        assert group["weight_decay"] == decay
        found[role] = {names[id(parameter)] for parameter in group["params"]}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for group in found.values() for name in group) == sorted(trained)
    return found


class Named(nn.Module):
    """Modules with names that look like factors, embeddings and biases."""

    def __init__(self):
        super().__init__()
        self.lora_B = nn.Linear(8, 8)
        self.embedding = nn.Linear(8, 8)
        self.bias = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.embed = nn.Embedding(11, 8)

    def forward(self, x):
        return self.norm(self.bias(self.embedding(self.lora_B(self.embed(x)))))


def test_names_that_look_like_something_else_do_not_matter():
    config = LoraConfig(
        r=2, target_modules=["lora_B", "embedding", "bias", "embed"], modules_to_save=["norm"]
    )
    model = get_peft_model(Named(), config, "bias_lora_B")
    found = grouped(model)
    kinds = ("lora_B", "embedding", "bias")
    inside = "base_model.model."
    assert found == {
        "A": {f"{inside}{kind}.lora_A.bias_lora_B.weight" for kind in kinds},
        "B": {f"{inside}{kind}.lora_B.bias_lora_B.weight" for kind in kinds},
        "embedding": {f"{inside}embed.lora_embedding_{part}.bias_lora_B" for part in "AB"},
        "without decay": {f"{inside}norm.modules_to_save.bias_lora_B.weight"},
    }


def test_biases_whole_modules_and_token_rows():
    model = with_adapter(
        tiny(),
        target_modules=["q_proj"],
        lora_bias=True,
        bias="lora_only",
        modules_to_save=["head", "layers.0.norm"],
        trainable_token_indices={"embed": [1, 2]},
    )
    found = grouped(model)
    assert {name.rpartition("layers.")[2] for name in found["without decay"]} == {
        *(f"{n}.q_proj.lora_B.default.bias" for n in (0, 1)),
        *(f"{n}.q_proj.base_layer.bias" for n in (0, 1)),
        *(f"0.norm.modules_to_save.default.{part}" for part in ("weight", "bias")),
    }
    assert {name.removeprefix("base_model.model.") for name in found["A"]} == {
        *(f"layers.{n}.q_proj.lora_A.default.weight" for n in (0, 1)),
        "head.modules_to_save.default.weight",
        "embed.token_adapter.trainable_tokens_delta.default",
    }
    assert not found["embedding"]


def test_only_what_is_trainable():
    """Of several adapters the active ones, and what the user let train beside them."""
    model = with_adapter(tiny())
    another(model, "other")
    model.set_adapter("other")
    model.get_base_model().head.weight.requires_grad = True
    found = grouped(model)
    assert not [name for group in found.values() for name in group if "default" in name]
    assert "base_model.model.head.weight" in found["A"]


def test_tied_factors_are_the_embeddings():
    model = with_adapter(
        tiny_llama(tie=True), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    found = grouped(model)
    assert len(found["embedding"]) == 2
    assert not found["A"] | found["B"]


@pytest.mark.parametrize(
    "optimizer_cls",
    [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, partial(torch.optim.AdamW, eps=1e-5)],
)
def test_any_optimizer_makes_steps_of_the_groups_sizes(optimizer_cls):
    model = with_adapter(tiny())
    options = {"momentum": 0.5} if optimizer_cls is torch.optim.SGD else {}
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **SETTINGS, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(ids()).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    if optimizer_cls is torch.optim.SGD:
        for name in changed:
            p = model.get_parameter(name)
            rate = 8e-3 if ".lora_B." in name else 1e-3
            step = before[name] - p.detach()
            torch.testing.assert_close(step, rate * (p.grad + 0.1 * before[name]), rtol=1e-3, atol=1e-7)


def test_eight_bit_states_but_for_whole_embeddings():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = get_peft_model(
        nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64), nn.Linear(64, 128)),
        LoraConfig(r=64, target_modules=["1"], modules_to_save=["0", "2"]),
    )
    optimizer = create_loraplus_optimizer(model, bitsandbytes.optim.AdamW8bit, **SETTINGS)
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    states = {
        name: optimizer.state[p]["state1"].dtype
        for name, p in model.named_parameters()
        if p in optimizer.state
    }
    assert {name.split(".")[2]: dtype for name, dtype in states.items() if name.endswith("weight")} == {
        "0": torch.float32,
        "1": torch.uint8,
        "2": torch.uint8,
    }


def test_a_model_that_was_injected_into_or_compiled():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny())
    assert len(grouped(model)["B"]) == 2
    compiled = torch.compile(with_adapter(tiny()), backend="eager")
    assert len(grouped(compiled)["B"]) == 4


REFUSED = [
    ({"loraplus_lr_ratio": 0.0}, ConfigError, "loraplus_lr_ratio: got 0.0, wanted a finite number > 0"),
    ({"loraplus_lr_ratio": -1}, ConfigError, "loraplus_lr_ratio"),
    ({"loraplus_lr_ratio": float("nan")}, ConfigError, "loraplus_lr_ratio"),
    ({"loraplus_lr_ratio": "16"}, TypeError, "loraplus_lr_ratio: got a str, wanted a number"),
    ({"lr": -1e-3}, ConfigError, "lr: got -0.001"),
    ({"lr": True}, TypeError, "lr"),
    ({"loraplus_weight_decay": -0.1}, ConfigError, "loraplus_weight_decay"),
    ({"loraplus_lr_embedding": float("inf")}, ConfigError, "loraplus_lr_embedding"),
    ({"weight_decay": 0.1}, ConfigError, "weight_decay: pass loraplus_weight_decay"),
    ({"betaz": (0.9, 0.99)}, ConfigError, "betaz: no keyword of AdamW; did you mean 'betas'"),
    ({"loraplus_weight_deca": 0.1}, ConfigError, "did you mean 'loraplus_weight_decay'"),
    ({"params": []}, ConfigError, "params: no keyword"),
    ({"optimizer_cls": "AdamW"}, TypeError, "optimizer_cls: got a str"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refusals(changes, kind, message):
    model = with_adapter(tiny())
    before = Snapshot(model)
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        create_loraplus_optimizer(
            **{"model": model, "optimizer_cls": torch.optim.AdamW, **SETTINGS, **changes}
        )
    before.assert_same(model)


def test_nothing_to_train():
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        create_loraplus_optimizer(tiny(), torch.optim.AdamW, **SETTINGS)
    model = with_adapter(tiny())
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterStateError, match="none of the adapters"):
        create_loraplus_optimizer(model, torch.optim.AdamW, **SETTINGS)


def test_peft_s_places():
    assert lorakit.optimizers.create_loraplus_optimizer is create_loraplus_optimizer
