"""PEFT as the judge of which weights have the smallest condition numbers."""

from __future__ import annotations

import pytest
import torch
import transformers

import lorakit
from lorakit.kappa import condition_numbers
from parity.models import NAMED_WARNINGS, build, peft

pytestmark = NAMED_WARNINGS


def qwen():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


MODELS = {
    "llama": lambda: build("llama"),
    "bert": lambda: build("bert"),
    "t5": lambda: build("t5"),
    "qwen": qwen,
}


@pytest.mark.parametrize("top_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_targets(kind, top_p):
    wanted = peft.find_kappa_target_modules(MODELS[kind](), top_p=top_p, show_progress=False)
    found = lorakit.find_kappa_target_modules(MODELS[kind](), top_p=top_p, show_progress=False)
    assert found == wanted
    assert (found["target_parameters"] is None) == (kind != "qwen")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_numbers(dtype):
    selector = peft.helpers.KappaTuneSelector(qwen().to(dtype), show_progress=False)
    selector.get_best_targets()
    found = condition_numbers(qwen().to(dtype), show_progress=False)
    assert found.modules == pytest.approx(selector._condition_numbers, rel=1e-3)
    assert found.parameters == pytest.approx(selector._parameter_condition_numbers, rel=1e-3)
