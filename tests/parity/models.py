"""Tiny models, configs, and pairs of equal adapters: ours and PEFT's on equal bases."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn

import lorakit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

__all__ = [
    "CASES",
    "NAMED_WARNINGS",
    "Case",
    "adapter_parameters",
    "batch",
    "build",
    "loss_of",
    "output_of",
    "pair",
    "peft",
    "randomize",
]

VOCABULARY = 61

# What PEFT and transformers say of themselves while the oracle runs. test_warnings_parity.py shows that lorakit says none of it.
NAMED_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{line}")
    for line in (
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        "Careful, disabling adapter layers with bias configured:UserWarning",
        r"Adapter '\w+'. \d+ LoRA tensor\(s\) have invalid shape:UserWarning",  # PEFT, of the bias of its own lora_B
    )
]


class Plain(nn.Module):
    """No transformers config: linears with and without bias, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.middle = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.norm(self.first(x)))))


def _llama(**extra):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, **extra,
        )
    )  # fmt: skip


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
        )
    )  # fmt: skip


_BUILDERS = {
    "llama": _llama,
    "llama_bias": lambda: _llama(attention_bias=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "plain": Plain,
}
_BUILT: dict[str, nn.Module] = {}


def build(kind, dtype=torch.float32):
    """A fresh model; every call gives the same weights. Biases are random too, so that they count."""
    if kind not in _BUILT:
        torch.manual_seed(0)
        model = _BUILDERS[kind]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name.endswith("bias"):
                    parameter.normal_(std=0.1)
        _BUILT[kind] = model.eval()
    return copy.deepcopy(_BUILT[kind]).to(dtype)


def batch(kind, dtype=torch.float32):
    """Keyword arguments for one call, with labels where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    if kind == "plain":
        return {"x": torch.randn(4, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = torch.tensor([0, 1, 2]) if kind == "bert" else ids.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def output_of(model, kind):
    """Logits of the batch."""
    out = model(**batch(kind, next(p.dtype for p in model.parameters() if p.is_floating_point())))
    return out if isinstance(out, torch.Tensor) else out.logits


def loss_of(model, kind):
    """A scalar that every part of the model takes part in."""
    out = model(**batch(kind))
    return out.square().mean() if isinstance(out, torch.Tensor) else out.loss


def randomize(model, seed=0):
    """Give every trainable parameter random values around what it has: zeros would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


def adapter_parameters(model):
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


def pair(kind, fields, *, name="default", dtype=torch.float32, seed=0, **options):
    """Our adapter and PEFT's, random and equal, on equal bases; eval mode."""
    theirs = peft.get_peft_model(build(kind, dtype), peft.LoraConfig(**fields), adapter_name=name, **options)
    randomize(theirs, seed)
    ours = lorakit.get_peft_model(
        build(kind, dtype), lorakit.LoraConfig(**fields), adapter_name=name, **options
    )
    copy_trained(theirs, ours)
    return Pair(ours.eval(), theirs.eval())


def copy_trained(source, target):
    """Values of all trainable parameters; both models must have the same."""
    values, places = adapter_parameters(source), adapter_parameters(target)
    assert values.keys() == places.keys()
    with torch.no_grad():
        for key, value in values.items():
            places[key].copy_(value)


class Case(NamedTuple):
    kind: str
    fields: dict

    def __str__(self) -> str:
        return f"{self.kind}-" + ",".join(f"{key}={value}" for key, value in self.fields.items())


QV = ["q_proj", "v_proj"]
CASES = [
    Case("llama", {"target_modules": QV}),
    Case("llama", {"target_modules": r".*\.(q|o)_proj", "r": 4, "lora_alpha": 12}),
    Case("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    Case("llama", {}),
    Case("llama", {"target_modules": QV, "r": 4, "use_rslora": True}),
    Case("llama", {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}),
    Case("llama", {"target_modules": QV, "layers_to_transform": [1]}),
    Case("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]}),
    Case("llama", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    Case("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "model.norm"]}),
    Case("llama", {"target_modules": QV, "lora_dropout": 0.5}),
    Case("llama_bias", {"target_modules": QV, "lora_bias": True}),
    Case("llama_bias", {"target_modules": QV, "bias": "all"}),
    Case("llama_bias", {"target_modules": QV, "bias": "lora_only", "modules_to_save": ["lm_head"]}),
    Case("gpt2", {"fan_in_fan_out": True}),
    Case("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    Case("gpt2", {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "bias": "all"}),
    Case("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    Case("bert", {}),
    Case("bert", {"task_type": "SEQ_CLS"}),
    Case("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "lora_only"}),
    Case("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    Case("bert", {"target_modules": ["query", "value"], "lora_bias": True, "lora_dropout": 0.3}),
    Case("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "LayerNorm"]}),
    Case("t5", {}),
    Case("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    Case("t5", {"target_modules": ["q", "v", "wi"], "modules_to_save": ["final_layer_norm"]}),
    Case("plain", {"target_modules": ["first", "middle"], "modules_to_save": ["head"]}),
    Case("plain", {"target_modules": r"first|middle", "modules_to_save": ["norm"], "bias": "lora_only"}),
    Case("plain", {"target_modules": ["first", "head"], "bias": "all", "lora_bias": True}),
]  # fmt: skip
