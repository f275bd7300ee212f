"""Inspecting files: the figures against dense ones, and that what is odd is told and not refused."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.oracle import KINDS, zoo
from lorakit import LoraConfig, get_peft_model, inspect_adapter
from lorakit.checkpoint.sites import read_source
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, ConfigError
from models import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")


def saved(folder, *, seed=0, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(zoo(), LoraConfig(**{"r": 4, "lora_alpha": 6.0, **fields}))
    randomise(peft, seed=seed)
    peft.save_pretrained(folder)
    return folder


def rewritten(folder, change):
    """The weights with `change` done to the dict of tensors, without digest and copy of the config."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


LAYERS = {
    "matrices": {"q": ("linear", (8, 8), 1), "c": ("linear", (8, 8), 1)},
    "lookup": {
        "embed": ("embedding", (8, 11), 1),
        "conv": ("convolution", (8, 24), 1),
        "q": ("linear", (8, 8), 1),
    },
    "groups": {"grouped": ("grouped convolution", (8, 24), 2), "head": ("linear", (11, 8), 1)},
    "attention": {
        "attention": ("linear", (24, 8), 1),
        "attention.base_layer.out_proj": ("linear", (8, 8), 1),
        "experts": ("experts", (12, 8), 3),
    },
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_against_dense(tmp_path, kind):
    report = inspect_adapter(saved(tmp_path / "a", **KINDS[kind][0]))
    sites = read_source(tmp_path / "a", instead="").sites
    assert {layer.path: (layer.kind, layer.shape, layer.blocks) for layer in report.layers} == LAYERS[kind]
    for layer in report.layers:
        blocks = [block.delta(torch.float64) for block in sites[layer.path].blocks]
        assert layer.norm == pytest.approx(math.hypot(*(float(block.norm()) for block in blocks)))
        values = sum(torch.linalg.svdvals(block).square() for block in blocks).sqrt()
        rank = sites[layer.path].blocks[0].rank
        torch.testing.assert_close(torch.tensor(layer.spectrum).double(), values[:rank].double())
        shares = torch.tensor(layer.spectrum).double()
        shares = shares / shares.sum()
        assert layer.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
        reached = (torch.tensor(layer.spectrum).square().cumsum(0) / layer.norm**2).tolist()
        assert layer.energy_rank == 1 + sum(share < 0.99 for share in reached)
        assert (layer.dtype, layer.nan, layer.inf, layer.dead) == ("float64", 0, 0, False)
        assert layer.scaling == sites[layer.path].blocks[0].scaling
    assert report.norm == pytest.approx(math.hypot(*(layer.norm for layer in report.layers)))
    assert sum(layer.parameters for layer in report.layers) == report.parameters == report.dtypes["float64"]
    assert report.bytes == 8 * report.parameters


def test_kinds_of_tensors_and_provenance(tmp_path):
    fields = {
        "target_modules": ["q"],
        "bias": "lora_only",
        "lora_bias": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed": [7, 4]},
        "task_type": "CAUSAL_LM",
        "revision": "abc",
        "base_model_name_or_path": "someone/something",
    }
    report = inspect_adapter(saved(tmp_path / "a", **fields))
    assert {each.kind: (each.tensors, each.parameters, each.bytes) for each in report.kinds} == {
        "factors": (2, 64, 512),
        "biases of B": (1, 8, 64),
        "biases": (1, 8, 64),
        "modules saved whole": (2, 16, 128),
        "token rows": (1, 16, 128),
    }
    assert {each.name for each in report.others} == {
        "q.base_layer.bias",
        "norm.weight",
        "norm.bias",
        "embed.token_adapter.trainable_tokens_delta",
    }
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for other in report.others:
        assert other.norm == pytest.approx(float(tensors[f"base_model.model.{other.name}"].norm()))
    assert (report.base, report.revision, report.task_type) == ("someone/something", "abc", "CAUSAL_LM")
    assert (report.digest, report.config_state, report.variant) == ("fits", "as saved", None)
    assert set(report.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "lorakit.digest" in report.metadata
    assert "lorakit.config" not in report.metadata
    assert report.config["modules_to_save"] == ["norm"]
    assert report.problems == report.dead == report.non_finite == ()


def test_weights_of_the_base_that_peft_writes(tmp_path):
    def change(tensors):
        tensors["base_model.model.embed.base_layer.weight"] = torch.ones(11, 8).double()

    report = inspect_adapter(rewritten(saved(tmp_path / "a", target_modules=["embed"]), change))
    assert {kind.kind: kind.parameters for kind in report.kinds} == {"factors": 76, "weights of the base": 88}


def test_dead_layers_and_low_ranks(tmp_path):
    def change(tensors):
        tensors["base_model.model.q.lora_B.weight"].zero_()
        tensors["base_model.model.c.lora_B.weight"][:, 1:] = 0

    report = inspect_adapter(rewritten(saved(tmp_path / "a", target_modules=["q", "c"], r=6), change))
    layers = {layer.path: layer for layer in report.layers}
    assert report.dead == ("q",)
    assert (layers["q"].norm, layers["q"].effective_rank, layers["q"].energy_rank) == (0.0, 0.0, 0)
    assert layers["c"].effective_rank == pytest.approx(1.0, abs=1e-6)
    assert layers["c"].energy_rank == 1
    assert (report.digest, report.config_state) == ("none", "no copy in the weights")
    assert report.notes == (
        "1 of 6 ranks hold 99 % of the energy: lorakit resize --energy 0.99 makes the adapter smaller",
    )


def test_numbers_that_are_not_finite_are_counted(tmp_path):
    def change(tensors):
        tensors["base_model.model.q.lora_A.weight"][0, :3] = math.nan
        tensors["base_model.model.q.lora_B.weight"][2, 1] = -math.inf
        tensors["base_model.model.norm.bias"][5] = math.inf

    fields = {"target_modules": ["q", "c"], "modules_to_save": ["norm"]}
    report = inspect_adapter(rewritten(saved(tmp_path / "a", **fields), change))
    layers = {layer.path: layer for layer in report.layers}
    q = layers["q"]
    assert (q.nan, q.inf, q.norm, q.effective_rank, q.energy_rank, q.spectrum) == (3, 1, None, None, None, ())
    assert not q.dead
    assert layers["c"].norm == report.norm > 0
    bias = next(other for other in report.others if other.name == "norm.bias")
    assert (bias.nan, bias.inf, bias.norm) == (0, 1, None)
    assert report.non_finite == ("q", "norm.bias")


def test_damage_and_edits_are_told(tmp_path):
    folder = saved(tmp_path / "a", target_modules=["q"])
    weights = folder / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": 7.0'))
    with pytest.warns(UserWarning, match="changed after the adapter was saved"):
        report = inspect_adapter(folder)
    assert (report.digest, report.config_state) == ("does not fit", "edited: lora_alpha")
    assert report.layers[0].scaling == 7 / 4
    config.unlink()
    assert inspect_adapter(folder).config_state == "the copy in the weights"


def test_what_cannot_be_read_or_loaded_is_a_problem(tmp_path):
    def change(tensors):
        del tensors["base_model.model.q.lora_B.weight"]
        tensors["base_model.model.c.lora_A.weight"] = torch.zeros(0)

    folder = rewritten(saved(tmp_path / "a", target_modules=["q", "c", "head"]), change)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    report = inspect_adapter(folder)
    text = "\n".join(report.problems)
    for wanted in (
        "belongs to a base whose weights this scheme changed",
        "q: has only ['A'] of A and B",
        "c: A has 0 rows, the config says rank 4",
        "c.lora_A.weight: has no numbers",
    ):
        assert wanted in text
    assert [layer.path for layer in report.layers] == ["head"]
    assert {other.name for other in report.others} == {
        "c.lora_A.weight",
        "c.lora_B.weight",
        "q.lora_A.weight",
    }
    folder = rewritten(saved(tmp_path / "b", target_modules=["q"]), dict.clear)
    assert inspect_adapter(folder).problems == ("the file has no tensors",)


VARIANTS = [
    ({"use_dora": True}, "DoRA", 1),
    ({"alora_invocation_tokens": [3, 4]}, "aLoRA", 0),
    ({"use_qalora": True, "qalora_group_size": 4}, "QA-LoRA", 0),
]


@pytest.mark.parametrize(("fields", "name", "more"), VARIANTS, ids=str)
def test_variants_are_named(tmp_path, fields, name, more):
    report = inspect_adapter(saved(tmp_path / "a", target_modules=["q"], **fields))
    assert report.variant == name
    assert name in report.notes[0]
    assert report.problems == ()
    assert [other.kind for other in report.others] == [name] * more
    assert report.layers[0].norm > 0


def test_two_variants_at_once(tmp_path):
    folder = saved(tmp_path / "a", target_modules=["q"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "use_qalora": True}))
    with pytest.warns(UserWarning, match="changed after"):
        report = inspect_adapter(folder)
    assert "ask for different kinds of adapter" in report.problems[0]


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(AdapterNotFoundError):
        inspect_adapter(tmp_path)
    folder = saved(tmp_path / "a", target_modules=["q"])
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"r": 4', '"r": -4'))
    with pytest.raises(ConfigError), pytest.warns(UserWarning, match="changed after"):
        inspect_adapter(folder)
    config.write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(b"garbage and more of it")
    with pytest.raises(AdapterFormatError):
        inspect_adapter(folder)
