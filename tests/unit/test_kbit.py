"""`prepare_model_for_kbit_training`: frozen, widened, checkpointed; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import (
    AdapterStateError,
    LoraConfig,
    UnsupportedError,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from models import Snapshot, tiny, tiny_llama
from quantised import BY_NAME, KINDS, Pair, pieces


def quantised_llama(kind=BY_NAME["nf4-double"], dtype=torch.bfloat16):
    """A tiny Llama whose MLPs are quantised, of sizes that every kind takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj = kind.quantised(layer.mlp.up_proj)
        layer.mlp.down_proj = kind.quantised(layer.mlp.down_proj)
    return model


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_quantised_stays_and_the_rest_is_widened_where_its_library_allows_it(kind):
    model = Pair(kind, torch.bfloat16)
    before = [pieces(layer) for layer in (model.up, model.down)]
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) is model
    wanted = torch.float32 if "bitsandbytes" in kind.codec.name else torch.bfloat16
    for module in (model.embed, model.norm, model.widen):
        assert {parameter.dtype for parameter in module.parameters()} == {wanted}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for layer, was in zip((model.up, model.down), before, strict=True):
        now = pieces(layer)
        assert {name: now[name] for name in now if name != "bias"} == {
            name: was[name] for name in was if name != "bias"
        }


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_a_quantised_base_gets_checkpointing_and_gradients_reach_every_adapter(options):
    model = prepare_model_for_kbit_training(quantised_llama(), gradient_checkpointing_kwargs=options)
    assert checkpoints(model)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(6)[None]
    peft.train()
    peft(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())


def test_the_same_gradients_with_and_without_checkpointing():
    grads = []
    for checkpointing in (True, False):
        model = prepare_model_for_kbit_training(quantised_llama(), checkpointing)
        assert checkpoints(model) == checkpointing
        torch.manual_seed(4)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        ids = torch.arange(6)[None]
        peft.train()
        peft(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in peft.parameters() if parameter.requires_grad])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_base_that_is_not_quantised_is_frozen_and_widened_alone():
    model = prepare_model_for_kbit_training(tiny_llama().to(torch.float16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not checkpoints(model)


def test_a_model_without_a_way_to_widen_its_inputs_gradient_gets_a_hook():
    model = Pair(BY_NAME["nf4"])
    model.gradient_checkpointing_enable = lambda options: setattr(model, "options", options)
    model.get_input_embeddings = lambda: model.embed
    prepare_model_for_kbit_training(model)
    assert model.options is None
    assert model.embed(torch.arange(3)).requires_grad


def test_a_model_with_adapters_is_refused():
    peft = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = Snapshot(peft)
    for model in (peft, peft.base_model, peft.get_base_model()):
        with pytest.raises(AdapterStateError, match="adapters"):
            prepare_model_for_kbit_training(model)
    before.assert_same(peft)


def test_a_quantised_model_that_cannot_checkpoint_is_refused_untouched():
    model = Pair(BY_NAME["nf4"], torch.bfloat16)
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match="use_gradient_checkpointing=False"):
        prepare_model_for_kbit_training(model)
    before.assert_same(model)
    assert isinstance(model.widen, nn.Linear)
