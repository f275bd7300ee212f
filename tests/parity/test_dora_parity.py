"""DoRA, with PEFT as the judge: outputs, gradients, merged weights, and files in both directions."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from parity.models import (
    NAMED_WARNINGS,
    adapter_parameters,
    build,
    copy_trained,
    loss_of,
    output_of,
    peft,
    randomize,
)

pytestmark = [
    *NAMED_WARNINGS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


class Convolutions(nn.Module):
    """One, two and three dimensions of space, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1, stride=2)
        self.image = nn.Conv2d(1, 3, (3, 2), bias=False)
        self.volume = nn.Conv3d(1, 2, 2, padding=1)

    def forward(self, x):
        y = self.image(self.line(x).unsqueeze(1))
        return self.volume(y.unsqueeze(1))


def conv_model():
    torch.manual_seed(0)
    return Convolutions().eval()


class Row(NamedTuple):
    """A base model and what a config says beside `use_dora`."""

    kind: str
    fields: dict

    def base(self, dtype=torch.float32):
        return conv_model().to(dtype) if self.kind == "convolutions" else build(self.kind, dtype)

    def config(self, library):
        return library.LoraConfig(**{"r": 4, "lora_alpha": 6, "use_dora": True, **self.fields})

    def output(self, model):
        if self.kind != "convolutions":
            return output_of(model, self.kind)
        x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
        return model(x.to(next(model.parameters()).dtype))

    def loss(self, model):
        return (
            self.output(model).square().mean() if self.kind == "convolutions" else loss_of(model, self.kind)
        )

    def __str__(self):
        return f"{self.kind}-" + ",".join(map(str, self.fields["target_modules"]))


QV = ["q_proj", "v_proj"]
ROWS = (
    Row("llama", {"target_modules": QV}),
    Row("llama_bias", {"target_modules": [*QV, "down_proj", "embed_tokens"], "use_rslora": True}),
    Row(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_proj": 2}, "fan_in_fan_out": True},
    ),
    Row("bert", {"target_modules": ["query", "dense", "word_embeddings"], "modules_to_save": ["classifier"]}),
    Row("plain", {"target_modules": ["first", "middle"], "bias": "lora_only"}),
    Row("convolutions", {"target_modules": ["line", "image", "volume"]}),
)
each = pytest.mark.parametrize("row", ROWS, ids=str)


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


@pytest.fixture
def pair(row, tmp_path):
    """PEFT's adapter, and ours loaded from its file; eval mode."""
    theirs = peft.get_peft_model(row.base(), row.config(peft)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lorakit.PeftModel.from_pretrained(row.base(), tmp_path / "theirs", is_trainable=True).eval()
    return Pair(ours, theirs)


def own(tensors):
    """Without the base's embedding, which PEFT writes beside an adapter of it."""
    return {key: value for key, value in tensors.items() if not key.endswith("base_layer.weight")}


def close(found, wanted, tolerance=2e-5, where=None):
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-3), where


@each
def test_files_go_both_ways(row, pair, tmp_path):
    wanted = row.output(pair.theirs)
    assert (wanted - row.output(row.base())).abs().max() > 1e-2
    close(row.output(pair.ours), wanted)
    with torch.no_grad():
        close(row.output(pair.ours), wanted)
    pair.ours.save_pretrained(tmp_path / "ours")
    one, other = (
        own(load_file(tmp_path / side / "adapter_model.safetensors")) for side in ("theirs", "ours")
    )
    assert one.keys() == other.keys()
    assert any(key.endswith(".lora_magnitude_vector") for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = peft.PeftModel.from_pretrained(row.base(), tmp_path / "ours").eval()
    close(row.output(again), wanted)


@each
def test_names_and_beginnings(row):
    """A new adapter has PEFT's parameters, with the same magnitudes on the same base."""
    ours, theirs = (
        library.get_peft_model(row.base(), row.config(library)).eval() for library in (lorakit, peft)
    )
    mine, wanted = adapter_parameters(ours), adapter_parameters(theirs)
    assert {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in wanted.items()}
    for key, value in wanted.items():
        if "lora_magnitude_vector" in key and "embed" not in key:
            close(mine[key], value, 1e-6, key)  # an embedding begins with a random B, of which the norm knows
    state, other = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in own(other).items()
    }
    lorakit.set_peft_model_state_dict(ours, own(other))
    close(row.output(ours), row.output(theirs))


@each
def test_gradients(row, pair):
    grads = []
    for model in pair:
        row.loss(model).backward()
        grads.append({name: p.grad for name, p in adapter_parameters(model).items()})
    ours, theirs = grads
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if value is not None:  # the parameters of a module that PEFT trains whole may not all act
            close(ours[name], value, 1e-4, name)


@each
def test_training_takes_the_same_way(row, pair):
    for model in pair:
        model.train()
        optimiser = torch.optim.SGD(adapter_parameters(model).values(), lr=0.05)
        for _ in range(4):
            loss = row.loss(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    ours, theirs = (adapter_parameters(model) for model in pair)
    for name, value in theirs.items():
        close(ours[name].detach(), value.detach(), 2e-4, name)


@each
def test_merged(row, pair):
    wanted = row.output(pair.theirs)
    ours, theirs = (model.merge_and_unload() for model in pair)
    close(row.output(ours), wanted)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for key, value in other.items():
        close(mine[key], value, where=key)


@pytest.mark.parametrize("row", ROWS[:1], ids=str)
def test_dropout_of_the_same_elements(row, pair):
    """PEFT multiplies the base with the dropped input too; here both draw the same mask."""
    fields = {"target_modules": ["middle"], "lora_dropout": 0.5}
    theirs = peft.get_peft_model(build("plain"), peft.LoraConfig(use_dora=True, **fields))
    randomize(theirs)
    ours = lorakit.get_peft_model(build("plain"), lorakit.LoraConfig(use_dora=True, **fields))
    copy_trained(theirs, ours)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(output_of(model.train(), "plain"))
    close(*found)
    assert (found[1] - output_of(theirs.eval(), "plain")).abs().max() > 1e-2


def test_beside_plain_lora():
    """PEFT adds them up in the order in which they are active."""
    fields = {"target_modules": QV, "r": 4}
    models = []
    for library in (lorakit, peft):
        model = library.get_peft_model(build("llama"), library.LoraConfig(use_dora=True, **fields), "one")
        model.add_adapter("two", library.LoraConfig(**fields))
        model.base_model.set_adapter(["one", "two"])
        models.append(model.eval())
    ours, theirs = models
    randomize(theirs)
    copy_trained(theirs, ours)
    close(output_of(ours, "llama"), output_of(theirs, "llama"))


def test_a_bf16_base_is_nearer_to_the_exact_result_than_theirs():
    """PEFT computes the norm in bf16."""
    row = ROWS[0]
    theirs = peft.get_peft_model(row.base(torch.bfloat16), row.config(peft)).eval()
    randomize(theirs)
    ours = lorakit.get_peft_model(row.base(torch.bfloat16), row.config(lorakit)).eval()
    copy_trained(theirs, ours)
    exact = copy.deepcopy(ours).float()
    with torch.no_grad():
        wanted = output_of(exact, "llama")
        error = {
            name: (output_of(m, "llama").float() - wanted).norm()
            for name, m in (("ours", ours), ("theirs", theirs))
        }
    assert error["ours"] <= 1.1 * error["theirs"]
    assert error["ours"] <= 2e-2 * wanted.norm()
