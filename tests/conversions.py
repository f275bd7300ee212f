"""Adapters of a tiny llama and what conversions ask of their base, for tests."""

from __future__ import annotations

import json

import torch

from lorakit import LoraConfig, get_peft_model
from models import randomise, tiny_llama

TARGETS = ["q_proj", "k_proj", "down_proj"]
OUTPUTS = {"gguf": "there.gguf", "mlx": "there", "torchtune": "there", "kohya": "there.safetensors"}


def save_llama(folder, *, seed=0, dtype=torch.float32, **fields):
    """An adapter of a tiny llama, trained-looking; gives the model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields}
    peft = get_peft_model(tiny_llama(), LoraConfig(**settings))
    randomise(peft, seed=seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(folder)
    return peft.eval()


def save_config(folder, **fields):
    """A base's folder with nothing but its config."""
    folder.mkdir()
    config = json.loads(tiny_llama().config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
