"""Merges on disk for models of many kinds, as transformers stores them: the bits of a merge in memory."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from lorakit import LoraConfig
from merging import compare, quiet

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**ENCODER, "image_size": 16, "patch_size": 8}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
VL_TEXT = {
    **TEXT,
    "head_dim": 8,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,  # so that the down projections are square
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
}
VL_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
}
LATENT = {
    **TEXT,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SPEECH = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    **ENDS,
}
QWEN = {**TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPT = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
BERT = {**ENCODER, "vocab_size": 40, "max_position_embeddings": 16}

# class, config, target_modules, target_parameters, what is untied
MODELS = {
    "llava": (
        t.LlavaForConditionalGeneration,
        lambda: t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION)),
        ["q_proj", "down_proj", "fc1"],
        None,
        0,
    ),
    "gpt_neox": (
        t.GPTNeoXForCausalLM,
        lambda: t.GPTNeoXConfig(**BERT),
        ["query_key_value", "lm_head"],
        None,
        0,
    ),
    "opt": (t.OPTForCausalLM, lambda: t.OPTConfig(**OPT), ["q_proj", "lm_head"], None, 1),
    "phi3": (t.Phi3ForCausalLM, lambda: t.Phi3Config(**TEXT), ["qkv_proj", "gate_up_proj"], None, 0),
    "clip": (
        t.CLIPModel,
        lambda: t.CLIPConfig(
            text_config={**BERT, **ENDS, "pad_token_id": 1}, vision_config=VISION, projection_dim=16
        ),
        ["q_proj", "fc1"],
        None,
        0,
    ),
    "whisper": (
        t.WhisperForConditionalGeneration,
        lambda: t.WhisperConfig(**SPEECH),
        ["q_proj", "fc1"],
        None,
        0,
    ),
    "gemma3": (
        t.Gemma3ForCausalLM,
        lambda: t.Gemma3TextConfig(**TEXT, head_dim=8),
        ["q_proj", "embed_tokens"],
        None,
        1,
    ),
    "bert": (t.BertForMaskedLM, lambda: t.BertConfig(**BERT), ["query", "word_embeddings"], None, 2),
    "swin": (
        t.SwinForImageClassification,
        lambda: t.SwinConfig(**WINDOWS, num_labels=3),
        ["q_proj", "fc1"],
        None,
        0,
    ),
    "qwen3_moe": (t.Qwen3MoeForCausalLM, lambda: t.Qwen3MoeConfig(**QWEN), ["q_proj"], EXPERTS, 0),
    "deepseek_v3": (
        t.DeepseekV3ForCausalLM,
        lambda: t.DeepseekV3Config(**LATENT),
        ["q_a_proj", "gate_proj", "down_proj"],
        EXPERTS,
        0,
    ),
    "granitemoe": (
        t.GraniteMoeForCausalLM,
        lambda: t.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
        ["q_proj"],
        EXPERTS,
        0,
    ),
    "qwen3_vl_moe": (
        t.Qwen3VLMoeForConditionalGeneration,
        lambda: t.Qwen3VLMoeConfig(text_config=VL_TEXT, vision_config=VL_VISION),
        ["q_proj"],
        EXPERTS,
        0,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_a_merge_in_memory(tmp_path, name):
    kind, config, targets, parameters, untied = MODELS[name]

    def make():
        torch.manual_seed(1)
        return kind(config()).eval()

    adapter = LoraConfig(r=4, target_modules=targets, target_parameters=parameters)
    with quiet():
        report = compare(tmp_path, make, [adapter], verify=True)
    assert len(report.untied) == untied
