"""`lorakit convert` from end to end, on files that transformers and lorakit wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from cli import as_json, fill_disk, refused, succeed
from conversions import save_config, save_llama
from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.checkpoint.reading import open_adapter
from lorakit.demo.model import model_folder
from models import ids, randomise, tiny_llama

GOLDEN = Path(__file__).parents[1] / "golden" / "convert"


@pytest.fixture
def adapter(tmp_path):
    save_config(tmp_path / "base")
    save_llama(tmp_path / "adapter", lora_dropout=0.1)
    return tmp_path / "adapter"


def test_a_table_and_notes(tmp_path, adapter):
    printed = succeed(
        "convert", adapter, "-o", tmp_path / "a.gguf", "--to", "gguf", "--base", tmp_path / "base"
    )
    for words in ("peft", "gguf", "modules", "note: not in the file", "lora_dropout=0.1"):
        assert words in printed


def test_there_and_back_as_json(tmp_path, adapter):
    base = ("--base", tmp_path / "base")
    told = as_json("convert", adapter, "-o", tmp_path / "a.gguf", "--to", "gguf", *base)
    assert told == {
        "output": str(tmp_path / "a.gguf"),
        "from_format": "peft",
        "to_format": "gguf",
        "components": [],
        "modules": 6,
        "parameters": told["parameters"],
        "notes": ["not in the file: lora_dropout=0.1"],
    }
    told = as_json("convert", tmp_path / "a.gguf", "-o", tmp_path / "back", "--to", "peft", *base)
    assert (told["from_format"], told["notes"]) == ("gguf", [])
    with torch.no_grad():
        outputs = [
            PeftModel.from_pretrained(tiny_llama(), folder).eval()(ids()).logits
            for folder in (adapter, tmp_path / "back")
        ]
    assert torch.equal(*outputs)


def test_minilm_by_the_names_of_its_checkpoint(tmp_path):
    """A model that no table has, under flat names."""
    encoder = transformers.AutoModel.from_pretrained(model_folder())
    peft = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=12, target_modules="all-linear")).eval()
    randomise(peft, scale=0.02)
    peft.save_pretrained(tmp_path / "a")
    names = ("--component", "text_encoder", "--base", model_folder())
    told = as_json("convert", tmp_path / "a", "-o", tmp_path / "b.safetensors", "--to", "kohya", *names)
    assert (told["modules"], told["components"]) == (37, ["text_encoder"])
    succeed("convert", tmp_path / "b.safetensors", "-o", tmp_path / "c", "--to", "peft", *names)
    before, after = open_adapter(tmp_path / "a").load(), open_adapter(tmp_path / "c").load()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fresh = transformers.AutoModel.from_pretrained(model_folder())
    again = PeftModel.from_pretrained(fresh, tmp_path / "c").eval()
    tokens = torch.tensor([[101, 2023, 2003, 102]])
    with torch.no_grad():
        assert torch.equal(again(tokens).last_hidden_state, peft(tokens).last_hidden_state)


def test_minilm_has_no_names_in_mlx(tmp_path):
    encoder = transformers.AutoModel.from_pretrained(model_folder())
    get_peft_model(encoder, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "a")
    assert "encoder.layer.0.attention.self.query" in refused(
        "convert", tmp_path / "a", "-o", tmp_path / "b", "--to", "mlx"
    )
    assert not (tmp_path / "b").exists()


def test_errors(tmp_path, adapter, monkeypatch):
    gguf = ("--to", "gguf", "--base", tmp_path / "base")
    assert "no such file" in refused("convert", tmp_path / "none", "-o", tmp_path / "a.gguf", *gguf)
    assert "--base" in refused("convert", adapter, "-o", tmp_path / "a.gguf", "--to", "gguf")
    assert "did you mean" in refused("convert", adapter, "-o", tmp_path / "a.gguf", "--to", "ggu")
    whole = (GOLDEN / "llama.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut" in refused("convert", tmp_path / "cut.gguf", "-o", tmp_path / "b", "--to", "peft", *gguf[2:])
    succeed("convert", adapter, "-o", tmp_path / "a.gguf", *gguf)
    assert "--overwrite" in refused("convert", adapter, "-o", tmp_path / "a.gguf", *gguf)
    before = (tmp_path / "a.gguf").read_bytes()
    fill_disk(monkeypatch)
    told = refused("convert", adapter, "-o", tmp_path / "a.gguf", *gguf, "--overwrite")
    assert "No space left" in told
    assert (tmp_path / "a.gguf").read_bytes() == before
