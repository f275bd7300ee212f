"""What is adapted where `target_modules` is left out, by `model_type` of a transformers config.

The choice is that of the LoRA paper (query and value projections, arXiv:2106.09685) under each architecture's own
names; fused projections are taken whole. A string is a regular expression for whole paths.
"""

from __future__ import annotations

# fmt: off
_WITH_Q_V_PROJ = (
    "bart", "biogpt", "clip", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gptj", "gpt_neo", "granite", "hubert", "llama", "llama4", "m2m_100", "marian",
    "mbart", "mistral", "mixtral", "olmo", "olmo2", "opt", "pegasus", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "wav2vec2", "whisper", "xglm",
)
# fmt: on
_Q_V_PROJ = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5", "longt5", "umt5", "mpnet"), ("q", "v")),
    **dict.fromkeys(_WITH_Q_V_PROJ, _Q_V_PROJ),
    **dict.fromkeys(
        ("albert", "bert", "camembert", "electra", "layoutlm", "roberta", "xlm-roberta"), _QUERY_VALUE
    ),
    **dict.fromkeys(
        ("bloom", "chatglm", "falcon", "gpt_neox", "persimmon", "RefinedWeb", "RefinedWebModel"), _FUSED
    ),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "modernbert": ("Wqkv",),
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

SEQ_CLS_HEADS = ("classifier", "score")
"""Names of the heads of sequence classifiers: trained whole, so "all-linear" leaves them out."""
