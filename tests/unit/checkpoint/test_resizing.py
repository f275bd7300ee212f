"""Resizing files: the best delta of the new rank, the same effect where nothing is lost, and all else as it was."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from integration.oracle import KINDS, ids, zoo
from lorakit import LoraConfig, PeftModel, get_peft_model, resize
from lorakit.checkpoint.sites import read_source
from lorakit.errors import AdapterNotFoundError, ConfigError, NonFiniteError, UnsupportedError
from models import randomise, tiny_llama, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")


def saved(folder, base=None, *, seed=0, **fields):
    peft = get_peft_model(base or zoo(), LoraConfig(**{"r": 4, "lora_alpha": 6.0, **fields}))
    randomise(peft, seed=seed)
    peft.save_pretrained(folder)
    return peft.eval()


def output(model):
    with torch.no_grad():
        return model(ids())


def deltas(folder):
    """The dense delta of every block of every weight."""
    sites = read_source(folder, instead="").sites
    return {
        (path, number): block.delta(torch.float64)
        for path, site in sites.items()
        for number, block in enumerate(site.blocks)
    }


# Patterns beside target_parameters cannot be read from a file.
PATTERNS = {"rank_pattern": {}, "alpha_pattern": {}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"rank": 12}, {"energy": 1.0}], ids=str)
def test_nothing_lost_is_nothing_changed(tmp_path, kind, options):
    peft = saved(tmp_path / "a", **{**KINDS[kind][0], **PATTERNS})
    told = resize(tmp_path / "a", tmp_path / "b", **options)
    fresh = PeftModel.from_pretrained(zoo(), tmp_path / "b").eval()
    torch.testing.assert_close(output(fresh), output(peft), rtol=1e-10, atol=1e-12)
    assert all(layer.error < 1e-12 for layer in told.layers)
    assert told.kept == pytest.approx(1.0, abs=1e-12)
    if "rank" in options:
        assert {layer.rank for layer in told.layers} == {12}


@pytest.mark.parametrize("kind", ["matrices", "lookup", "groups", "attention"])
def test_the_best_of_the_new_rank(tmp_path, kind):
    saved(tmp_path / "a", **KINDS[kind][0])
    told = resize(tmp_path / "a", tmp_path / "b", rank=2)
    before, after = deltas(tmp_path / "a"), deltas(tmp_path / "b")
    assert before.keys() == after.keys()
    lost: dict[str, float] = {}
    for (path, number), wanted in before.items():
        U, S, Vh = torch.linalg.svd(wanted)
        k = 1 if path == "grouped" else 2  # two groups share the ranks
        best = (U[:, :k] * S[:k]) @ Vh[:k]
        torch.testing.assert_close(after[path, number], best, rtol=1e-9, atol=1e-11)
        lost[path] = lost.get(path, 0.0) + float(S[k:].square().sum())
    for layer in told.layers:
        assert (layer.error * layer.norm) ** 2 == pytest.approx(lost[layer.path], rel=1e-9)
        assert layer.kept == pytest.approx(1 - layer.error**2)
        assert (layer.rank_before, layer.rank) == (4, 2)
    assert 0.2 < told.kept < 0.999


def test_energy_gives_every_weight_its_own_rank(tmp_path):
    peft = saved(tmp_path / "a", target_modules=["q", "c", "head"], r=6)
    with torch.no_grad():  # q of rank 1, c of falling size, head of zero
        peft.base_model.model.q.lora_B["default"].weight[:, 1:] = 0
        peft.base_model.model.c.lora_B["default"].weight.mul_(10.0 ** -torch.arange(6.0))
        peft.base_model.model.head.lora_B["default"].weight.zero_()
    peft.save_pretrained(tmp_path / "a")
    told = resize(tmp_path / "a", tmp_path / "b", energy=0.99)
    ranks = {layer.path: layer.rank for layer in told.layers}
    assert ranks["q"] == ranks["head"] == 1
    assert 1 <= ranks["c"] <= 2
    assert all(layer.kept >= 0.99 for layer in told.layers)
    capped = resize(tmp_path / "a", tmp_path / "c", energy=0.9999999, rank=2)
    assert {layer.rank for layer in capped.layers} == {1, 2}
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert config["rank_pattern"] == {"^c": 2}
    assert config["lora_alpha"] == 1  # the scaling of 6 / 6 stays
    assert config["alpha_pattern"] == {"^c": 2.0}
    head = load_file(tmp_path / "c" / "adapter_model.safetensors")["base_model.model.head.lora_A.weight"]
    assert float(head.norm()) > 0  # a row of zeros in A and B would never train
    fresh = PeftModel.from_pretrained(zoo(), tmp_path / "c").eval()
    torch.testing.assert_close(output(fresh), output(peft), rtol=1e-2, atol=1e-2)


def test_scalings_stay(tmp_path):
    fields = {
        "target_modules": ["q", "c"],
        "use_rslora": True,
        "rank_pattern": {"q": 9},
        "alpha_pattern": {"c": 3.0},
    }
    saved(tmp_path / "a", **fields)
    before = read_source(tmp_path / "a", instead="").sites
    resize(tmp_path / "a", tmp_path / "b", rank=3)
    after = read_source(tmp_path / "b", instead="").sites
    for path, site in before.items():
        assert after[path].blocks[0].scaling == pytest.approx(site.blocks[0].scaling, rel=1e-15)
    A, B = after["q"].blocks[0].A, after["q"].blocks[0].B
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-9, atol=0)  # shared evenly


def test_all_else_is_carried_over(tmp_path):
    fields = {
        "target_modules": ["q", "conv"],
        "bias": "lora_only",
        "lora_bias": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed": [7, 4]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(tmp_path / "a", **fields)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace('"alpha_pattern"', '"x_of_another_tool": 3, "alpha_pattern"'))
    with pytest.warns(UserWarning, match="x_of_another_tool"):
        resize(tmp_path / "a", tmp_path / "b", rank=2)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if "lora_A" not in key and "lora_B.weight" not in key:
            assert torch.equal(after[key], tensor), key
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["x_of_another_tool"] == 3
    assert config["trainable_token_indices"] == {"embed": [7, 4]}


def test_tied_factors_stay_tied(tmp_path):
    base = tiny_llama(tie=True)
    peft = get_peft_model(
        base, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    )
    randomise(peft)
    peft.save_pretrained(tmp_path / "a")
    resize(tmp_path / "a", tmp_path / "b", rank=2)
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    A = tensors["base_model.model.lm_head.lora_A.weight"]
    assert torch.equal(A, tensors["base_model.model.model.embed_tokens.lora_embedding_B"].t())
    fresh = PeftModel.from_pretrained(tiny_llama(tie=True), tmp_path / "b")
    assert fresh.get_nb_trainable_parameters()[1] < peft.get_nb_trainable_parameters()[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_stay_and_their_rounding_is_told(tmp_path, dtype):
    peft = with_adapter(tiny_llama(), target_modules=["q_proj", "v_proj"], r=4)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(tmp_path / "a")
    told = resize(tmp_path / "a", tmp_path / "b", rank=4)
    after = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    eps = torch.finfo(dtype).eps
    assert all(1e-3 * eps < layer.error < 2 * eps for layer in told.layers)
    again = resize(tmp_path / "a", tmp_path / "c", rank=4)
    assert again.layers == told.layers
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "bc"]
    assert files[0] == files[1]


BAD = [
    ({}, ConfigError, "say how large"),
    ({"rank": 0}, ConfigError, "rank=0"),
    ({"rank": True}, ConfigError, "rank=True"),
    ({"rank": 2.0}, ConfigError, "rank=2.0"),
    ({"energy": 0.0}, ConfigError, "energy=0.0"),
    ({"energy": 1.5}, ConfigError, "energy=1.5"),
    ({"energy": float("nan")}, ConfigError, "energy=nan"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=str)
def test_wrong_requests(tmp_path, options, error, words):
    saved(tmp_path / "a", target_modules=["q"])
    with pytest.raises(error, match=words):
        resize(tmp_path / "a", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_resized(tmp_path):
    with pytest.raises(AdapterNotFoundError):
        resize(tmp_path / "none", tmp_path / "b", rank=2)
    saved(tmp_path / "dora", target_modules=["q"], use_dora=True)
    with pytest.raises(UnsupportedError, match=r"DoRA is more than its factors.*lorakit extract"):
        resize(tmp_path / "dora", tmp_path / "b", rank=2)
    saved(tmp_path / "a", target_modules=["q"])
    raw = bytearray((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    raw[-8:] = b"\xff" * 8
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "adapter_model.safetensors").write_bytes(
        raw.replace(b"lorakit.digest", b"lorakit.unused")
    )
    (tmp_path / "nan" / "adapter_config.json").write_bytes(
        (tmp_path / "a" / "adapter_config.json").read_bytes()
    )
    with pytest.raises(NonFiniteError):
        resize(tmp_path / "nan", tmp_path / "b", rank=2)
    assert not (tmp_path / "b").exists()


def test_an_adapter_is_replaced_only_when_asked_and_in_place(tmp_path):
    peft = saved(tmp_path / "a", target_modules=["q"])
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="an adapter is there already"):
        resize(tmp_path / "a", tmp_path / "a", rank=8)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    resize(tmp_path / "a", tmp_path / "a", rank=8, overwrite=True)
    fresh = PeftModel.from_pretrained(zoo(), tmp_path / "a").eval()
    torch.testing.assert_close(output(fresh), output(peft), rtol=1e-10, atol=1e-12)


def test_progress(tmp_path):
    saved(tmp_path / "a", target_modules=["q", "c"])
    seen = []
    resize(tmp_path / "a", tmp_path / "b", rank=2, progress=lambda *step: seen.append(step))
    assert seen[0] == ("decomposing", 0, 2)
    assert seen[-1] == ("decomposing", 2, 2)
