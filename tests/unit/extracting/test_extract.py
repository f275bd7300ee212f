"""A fine-tune out of two checkpoints: loaded on the base it is the tuned model, as far as its rank lets it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import PeftModel, extract
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    NonFiniteError,
    UnsupportedError,
)
from lorakit.extracting.factoring import factored
from lorakit.layouts import matrix_layout
from models import ids, logits, tiny_bert, tiny_llama


def tiny_gpt2(seed=1):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def tiny_vit(seed=1):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()


def changed(model, pattern="", scale=0.1, rank=None, dtype=None):
    """The model with noise added to every parameter whose name holds the pattern; of a rank, where one is given."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if pattern not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if rank is not None and noise.ndim == 2:
                U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
                noise = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            parameter.add_(noise.to(parameter.dtype))
    return model if dtype is None else model.to(dtype)


def saved(root, name, model, **options):
    model.save_pretrained(root / name, **options)
    return root / name


def merged(base, folder):
    return PeftModel.from_pretrained(base, folder).merge_and_unload().eval()


def same_weights(found, wanted, rtol, atol):
    state, other = found.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


ALL = [
    (tiny_llama, {"modules_to_save": ["norm", "embed_tokens", "lm_head"]}),
    (lambda seed=1: tiny_llama(seed, tie=True), {"modules_to_save": ["norm", "embed_tokens"]}),
    (
        tiny_bert,
        {"modules_to_save": ["embeddings", "LayerNorm", "classifier"], "bias": "all"},
    ),
    (tiny_gpt2, {"modules_to_save": ["wte", "wpe", "ln_1", "ln_2", "ln_f"], "bias": "all"}),
    (
        tiny_gpt2,
        {
            "modules_to_save": ["wte", "ln_1", "ln_2", "ln_f"],
            "target_modules": ["wpe", "attn.c_attn", "c_proj", "c_fc"],
            "bias": "lora_only",
        },
    ),
    (
        tiny_vit,
        {
            "modules_to_save": [
                "layernorm_before",
                "layernorm_after",
                "vit.layernorm",
                "classifier",
                "embeddings",
            ],
            "bias": "all",
        },
    ),
]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("make", "options"), ALL, ids=["llama", "tied llama", "bert", "gpt2", "gpt2 wpe", "vit"]
)
def test_at_full_rank_the_base_becomes_the_tuned_model(tmp_path, make, options):
    base, tuned = saved(tmp_path, "base", make()), saved(tmp_path, "tuned", changed(make()))
    told = extract(base, tuned, tmp_path / "out", rank=10_000, **options)
    same_weights(merged(make(), tmp_path / "out"), changed(make()), rtol=1e-5, atol=2e-6)
    assert all(layer.error < 2e-6 for layer in told.layers)
    assert all(layer.rank == min(layer.shape) for layer in told.layers)
    assert told.left_out == ()
    assert told.kept == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_to_the_last_digit(tmp_path, dtype):
    base = saved(tmp_path, "base", tiny_llama().to(dtype))
    tuned = changed(tiny_llama().to(dtype), "_proj", scale=0.02)
    extract(base, saved(tmp_path, "tuned", tuned), tmp_path / "out", rank=100)
    found = merged(tiny_llama().to(dtype), tmp_path / "out").state_dict()
    for name, tensor in tuned.state_dict().items():
        # a number near zero, whose last digit is worth less than the rounding of the factors, may miss it
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        assert (found[name] == tensor).float().mean() > 0.99


def test_the_best_of_a_rank_and_its_error(tmp_path):
    base, tuned = tiny_llama(), changed(tiny_llama(), "_proj")
    told = extract(saved(tmp_path, "base", base), saved(tmp_path, "tuned", tuned), tmp_path / "out", rank=3)
    found = merged(tiny_llama(), tmp_path / "out")
    assert len(told.layers) == 14
    assert told.unchanged == len(dict(base.named_parameters())) - 14
    for layer in told.layers:
        before, after, now = (
            model.get_submodule(layer.path).weight.detach().double() for model in (base, tuned, found)
        )
        S = torch.linalg.svdvals(after - before)
        lost, norm = float(S[3:].norm()), float(S.norm())
        assert layer.norm == pytest.approx(norm, rel=1e-5)
        assert layer.error == pytest.approx(lost / norm, rel=1e-4)
        assert layer.kept == pytest.approx(1 - (lost / norm) ** 2, rel=1e-4)
        assert layer.change == pytest.approx(norm / max(float(before.norm()), float(after.norm())), rel=1e-5)
        assert float((after - now).norm()) == pytest.approx(lost, rel=1e-3)
    energy = sum(layer.norm**2 for layer in told.layers)
    assert told.kept == pytest.approx(sum(layer.norm**2 * layer.kept for layer in told.layers) / energy)


