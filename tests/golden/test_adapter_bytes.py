"""The bytes of a saved adapter, to the last one: the format does not change by accident.

`adapter/` was written once by `write_adapter`; if a change of the format is meant, write it anew and say so in the
changelog.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import write_adapter

GOLDEN = Path(__file__).parent / "adapter"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": {"v", "q"}, "note": "\u00e9"}


def tensors():
    numbers = torch.arange(6, dtype=torch.float32)
    return {
        "base_model.model.v.lora_B.weight": (numbers / 4).to(torch.bfloat16).reshape(3, 2),
        "base_model.model.q.lora_A.weight": numbers.reshape(3, 2).t(),
        "base_model.model.q.lora_B.weight": -numbers.reshape(3, 2),
        "base_model.model.v.lora_A.weight": numbers.half().reshape(2, 3),
        "base_model.model.v.wide": numbers.double()[:1],
    }


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_written_bytes(tmp_path, name):
    write_adapter(tmp_path, CONFIG, tensors())
    assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_read_back():
    loaded = open_adapter(GOLDEN).load()
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors().items())
