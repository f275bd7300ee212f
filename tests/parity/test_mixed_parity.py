"""Batches with an adapter for each sample: PEFT's outputs, where PEFT has the feature."""

from __future__ import annotations

import pytest
import torch

import lorakit
from parity.models import NAMED_WARNINGS, build, peft

pytestmark = NAMED_WARNINGS

CASES = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "llama_bias": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "value", "word_embeddings"], "task_type": "SEQ_CLS"},
    "t5": {"target_modules": ["q", "v", "wi"]},
}
NAMES = ["one", "two", "__base__", "three", "two"]


def both(kind):
    """Our model and PEFT's with the same three adapters."""
    models = []
    for library in (lorakit, peft):
        model = library.get_peft_model(
            build(kind), library.LoraConfig(r=2, lora_alpha=6, **CASES[kind]), adapter_name="one"
        )
        model.add_adapter("two", library.LoraConfig(r=4, lora_alpha=6, **CASES[kind]))
        model.add_adapter("three", library.LoraConfig(r=6, lora_alpha=6, use_rslora=True, **CASES[kind]))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, tensor in sorted(model.state_dict().items()):
                if any(part in _ for part in ("lora_", "modules_to_save")):
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        models.append(model.eval())
    theirs = models[1].state_dict()
    assert models[0].state_dict().keys() == theirs.keys()
    models[0].load_state_dict(theirs)
    return models


def inputs(kind):
    ids = torch.randint(3, 61, (len(NAMES), 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids} if kind == "t5" else {"input_ids": ids}


# a tied embedding on its own is a note of ours and a warning of PEFT's
@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", list(CASES))
def test_the_same_outputs(kind):
    ours, theirs = both(kind)
    with torch.no_grad():
        found = ours(**inputs(kind), adapter_names=NAMES).logits
        wanted = theirs(**inputs(kind), adapter_names=NAMES).logits
        base = ours(**inputs(kind), adapter_names=["__base__"] * len(NAMES)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().amax(dim=tuple(range(1, base.ndim))).argmin() == 2


def test_the_same_tokens():
    ours, theirs = both("llama")
    options = {**inputs("llama"), "max_new_tokens": 5, "do_sample": False, "adapter_names": NAMES}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
