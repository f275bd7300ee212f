"""aLoRA: outputs, gradients, generation and files equal PEFT's, in both directions."""

from __future__ import annotations

import pytest
import torch

import lorakit
from parity.models import NAMED_WARNINGS, adapter_parameters, build, pair, peft, randomize

pytestmark = [
    *NAMED_WARNINGS,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    # PEFT registers such hooks under gradient checkpointing, on layers whose first inputs are ids
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

CALL = [7, 9]
FIELDS = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "alora_invocation_tokens": CALL}
TARGETS = {
    "llama": {"target_modules": "all-linear"},
    "llama_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}
each = pytest.mark.parametrize("kind", TARGETS)


def prompts():
    ids = torch.randint(10, 60, (4, 9), generator=torch.Generator().manual_seed(5))
    ids[0, 3:5] = ids[2, 1:3] = ids[2, 6:8] = ids[3, 0:2] = torch.tensor(CALL)
    return ids


def both(kind):
    return pair(kind, {**FIELDS, **TARGETS[kind]})


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=prompts(), **kwargs).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("offsets", [None, [3, None, 9, 1]], ids=str)
def test_outputs(kind, offsets):
    ours, theirs = both(kind)
    close(logits(ours, alora_offsets=offsets), logits(theirs, alora_offsets=offsets))


@each
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind, checkpointing):
    ours, theirs = both(kind)
    found = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=prompts(), labels=prompts()).loss.backward()
        found[name] = {key: p.grad for key, p in adapter_parameters(model).items()}
    assert found["ours"].keys() == found["theirs"].keys()
    for key, wanted in found["theirs"].items():
        torch.testing.assert_close(found["ours"][key], wanted, rtol=1e-4, atol=1e-7, msg=key)


@each
def test_generate(kind):
    ours, theirs = both(kind)
    options = {"input_ids": prompts(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_mixed_batches():
    ours, theirs = both("llama")
    for library, model in ((lorakit, ours), (peft, theirs)):
        fields = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        model.add_adapter("other", library.LoraConfig(**fields, alora_invocation_tokens=[11]))
        model.add_adapter("plain", library.LoraConfig(**fields))
        generator = torch.Generator().manual_seed(3)
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if any(name in _ for name in (".other.", ".plain.")):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.eval()
    for names in (["default", "other", "plain", "__base__"], ["plain", "default", "default", "other"]):
        close(logits(ours, adapter_names=names), logits(theirs, adapter_names=names))


@each
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_files(kind, writer, tmp_path):
    models = both(kind)._asdict()
    wanted = logits(models[writer])
    models[writer].save_pretrained(tmp_path)
    library = {"ours": peft, "theirs": lorakit}[writer]
    loaded = library.PeftModel.from_pretrained(build(kind), tmp_path)
    assert loaded.peft_config["default"].alora_invocation_tokens == CALL
    close(logits(loaded), wanted)
    state = library.get_peft_model_state_dict(loaded)
    again = {"ours": lorakit, "theirs": peft}[writer].get_peft_model_state_dict(models[writer])
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_where_peft_is_silent():
    """What makes PEFT act as the base without a word is an error here: a prompt of embeddings, tokens behind a cache."""
    ours, theirs = both("llama")
    embeds = build("llama").get_input_embeddings()(prompts()).detach()
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets"), torch.no_grad():
        assert torch.equal(
            theirs(inputs_embeds=embeds).logits, build("llama")(inputs_embeds=embeds).logits.detach()
        )
    with pytest.raises(lorakit.ConfigError, match="pass input_ids"):
        ours(inputs_embeds=embeds)


def test_randomized_adapters_have_an_effect():
    ours, _ = both("llama")
    randomize(ours, 1)
    assert (logits(ours) - build("llama")(input_ids=prompts()).logits).abs().max() > 1e-2
