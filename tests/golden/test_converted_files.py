"""Conversions against files that other libraries wrote by hand-written names (`convert/make.py`): to the last byte where a
format has one form only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit import LoraConfig, convert
from lorakit.checkpoint.reading import open_adapter
from lorakit.config import Matcher

GOLDEN = Path(__file__).parent / "convert"
BASE = GOLDEN / "llama"
UNET = "sdxl-peft-unet"

# source, format, golden file or folder, its files, options
WRITTEN = [
    ("llama-peft-embedding", "gguf", "llama.gguf", [""], {"base": BASE}),
    (
        "llama-peft-embedding",
        "mlx",
        "llama-mlx",
        ["adapters.safetensors", "adapter_config.json"],
        {"base": BASE},
    ),
    ("llama-peft", "torchtune", "llama-torchtune", ["adapter_config.json"], {"base": BASE}),
    ("sdxl-diffusers.safetensors", "kohya", "sdxl-kohya.safetensors", [""], {}),
    ("sdxl-kohya.safetensors", "diffusers", "sdxl-diffusers.safetensors", [""], {}),
]


@pytest.mark.parametrize(("source", "to", "wanted", "files", "options"), WRITTEN, ids=lambda v: str(v)[:20])
def test_the_bytes_written(tmp_path, source, to, wanted, files, options):
    output = tmp_path / wanted
    convert(GOLDEN / source, output, to=to, **options)
    for name in files:
        assert (output / name).read_bytes() == (GOLDEN / wanted / name).read_bytes(), name


def test_the_pickle_of_torchtune(tmp_path):
    convert(GOLDEN / "llama-peft", tmp_path / "out", to="torchtune", base=BASE)
    mine = torch.load(tmp_path / "out" / "adapter_model.pt")
    wanted = torch.load(GOLDEN / "llama-torchtune" / "adapter_model.pt")
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())


READ = [
    ("llama.gguf", "llama-peft-embedding", {"base": BASE}),
    ("llama-mlx", "llama-peft-embedding", {"base": BASE}),
    ("llama-torchtune", "llama-peft", {"base": BASE}),
    ("sdxl-diffusers.safetensors", UNET, {"component": "unet"}),
    ("sdxl-kohya.safetensors", UNET, {"component": "unet"}),
]


@pytest.mark.parametrize(("source", "wanted", "options"), READ, ids=lambda v: str(v)[:20])
def test_the_tensors_and_scalings_read(tmp_path, source, wanted, options):
    convert(GOLDEN / source, tmp_path / "out", to="peft", **options)
    mine, golden = open_adapter(tmp_path / "out").load(), open_adapter(GOLDEN / wanted).load()
    assert mine.keys() == golden.keys()
    for name, tensor in golden.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    config = LoraConfig.from_json_file(tmp_path / "out" / "adapter_config.json")
    paths = {
        re.sub(r"base_model\.model\.(.+)\.lora_.*", r"\1", name)
        for name in golden
        if "lora_A" in name or "ing_A" in name
    }
    assert set(config["target_modules"]) == paths
    matchers = [Matcher(LoraConfig.from_pretrained(folder)) for folder in (tmp_path / "out", GOLDEN / wanted)]
    for path in paths:
        assert len({(matcher.rank(path), matcher.alpha(path)) for matcher in matchers}) == 1


@pytest.mark.parametrize("side", ["text_encoder", "text_encoder_2"])
def test_one_text_encoder_of_two(tmp_path, side):
    convert(GOLDEN / "sdxl-kohya.safetensors", tmp_path / "out", to="peft", component=side)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == {"text_encoder": 2, "text_encoder_2": 0.3}[side]
    mine = load_file(tmp_path / "out" / "adapter_model.safetensors")
    with safe_open(GOLDEN / "sdxl-diffusers.safetensors", "pt") as file:
        for name, tensor in mine.items():
            assert torch.equal(tensor, file.get_tensor(name.replace("base_model.model", side)))
