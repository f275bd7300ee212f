"""A tokenizer of a few words, and models that go with it, as transformers writes them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "user",
    "assistant",
    "system",
    ":",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "yes",
    "no",
]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
)
OPAQUE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}yes {% else %}</s>{% endif %}"
"""Ends what it is given, so that no rendering is how a longer one begins."""


def tokenizer(chat=CHAT, *, begins=True):
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64,
    )  # fmt: skip
    found.chat_template = chat
    return found


def save_llama(folder, *, dtype=torch.float32, width=16, tie=False):
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        tie_word_embeddings=tie, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_bert(folder):
    from transformers import BertForMaskedLM

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    return folder
