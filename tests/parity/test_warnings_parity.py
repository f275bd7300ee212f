"""lorakit says nothing where there is nothing to say: attach, forward, save, load and disable are silent."""

from __future__ import annotations

import warnings

import pytest

import lorakit
from parity.models import build, output_of


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_no_warning(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lorakit.get_peft_model(build(kind), lorakit.LoraConfig(bias="lora_only"))
        output_of(model, kind)
        with model.disable_adapter():
            output_of(model, kind)
        model.save_pretrained(tmp_path)
        lorakit.PeftModel.from_pretrained(build(kind), tmp_path).merge_and_unload()
