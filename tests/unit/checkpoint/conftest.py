"""A small adapter, and files built by hand."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.checkpoint.writing import write_adapter

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": {"q", "v"}}


def small_tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "base_model.model.q.lora_A.weight": torch.randn(4, 8),
        "base_model.model.q.lora_B.weight": torch.randn(8, 4, dtype=torch.bfloat16),
        "base_model.model.v.lora_A.weight": torch.randn(4, 8, dtype=torch.float16),
        "base_model.model.v.lora_B.weight": torch.randn(8, 4, dtype=torch.float64),
        "base_model.model.v.empty": torch.zeros(0, 3),
    }


def raw_file(header, data=b""):
    """The bytes of a safetensors file with this header: an object, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.fixture
def config():
    return dict(CONFIG)


@pytest.fixture
def tensors():
    return small_tensors()


@pytest.fixture
def saved(tmp_path, config, tensors):
    folder = tmp_path / "adapter"
    write_adapter(folder, config, tensors)
    return folder


@pytest.fixture
def make_tensors():
    return small_tensors


@pytest.fixture
def raw():
    return raw_file
