"""Experts of real architectures as they are trained and used: checkpointing, autocast, compile, generate, threads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import transformers

from lorakit import LoraConfig, get_peft_model
from lorakit.errors import UnsupportedError
from lorakit.layers.factored import FactoredWeight
from models import randomise

WORDS = 61
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "num_experts_per_tok": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 6},
    "gpt_oss": {"num_local_experts": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {
        "num_local_experts": 3, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24,
        "layer_types": ["full_attention"] * 2,
    },
}  # fmt: skip
WAYS = [("qwen3_moe", way) for way in ("eager", "batched_mm", "grouped_mm")]
WAYS += [("gpt_oss", "eager"), ("gpt_oss", "grouped_mm"), ("llama4_text", None)]
EACH = pytest.mark.parametrize(("kind", "way"), WAYS)


def build(kind, way, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    if way is not None:
        model.set_experts_implementation(way)
    return model.to(dtype).eval()


def adapted(kind, way, dtype=torch.float32, r=3, targets=BOTH):
    config = LoraConfig(r=r, lora_alpha=6, target_modules=[], target_parameters=targets)
    model = get_peft_model(build(kind, way, dtype), config)
    randomise(model)
    return model.eval()


def ids(rows=2, length=7, seed=1):
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, batch=None):
    batch = ids() if batch is None else batch
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@EACH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, way, reentrant):
    model = adapted(kind, way).train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its cache
        close(gradients(model), wanted)


@EACH
def test_adapters_chosen_for_a_call_survive_checkpointing(kind, way):
    model = adapted(kind, way).train()
    model.add_adapter("other", LoraConfig(r=2, target_modules=[], target_parameters=BOTH[1:]))
    randomise(model, "other", seed=5)
    with model.use_adapter("other"):
        model.base_model.set_requires_grad("other")
        wanted = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(model)
    close(found, wanted)
    assert any(".other." in name and grad.any() for name, grad in found[1].items())


@EACH
def test_autocast(kind, way):
    model, batch = adapted(kind, way), ids(seed=4)  # of these tokens none is near the boundary of two experts
    merged = copy.deepcopy(model).merge_and_unload()
    wanted = model(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        found, other = model(batch).logits, merged(batch).logits
        assert found.dtype == other.dtype
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    error, allowed = ((logits.float() - wanted).norm() / wanted.norm() for logits in (found, other))
    assert error <= 1.5 * allowed + 2.0**-8
    _, exact = gradients(copy.deepcopy(model), batch)
    for name, grad in exact.items():
        mine = dict(model.named_parameters())[name].grad
        assert mine.dtype == torch.float32
        assert (mine - grad).norm() <= 0.1 * grad.norm(), name


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "way"), [("qwen3_moe", "grouped_mm"), ("llama4_text", None)])
def test_compiled_for_a_graph_it_is_dense_and_right(kind, way):
    """The "eager" backend of torch.compile: what is captured is checked, not what a compiler makes of it."""
    model = adapted(kind, way)
    model.base_model.model.model.layers = model.base_model.model.model.layers[:1]
    loss, grads = gradients(model)
    torch._dynamo.reset()
    compiled_loss, found = gradients(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    close(compiled_loss, loss)
    assert len(found) == len(grads) == 4
    for mine, other in zip(found.values(), grads.values(), strict=True):
        close(mine, other)


@EACH
@torch.no_grad()
def test_generate_equals_the_merged_model(kind, way):
    model = adapted(kind, way)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(model.generate(ids(), **options), merged.generate(ids(), **options))
    one_token = ids(1, 1)
    close(model(one_token).logits, merged(one_token).logits)  # most experts get nothing


@EACH
@torch.no_grad()
def test_several_at_once_and_none(kind, way):
    model = adapted(kind, way)
    model.add_adapter("other", LoraConfig(r=5, lora_alpha=3, target_modules=[], target_parameters=BOTH[:1]))
    randomise(model, "other", seed=5)
    base = build(kind, way)(ids()).logits
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, base)
    model.base_model.set_adapter(["default", "other"])
    wanted = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])(ids()).logits
    close(model(ids()).logits, wanted)
    assert (wanted - base).abs().max() > 1e-2
    with pytest.raises(UnsupportedError, match=r"experts: .*'gate_up_proj'|on the parameter 'gate_up_proj'"):
        model(input_ids=ids(), adapter_names=["other", "__base__"])


def test_the_way_of_experts_may_change_at_any_time(monkeypatch):
    model = adapted("qwen3_moe", "eager")
    wanted = gradients(model)

    def refuse(_):
        raise AssertionError("a dense sum of experts was built")

    monkeypatch.setattr(FactoredWeight, "dense", refuse)
    for way in ("grouped_mm", "batched_mm", "eager"):
        model.base_model.model.set_experts_implementation(way)
        close(gradients(model), wanted)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_threads_with_adapters_of_their_own(way):
    model = adapted("qwen3_moe", way)
    model.add_adapter("other", LoraConfig(r=2, target_modules=[], target_parameters=BOTH[1:]))
    randomise(model, "other", seed=5)
    wanted = {}
    with torch.no_grad():
        for name in ("default", "other", "__base__"):
            with model.use_adapter(name):
                wanted[name] = model(ids()).logits
    differing, start = [], threading.Barrier(3)

    def work(name):
        start.wait()
        with torch.no_grad(), model.use_adapter(name):
            found = [model(ids()).logits for _ in range(10)]
        differing.extend(name for logits in found if not torch.equal(logits, wanted[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing
    assert (wanted["default"] - wanted["other"]).abs().max() > 1e-2


def test_router_losses_see_the_model_with_its_adapters():
    """The auxiliary loss reads what hooks collected from the routers."""
    model = adapted("qwen3_moe", "grouped_mm", targets=[*BOTH, "mlp.gate.weight"])
    merged = copy.deepcopy(model).merge_and_unload()
    found, wanted = (net(input_ids=ids(), labels=ids(), output_router_logits=True) for net in (model, merged))
    assert len(found.router_logits) == 2
    for mine, other in zip(found.router_logits, wanted.router_logits, strict=True):
        close(mine, other)
    close(found.aux_loss, wanted.aux_loss)
    close(found.loss, wanted.loss)
