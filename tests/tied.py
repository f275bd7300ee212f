"""Tiny models with tied and untied embeddings, and what adapters may be asked to do to them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import transformers
from torch import nn

VOCABULARY, WIDTH = 31, 16
TOKENS, OTHERS = [5, 3], [7, 2]


def _llama(tie):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tie,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _gpt2(tie):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=tie,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _bert(tie):
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=tie, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _encoder_decoder(kind, tie, **config):
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, d_model=WIDTH, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **config
        )
    )  # fmt: skip
    if not tie:  # transformers ties these whatever it is told
        for path in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            owner = getattr(model, "model", model) if path != "lm_head" else model
            module = owner.get_submodule(path)
            module.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        model.config.tie_word_embeddings = False
    return model


def _t5(tie):
    return _encoder_decoder("T5", tie, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)


def _bart(tie):
    return _encoder_decoder(
        "Bart", tie, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, dropout=0.0, forced_eos_token_id=2,
    )  # fmt: skip


class Kind(NamedTuple):
    """A kind of model, and how its parts are called."""

    build: object
    embedding: str
    head: str
    linear: str
    tied: tuple[str, ...]
    """Paths of the tied modules, first the input embedding."""


KINDS = {
    "llama": Kind(_llama, "embed_tokens", "lm_head", "q_proj", ("model.embed_tokens", "lm_head")),
    "gpt2": Kind(_gpt2, "wte", "lm_head", "c_attn", ("transformer.wte", "lm_head")),
    "bert": Kind(
        _bert, "word_embeddings", "decoder", "query", ("bert.embeddings.word_embeddings", "cls.predictions.decoder")
    ),
    "t5": Kind(_t5, "shared", "lm_head", "q", ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    "bart": Kind(
        _bart,
        "shared",
        "lm_head",
        "q_proj",
        ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
}  # fmt: skip
_BUILT: dict[tuple[str, bool], nn.Module] = {}


def build(kind, tie, dtype=torch.float32):
    """A fresh model; every call gives the same weights. Biases are random too, so that they count."""
    if (kind, tie) not in _BUILT:
        torch.manual_seed(0)
        model = KINDS[kind].build(tie)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name.endswith("bias"):
                    parameter.normal_(std=0.1)
                if any(path in name for path in KINDS[kind].tied):
                    parameter.normal_(std=0.3)
        _BUILT[kind, tie] = model.eval()
    return copy.deepcopy(_BUILT[kind, tie]).to(dtype)


def batch(seed=1):
    """Arguments for one call; every token that rows are trained for is in it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    ids[:, 1:5] = torch.tensor([*TOKENS, *OTHERS])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.flip(1)}


def logits_of(model):
    with torch.no_grad():
        return model(**batch()).logits


class Row(NamedTuple):
    """A row of the tables in docs/tied-weights.md.

    Attributes:
        field: of the config.
        ensure: `ensure_weight_tying`.
        which: "one" is the embedding, "head" the head, "both"; of tokens also "list", "same", "different".
    """

    field: str
    ensure: bool
    which: str

    def config(self, kind, **more):
        """The fields of its config on one kind of model."""
        about = KINDS[kind]
        names = {"one": [about.embedding], "head": [about.head], "both": [about.embedding, about.head]}
        tokens = {
            "list": list(TOKENS),
            "one": {about.embedding: list(TOKENS)},
            "head": {about.head: list(TOKENS)},
            "same": {about.embedding: list(TOKENS), about.head: list(TOKENS)},
            "different": {about.embedding: list(TOKENS), about.head: list(OTHERS)},
        }
        fields = {
            "target_modules": [about.linear],
            "ensure_weight_tying": self.ensure,
            "r": 4,
            "lora_alpha": 6,
        }
        if self.field == "modules_to_save":
            fields["modules_to_save"] = names[self.which]
        elif self.field == "target_modules":
            fields["target_modules"] = [about.linear, *names[self.which]]
        else:
            fields["trainable_token_indices"] = tokens[self.which]
        if kind == "gpt2":
            fields["fan_in_fan_out"] = True
        return {**fields, **more}

    def __str__(self):
        return f"{self.field}-{self.which}-{'ensure' if self.ensure else 'plain'}"


ROWS = [
    *(
        Row(field, ensure, which)
        for field in ("modules_to_save", "target_modules")
        for ensure in (False, True)
        for which in ("one", "head", "both")
    ),
    *(
        Row("trainable_token_indices", ensure, which)
        for ensure in (False, True)
        for which in ("list", "one", "head", "same", "different")
    ),
]
