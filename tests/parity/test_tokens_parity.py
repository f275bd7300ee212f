"""Trained rows of embeddings and heads: the same numbers, gradients, files and refusals as PEFT's.

Where PEFT does otherwise: rows of one of several tied modules are merged into all of these, and the bias of a head is
left out. Where lorakit does more: rows and factors on one embedding, rows without any factors, two adapters with rows
at once.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

import lorakit
from parity.models import NAMED_WARNINGS, peft, randomize
from tied import OTHERS, TOKENS, VOCABULARY, batch, build, logits_of

pytestmark = [
    *NAMED_WARNINGS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"
    ),
]
DELTA = "trainable_tokens_delta"


def fields(tokens=None, **more):
    tokens = list(TOKENS) if tokens is None else tokens
    return {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": tokens, **more}


def both(make, config, **options):
    """Equal adapters of both on equal models; ours is loaded from the file of theirs."""
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config), **options).eval()
    ours = lorakit.get_peft_model(make(), lorakit.LoraConfig(**config), **options).eval()
    randomize(theirs, 1)
    values = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    places = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert values.keys() == places.keys()
    with torch.no_grad():
        for name, value in values.items():
            assert value.dtype == places[name].dtype
            places[name].copy_(value)
    return ours, theirs


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [True, False])
def test_numbers_and_gradients(tie, dtype, widen):
    ours, theirs = both(lambda: build("llama", tie, dtype), fields(), autocast_adapter_dtype=widen)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    close = {
        torch.float32: {"rtol": 1e-6, "atol": 1e-6},
        torch.bfloat16: {"rtol": 0.03, "atol": 0.03},
        torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    }[dtype]
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **close)
    grads = []
    for model in (ours, theirs):
        model(**batch()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in grads[1].items():
        found = grads[0][name].float()
        size = gradient.float().abs().max()
        torch.testing.assert_close(
            found, gradient.float(), rtol=0, atol=float(size) * (1e-5 if dtype is torch.float32 else 0.05)
        )


def gemma():
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def opt():
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0, pad_token_id=1,
        )
    ).eval()  # fmt: skip


class ReadsWeight(nn.Module):
    """A model that makes its output with the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 16)
        self.q_proj = nn.Linear(16, 16)

    def forward(self, input_ids, labels, attention_mask):
        logits = linear(torch.tanh(self.q_proj(self.words(input_ids))), self.words.weight)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


MODELS = {
    "gemma3": (gemma, fields()),
    "opt": (opt, fields()),
    "opt, padding": (opt, fields([1, 5])),
    "reads the weight": (ReadsWeight, fields({"words": TOKENS})),
    "t5": (lambda: build("t5", True), fields(target_modules=["q"])),
    "t5, encoder": (
        lambda: build("t5", True),
        fields({"encoder.embed_tokens": TOKENS}, target_modules=["q"]),
    ),
    "gpt2": (lambda: build("gpt2", True), fields(target_modules=["c_attn"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_files(name, tmp_path):
    make, config = MODELS[name]
    ours, theirs = both(make, config)
    wanted = logits_of(theirs)
    torch.testing.assert_close(logits_of(ours), wanted, rtol=1e-6, atol=1e-6)
    for model in (ours, theirs):
        model(**batch()).loss.backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    for key, p in theirs.named_parameters():
        if p.requires_grad and p.grad is not None:
            torch.testing.assert_close(mine[key], p.grad, rtol=1e-4, atol=1e-6, msg=key)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], tensor) for key, tensor in files[1].items())
    for library, folder in ((lorakit, "theirs"), (peft, "ours")):
        found = library.PeftModel.from_pretrained(make(), tmp_path / folder)
        torch.testing.assert_close(logits_of(found), wanted, rtol=1e-6, atol=1e-6)
    parts = name == "t5, encoder"
    with pytest.warns(UserWarning, match="shared a weight") if parts else nullcontext():
        merged = logits_of(ours.merge_and_unload())
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    off = (logits_of(theirs.merge_and_unload()) - wanted).abs().max()
    assert (off > 0.1) == parts  # PEFT writes the rows of one of several tied modules into all


@pytest.mark.parametrize("tie", [True, False])
def test_several_adapters(tie):
    ours, theirs = both(lambda: build("llama", tie), fields())
    for model, library in ((ours, lorakit), (theirs, peft)):
        model.add_adapter("other", library.LoraConfig(**fields(OTHERS)))
        model.add_adapter("same", library.LoraConfig(**fields([TOKENS[1], 9])))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if ".other" in name or ".same" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    for names in ("other", "same", "default"):
        for model in (ours, theirs):
            model.set_adapter(names)
        torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-6, atol=1e-6)
    with pytest.raises(lorakit.errors.AdapterStateError, match="each replace the row"):
        ours.set_adapter(["default", "same"])
    for names in (["default", "same"], ["default", "other"]):
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            theirs.base_model.set_adapter(names)
    for model in (ours, theirs):
        model.set_adapter("default")
    given = {key: torch.cat([value, value]) for key, value in batch().items() if key != "labels"}
    names = ["same", "__base__", "default", "other"]
    with torch.no_grad():
        found = [model(**given, adapter_names=names).logits for model in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    for model in (ours, theirs):
        model.delete_adapter("same")
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tie", [True, False])
def test_a_vocabulary_that_grew(tie, tmp_path):
    """PEFT puts the whole embeddings into the file; they are passed over or taken, as the user says."""

    def grown():
        model = build("llama", tie)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(VOCABULARY + 2)
        return model

    theirs = peft.get_peft_model(grown(), peft.LoraConfig(**fields([VOCABULARY, 4]))).eval()
    randomize(theirs, 1)
    theirs.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    assert any(
        key.endswith("base_layer.weight") for key in load_file(tmp_path / "all" / "adapter_model.safetensors")
    )
    found = lorakit.PeftModel.from_pretrained(grown(), tmp_path / "all")
    torch.testing.assert_close(logits_of(found), logits_of(theirs), rtol=1e-6, atol=1e-6)
    other = grown()
    nn.init.normal_(other.model.embed_tokens.weight)
    found = lorakit.PeftModel.from_pretrained(other, tmp_path / "all", allow_base_weights=True)
    torch.testing.assert_close(logits_of(found), logits_of(theirs), rtol=1e-6, atol=1e-6)


def test_what_only_lorakit_does(tmp_path):
    alone = fields(target_modules=[])
    ours = lorakit.get_peft_model(build("llama", True), lorakit.LoraConfig(**alone))
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.embed_tokens.token_adapter.{DELTA}.default"
    ]
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(build("llama", True), peft.LoraConfig(**alone))
    on_one = fields(target_modules=["embed_tokens"])
    with pytest.raises((ValueError, TypeError)):
        peft.get_peft_model(build("llama", False), peft.LoraConfig(**on_one))
    lorakit.get_peft_model(build("llama", False), lorakit.LoraConfig(**on_one))
