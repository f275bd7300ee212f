"""PEFT -> X -> PEFT: equal tensors and scalings, a config that loads, and the same outputs."""

from __future__ import annotations

import math

import pytest
import torch

from conversions import OUTPUTS, TARGETS, save_config, save_llama
from lorakit import LoraConfig, PeftModel, convert
from lorakit.checkpoint.reading import open_adapter
from lorakit.config import Matcher
from models import ids, tiny_llama

FORMATS = ("gguf", "mlx", "torchtune")
PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]


@pytest.fixture
def base(tmp_path):
    return save_config(tmp_path / "base")


def there_and_back(root, to, **options):
    source, between, back = root / "adapter", root / OUTPUTS[to], root / "back"
    told = convert(source, between, to=to, **options)
    convert(between, back, to="peft", **options)
    return told, open_adapter(source).load(), open_adapter(back).load()


def scalings(folder):
    config = LoraConfig.from_pretrained(folder)
    matcher = Matcher(config)
    return {
        path: matcher.alpha(path) / (math.sqrt(r) if config.use_rslora else r)
        for path in PATHS
        for r in [matcher.rank(path)]
    }


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain(tmp_path, base, to, dtype):
    peft = save_llama(tmp_path / "adapter", dtype=dtype)
    told, before, after = there_and_back(tmp_path, to, base=base)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == dtype for name in after)
    assert scalings(tmp_path / "back") == scalings(tmp_path / "adapter")
    assert (told.modules, told.from_format, told.to_format) == (6, "peft", to)
    if dtype == torch.float32:  # a model holds its adapters in this dtype
        fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
        assert torch.equal(logits(fresh), logits(peft))


@pytest.mark.parametrize("to", FORMATS)
def test_rslora_is_in_alpha(tmp_path, base, to):
    peft = save_llama(tmp_path / "adapter", r=6, use_rslora=True)
    _, before, after = there_and_back(tmp_path, to, base=base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found, wanted = scalings(tmp_path / "back"), scalings(tmp_path / "adapter")
    assert found == pytest.approx(wanted, rel=1e-7 if to == "gguf" else 0.0)  # a float32 there
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(fresh), logits(peft), rtol=1e-5, atol=1e-6)


PATTERNS = {
    "rank": {"rank_pattern": {"k_proj": 2}},
    "rank, same scaling": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "alpha by a power of two": {"alpha_pattern": {"down_proj": 12}},
    "alpha by a third": {"alpha_pattern": {"down_proj": 2}},
    "all": {"rank_pattern": {"q_proj": 8, "0.mlp.down_proj": 3}, "alpha_pattern": {"k_proj": 5}},
}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patterns(tmp_path, base, to, patterns, dtype):
    """One number for all modules: the rest is in B, and lesser ranks are filled with zeros."""
    save_llama(tmp_path / "adapter", dtype=dtype, **PATTERNS[patterns])
    told, before, after = there_and_back(tmp_path, to, base=base)
    ours, theirs = scalings(tmp_path / "adapter"), scalings(tmp_path / "back")
    exact = patterns not in {"alpha by a third", "all"}
    for path in PATHS:
        A, B = (before[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        C, D = (after[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        tolerance = 0.0 if exact else 1e-7
        torch.testing.assert_close(
            theirs[path] * (D @ C), ours[path] * (B @ A), rtol=tolerance, atol=tolerance
        )
    native = {"gguf": "rank"}.get(to, "rank, same scaling")
    assert any("in their B" in note for note in told.notes) == (patterns != native)


@pytest.mark.parametrize("to", ["mlx", "torchtune"])
def test_dora(tmp_path, base, to):
    peft = save_llama(tmp_path / "adapter", use_dora=True)
    _, before, after = there_and_back(tmp_path, to, base=base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(name.endswith("lora_magnitude_vector") for name in after)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
    assert torch.equal(logits(fresh), logits(peft))


@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_embedding_and_head(tmp_path, base, to):
    peft = save_llama(tmp_path / "adapter", target_modules=[*TARGETS, "embed_tokens", "lm_head"])
    _, before, after = there_and_back(tmp_path, to, base=base)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "back").eval()
    assert torch.equal(logits(fresh), logits(peft))


def test_alora_in_gguf(tmp_path, base):
    save_llama(tmp_path / "adapter", alora_invocation_tokens=[3, 5], task_type="CAUSAL_LM")
    _, before, after = there_and_back(tmp_path, "gguf", base=base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert LoraConfig.from_pretrained(tmp_path / "back").alora_invocation_tokens == [3, 5]


def test_equal_input_gives_equal_bytes(tmp_path, base):
    save_llama(tmp_path / "adapter")
    for number in range(2):
        convert(tmp_path / "adapter", tmp_path / f"{number}.gguf", to="gguf", base=base)
        convert(tmp_path / "adapter", tmp_path / f"mlx-{number}", to="mlx")
        convert(tmp_path / "adapter", tmp_path / f"tune-{number}", to="torchtune", base=base)
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    for name in ("mlx-{}/adapters.safetensors", "tune-{}/adapter_model.pt"):
        first, second = (tmp_path / name.format(number) for number in range(2))
        assert first.read_bytes() == second.read_bytes()
