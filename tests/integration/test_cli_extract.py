"""`lorakit extract` on checkpoints that transformers wrote, MiniLM among them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli import as_json, fill_disk, refused, run, succeed
from lorakit import LoraConfig, PeftModel, get_peft_model
from models import logits, randomise, tiny_llama
from rss import megabytes_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base in shards, a fine-tune of its projections, and one whose weights are cut off."""
    root = tmp_path_factory.mktemp("checkpoints")
    base = tiny_llama()
    base.save_pretrained(root / "base", max_shard_size="2KB")
    with torch.no_grad():
        for number, (name, parameter) in enumerate(base.named_parameters()):
            if "_proj" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
                )
    base.save_pretrained(root / "tuned")
    with torch.no_grad():
        base.model.norm.weight.mul_(1.5)
    base.save_pretrained(root / "normed")
    base.save_pretrained(root / "short")
    raw = (root / "short" / "model.safetensors").read_bytes()
    (root / "short" / "model.safetensors").write_bytes(raw[:-3])
    return root


def test_the_verb(folders, tmp_path):
    text = succeed("extract", folders / "base", folders / "tuned", "-o", tmp_path / "a", "--rank", "4")
    assert "model.layers.1.mlp.down_proj" in text
    assert "14 weights as factors, 0 tensors whole, 7 unchanged" in text
    told = as_json(
        "extract", folders / "base", folders / "tuned", "-o", tmp_path / "b", "--energy", "0.999999"
    )
    assert all(layer["kept"] > 0.99999 for layer in told["layers"])
    found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval())
    wanted = logits(type(tiny_llama()).from_pretrained(folders / "tuned").eval())
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


def test_the_way_back_from_a_merge(folders, tmp_path):
    """Merged by one verb and taken out by another: the same adapter."""
    peft = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    randomise(peft)
    peft.save_pretrained(tmp_path / "adapter")
    succeed("merge", folders / "base", tmp_path / "adapter", "-o", tmp_path / "merged")
    told = as_json("extract", folders / "base", tmp_path / "merged", "-o", tmp_path / "back", "-e", "0.99999")
    assert {layer["rank"] for layer in told["layers"]} == {3}
    assert as_json("diff", tmp_path / "adapter", tmp_path / "back")["difference"] < 3e-3


def test_whole_modules_and_what_is_left_out(folders, tmp_path):
    call = ["extract", folders / "base", folders / "normed", "-r", "4"]
    assert "model.norm.weight: changed by" in refused(*call, "-o", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert as_json(*call, "-o", tmp_path / "a", "-s", "model.norm")["whole"] == ["model.norm.weight"]
    assert "left out: model.norm.weight, a change of 3.33e-01" in succeed(
        *call, "-o", tmp_path / "b", "--ignore", "norm"
    )


def test_minilm(tmp_path):
    """Every linear layer of a real model, trained for a step and taken out again at full rank."""
    from transformers import AutoModel

    from lorakit.demo.model import model_folder

    base = AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "layer.2." in name and parameter.ndim == 2:
                low = torch.randn(parameter.shape[0], 6, generator=generator)
                parameter.add_(low @ torch.randn(6, parameter.shape[1], generator=generator) * 1e-3)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    told = as_json(
        "extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "a", "--energy", "0.9999"
    )
    assert {layer["rank"] for layer in told["layers"]} == {6}
    assert len(told["layers"]) == 6
    found = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


BAD = [
    (["base", "tuned"], 2, None),
    (["base", "tuned", "-o", "out"], 1, "say how large"),
    (["base", "base", "-o", "out", "-r", "2"], 1, "the same numbers"),
    (["base", "none", "-o", "out", "-r", "2"], 1, "no such folder"),
    (["none", "tuned", "-o", "out", "-r", "2"], 1, "no such folder"),
    (["base", "short", "-o", "out", "-r", "2"], 1, "cut off"),
    (["base", "tuned", "-o", "out", "-r", "2", "-t", "q_prj"], 1, "did you mean"),
    (["base", "tuned", "-o", "out", "-r", "2", "--bias", "some"], 2, None),
    (["base", "tuned", "-o", "out", "-r", "2", "--dtype", "int8"], 1, "dtype='int8'"),
]


@pytest.mark.parametrize(
    ("call", "code", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_refused(folders, monkeypatch, call, code, words):
    monkeypatch.chdir(folders)
    if code == 2:
        assert run("extract", *call).exit_code == 2
    else:
        assert words in refused("extract", *call)
    assert not (folders / "out").exists()


def test_a_full_disk(folders, tmp_path, monkeypatch):
    call = ["extract", folders / "base", folders / "tuned", "-o", tmp_path / "a", "-r", "2", "--overwrite"]
    succeed(*call)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert "No space left" in refused(*call)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_help_has_an_example():
    assert "Example: lorakit extract" in " ".join(succeed("extract", "--help").split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_tensors_and_not_the_model(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 20, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="50MB")  # 129 MB
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.add_(torch.randn(parameter.shape[0], 1) @ torch.randn(1, parameter.shape[1]) * 0.01)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="50MB")
    call = (
        f"extract({str(tmp_path / 'base')!r}, {str(tmp_path / 'tuned')!r}, {str(tmp_path / 'out')!r}, rank=2)"
    )
    imports = "from lorakit import extract\nfrom transformers import LlamaForCausalLM"
    assert 8 < megabytes_of(imports, call) < 110  # 74 were seen, half of them code
