"""Quantised bases from loading to merging, as a user goes through it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from lorakit.weights import find_codec
from models import Snapshot, randomise, registry_of
from quantised import KINDS, Pair, pieces

WORDS = 32
each = pytest.mark.parametrize("kind", KINDS, ids=str)


def ids(seed=3, samples=4):
    return torch.randint(11, (samples, 4), generator=torch.Generator().manual_seed(seed))


def peft_of(kind, dtype=torch.float32, **changes):
    return get_peft_model(
        Pair(kind, dtype), LoraConfig(**{"r": 4, "target_modules": ["up", "down", "widen"], **changes})
    )


def out(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def test_the_example_learns_and_loads_what_it_saved():
    path = Path(__file__).parents[2] / "examples" / "qlora.py"
    spec = importlib.util.spec_from_file_location("qlora_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, last = example.main()
    assert first > 4
    assert last < 0.5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


BITS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "full": None,
}


def load(folder, bits):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BITS[bits], device_map="cpu", dtype=torch.bfloat16
    )


def trained(model, steps=12):
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=1e-2)
    tokens = (torch.arange(4)[:, None] * 3 + torch.arange(12)) % WORDS
    losses = []
    for step in range(steps):
        loss = peft.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == steps // 2:
            out(peft.eval(), tokens)  # an evaluation in between, which packs 4-bit weights
    return peft.eval(), tokens, losses


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
def test_loaded_by_transformers_it_trains_saves_loads_and_merges(llama, bits, prepared, tmp_path):
    model = load(llama, bits)
    model = prepare_model_for_kbit_training(model) if prepared else model
    peft, tokens, losses = trained(model)
    assert losses[-1] < losses[0] - 1
    wanted = out(peft, tokens).logits
    peft.save_pretrained(tmp_path)
    fresh = load(llama, bits)
    fresh = prepare_model_for_kbit_training(fresh, use_gradient_checkpointing=False) if prepared else fresh
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(out(again, tokens).logits, wanted)
    merged = again.merge_and_unload(dequantize=True)
    assert not any(find_codec(m).on_grid for m in merged.modules() if isinstance(m, torch.nn.Linear))
    near = out(merged, tokens).logits
    assert (near - wanted).float().norm() <= 0.05 * wanted.float().norm()


@pytest.mark.parametrize(("here", "there"), [("nf4", "full"), ("full", "nf4"), ("int8", "full")])
def test_an_adapter_goes_between_bases(llama, here, there, tmp_path):
    """Trained on one, on the other it still does what it learned."""
    peft, tokens, losses = trained(load(llama, here))
    peft.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(load(llama, there), tmp_path)
    loss = out(other, input_ids=tokens, labels=tokens).loss.item()
    assert loss < losses[0] - 1
    theirs = dict(other.named_parameters())
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, theirs[name])


# ---- every library ----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_a_dense_twin(kind, dtype):
    """The twin multiplies by what the codec reads; an evaluation before must not matter."""
    peft = peft_of(kind, dtype)
    randomise(peft)
    out(peft.eval(), ids())
    twin = get_peft_model(dense(Pair(kind, dtype)), peft.peft_config["default"])
    randomise(twin)
    for model in (peft, twin):
        model.train()(ids()).float().square().mean().backward()
    near = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    theirs = dict(twin.named_parameters())
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert len(trained) == 6
    for name, parameter in trained.items():
        wanted = theirs[name].grad
        assert (parameter.grad - wanted).norm() <= near * wanted.norm(), name


def dense(pair):
    """The same model with plain layers."""
    for name in ("up", "down"):
        base = getattr(pair, name)
        W = find_codec(base).read(base, torch.float32)
        plain = torch.nn.Linear(W.shape[1], W.shape[0], dtype=pair.widen.weight.dtype)
        with torch.no_grad():
            plain.weight.copy_(W)
            plain.bias.copy_(base.bias)
        setattr(pair, name, plain)
    return pair


@each
@pytest.mark.parametrize("merging", [{"force": True}, {"dequantize": True}], ids=str)
def test_a_whole_life(kind, merging):
    base = Pair(kind)
    before = {name: pieces(getattr(base, name)) for name in ("up", "down")}
    untouched = out(base.train(), ids())
    snapshot = Snapshot(base)
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["up", "down"], lora_bias=True))
    randomise(peft)
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["down"]))
    randomise(peft, "other", seed=9)
    peft.train()
    y = out(peft, ids())
    peft.merge_adapter(**merging)
    with peft.disable_adapter():
        assert torch.equal(out(peft, ids()), untouched)
    peft.unmerge_adapter()
    assert torch.equal(out(peft, ids()), y)
    peft.set_adapter("other")
    peft.merge_adapter(["default", "other"], **merging)
    peft.unmerge_adapter()
    peft.delete_adapter("default")
    assert peft.unload() is base
    assert {name: pieces(getattr(base, name)) for name in ("up", "down")} == before
    assert torch.equal(out(base, ids()), untouched)
    snapshot.assert_same(base)


@each
def test_mixed_batches(kind):
    peft = peft_of(kind)
    randomise(peft)
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["down"]))
    randomise(peft, "other", seed=9)
    names = ["default", "other", "__base__", "default"]
    peft.train()  # 8-bit layers round inputs by the batch in eval mode
    mixed = out(peft, ids(), adapter_names=names)
    for row, name in enumerate(names):
        alone = out(peft, ids()[row : row + 1], adapter_names=name)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@each
def test_the_base_output_is_taken_over_or_copied_never_spoiled(kind):
    """A hook that keeps what a quantised layer gave finds it unchanged; and so does one that changes the input's gradient."""
    peft = peft_of(kind)
    randomise(peft)
    layer = registry_of(peft).layers["up"]
    x = torch.randn(3, 128, requires_grad=True)
    with torch.no_grad():
        bare = layer.base_layer(x)
    kept = []
    handle = layer.base_layer.register_forward_hook(lambda *call: kept.append(call[-1]))
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            layer.train()(x)
    handle.remove()
    for output in kept:
        torch.testing.assert_close(output.detach(), bare, rtol=1e-3, atol=1e-3)
    y = layer(x)
    y.mul_(2)  # as a model may do
    y.sum().backward()
    assert x.grad is not None


# HQQ's own backward multiplies a bf16 gradient by an fp32 weight there, with an adapter or without.
UNDER_AUTOCAST = [(kind, torch.bfloat16) for kind in KINDS]
UNDER_AUTOCAST += [(kind, torch.float32) for kind in KINDS if not kind.name.startswith("hqq")]


@pytest.mark.parametrize(("kind", "dtype"), UNDER_AUTOCAST, ids=str)
def test_under_autocast(kind, dtype):
    peft = peft_of(kind, dtype)
    randomise(peft)
    peft.train()
    wanted = out(peft, ids()).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = peft(ids())
    y.float().sum().backward()
    assert (y.float() - wanted).norm() <= 0.05 * wanted.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in peft.parameters() if p.requires_grad)