def test_energy_finds_the_rank_of_a_merged_adapter(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = changed(changed(tiny_llama(), "q_proj", rank=2), "down_proj", rank=5)
    told = extract(base, saved(tmp_path, "tuned", tuned), tmp_path / "out", energy=0.9999)
    ranks = {layer.path.rpartition(".")[2]: layer.rank for layer in told.layers}
    assert ranks == {"q_proj": 2, "down_proj": 5}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert len(config["rank_pattern"]) == 2
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(base)
    same_weights(merged(tiny_llama(), tmp_path / "out"), tuned, rtol=1e-4, atol=1e-5)
    capped = extract(base, tmp_path / "tuned", tmp_path / "capped", energy=0.9999, rank=3)
    assert {layer.rank for layer in capped.layers} == {2, 3}


def test_energy_beyond_the_first_try():
    """More than 16 ranks are needed: the trial is repeated with more."""
    wide = nn.Linear(64, 48, bias=False)
    change = wide.weight.detach().clone()
    found = factored(change.clone(), matrix_layout(48, 64), None, 0.99, torch.float32)
    energies = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
    assert found.factors.rank == 1 + int((energies < 0.99).sum()) > 16


def test_only_what_changed_is_targeted_by_the_shortest_names(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = changed(changed(tiny_llama(), "layers.1.self_attn.q_proj"), "v_proj")
    extract(base, saved(tmp_path, "tuned", tuned), tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"v_proj", "1.self_attn.q_proj"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("lora_A" in key for key in tensors) == 3


@pytest.mark.parametrize("size", ["1KB", "10GB"])
def test_shards(tmp_path, size):
    base = saved(tmp_path, "base", tiny_llama(), max_shard_size=size)
    tuned = saved(tmp_path, "tuned", changed(tiny_llama(), "_proj"), max_shard_size="3KB")
    assert (base / "model.safetensors.index.json").exists() == (size == "1KB")
    extract(base, tuned, tmp_path / "out", rank=100)
    same_weights(merged(tiny_llama(), tmp_path / "out"), changed(tiny_llama(), "_proj"), rtol=1e-5, atol=2e-6)


def test_a_head_that_the_base_does_not_have(tmp_path):
    """The base of a classifier is often a checkpoint without its head and without the prefix of its names."""
    model = tiny_bert()
    base = saved(tmp_path, "base", model.bert)
    tuned = saved(tmp_path, "tuned", changed(tiny_bert(), "query.weight"))
    with pytest.raises(UnsupportedError, match=r"classifier.weight: is only in .*tuned"):
        extract(base, tuned, tmp_path / "out", rank=4)
    told = extract(base, tuned, tmp_path / "out", rank=100, modules_to_save=["classifier"])
    assert told.whole == ("classifier.bias", "classifier.weight")
    fresh = tiny_bert()
    nn.init.zeros_(fresh.classifier.weight)
    same_weights(merged(fresh, tmp_path / "out"), changed(tiny_bert(), "query.weight"), rtol=1e-5, atol=2e-6)


def test_a_tuned_model_in_fewer_digits(tmp_path):
    """What was only rounded did not change."""
    base = saved(tmp_path, "base", tiny_llama())
    tuned = changed(tiny_llama(), "q_proj", scale=0.3, dtype=torch.bfloat16)
    told = extract(base, saved(tmp_path, "tuned", tuned), tmp_path / "out", rank=100)
    assert {layer.path.rpartition(".")[2] for layer in told.layers} == {"q_proj"}
    found = merged(tiny_llama(), tmp_path / "out").to(torch.bfloat16)
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)


def test_tolerance_and_dtype(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = changed(changed(tiny_llama(), "k_proj", scale=1e-7), "q_proj")
    tuned = saved(tmp_path, "tuned", tuned)
    told = extract(base, tuned, tmp_path / "out", rank=100, tolerance=1e-3, dtype="bfloat16")
    assert {layer.path.rpartition(".")[2] for layer in told.layers} == {"q_proj"}
    assert all(1e-4 < layer.error < 1e-2 for layer in told.layers)
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    } == {torch.bfloat16}


def test_what_has_no_place_is_listed_whole(tmp_path):
    base = saved(tmp_path, "base", tiny_llama(tie=True))
    tuned = saved(tmp_path, "tuned", changed(tiny_llama(tie=True)))
    with pytest.raises(UnsupportedError, match="the adapter has no place for them") as caught:
        extract(base, tuned, tmp_path / "out", rank=4)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert [line.partition(":")[0] for line in lines] == [
        "  - model.embed_tokens.weight",
        "  - model.layers.*.input_layernorm.weight",
        "  - model.layers.*.post_attention_layernorm.weight",
        "  - model.norm.weight",
    ]
    assert ": 2 tensors changed, by " in lines[1]
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        extract(
            base,
            tuned,
            tmp_path / "out",
            rank=4,
            ignore=["norm", "input_layernorm", "post_attention_layernorm"],
            target_modules=["embed_tokens", "q_proj"],
        )
    assert not (tmp_path / "out").exists()
    told = extract(
        base,
        tuned,
        tmp_path / "out",
        rank=4,
        ignore=["norm", "input_layernorm.weight", "post_attention_layernorm", "embed_tokens"],
    )
    assert len(told.left_out) == 6
    assert all(0 < left.change < 1 for left in told.left_out)


def test_biases(tmp_path):
    base = saved(tmp_path, "base", tiny_bert())
    tuned = changed(changed(tiny_bert(), "query.weight"), "query.bias")
    folder = saved(tmp_path, "tuned", tuned)
    with pytest.raises(UnsupportedError, match=r"query.bias: changed"):
        extract(base, folder, tmp_path / "out", rank=100)
    told = extract(base, folder, tmp_path / "out", rank=100, bias="lora_only")
    assert told.whole == ("bert.encoder.layer.0.attention.self.query.bias",)
    same_weights(merged(tiny_bert(), tmp_path / "out"), tuned, rtol=1e-5, atol=2e-6)


BAD = [
    ({}, ConfigError, "say how large"),
    ({"rank": 4, "tolerance": 1.0}, ConfigError, "tolerance=1.0"),
    ({"rank": 4, "dtype": "int8"}, ConfigError, "dtype='int8'"),
    ({"rank": 4, "target_modules": ["q_prj"]}, ConfigError, "did you mean"),
    (
        {"rank": 4, "target_modules": ["k_proj"], "ignore": ["q_proj"]},
        UnsupportedError,
        "none of these tensors",
    ),
    ({"rank": 4, "modules_to_save": ["nothing"]}, ConfigError, "modules_to_save: 'nothing'"),
    ({"rank": 4, "ignore": ["nothing"]}, ConfigError, "ignore: 'nothing'"),
    ({"rank": 4, "bias": "some"}, ConfigError, "bias"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=str)
def test_wrong_requests(tmp_path, options, error, words):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = saved(tmp_path, "tuned", changed(tiny_llama(), "q_proj"))
    with pytest.raises(error, match=words):
        extract(base, tuned, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_be_used(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    with pytest.raises(ConfigError, match="the same numbers"):
        extract(base, base, tmp_path / "out", rank=4)
    with pytest.raises(AdapterNotFoundError):
        extract(base, tmp_path / "none", tmp_path / "out", rank=4)
    with pytest.raises(ConfigError, match="not of one model"):
        extract(saved(tmp_path, "bert", tiny_bert()), base, tmp_path / "out", rank=4)
    odd = changed(tiny_llama(), "q_proj")
    odd.model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"layers.0.self_attn.q_proj"):
        extract(base, saved(tmp_path, "nan", odd), tmp_path / "out", rank=4)
    cut = saved(tmp_path, "cut", changed(tiny_llama(), "q_proj"))
    raw = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(raw[:-9])
    with pytest.raises(AdapterFormatError):
        extract(base, cut, tmp_path / "out", rank=4)
    (cut / "model.safetensors").write_bytes(raw)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(UnsupportedError, match="is quantised"):
        extract(base, cut, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_strange_tensors_are_told(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = saved(tmp_path, "tuned", changed(tiny_llama(), "q_proj"))
    tensors = load_file(tuned / "model.safetensors")
    save_file({**tensors, "value_head.weight": torch.ones(3)}, tuned / "model.safetensors", {"format": "pt"})
    told = extract(base, tuned, tmp_path / "out", rank=4)
    assert len(told.notes) == 1
    assert "value_head.weight" in told.notes[0]


def test_output_is_replaced_only_when_asked(tmp_path):
    base = saved(tmp_path, "base", tiny_llama())
    tuned = saved(tmp_path, "tuned", changed(tiny_llama(), "q_proj"))
    extract(base, tuned, tmp_path / "out", rank=2)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="an adapter is there already"):
        extract(base, tuned, tmp_path / "out", rank=4)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    steps = []
    extract(base, tuned, tmp_path / "out", rank=4, overwrite=True, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("decomposing", 2, 2)
    assert {step[0] for step in steps} == {"comparing", "decomposing"}
    assert logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"), ids()).isfinite().all()
