"""Several adapters on one model, reports, injected layers, generation: as PEFT does it, on equal weights."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
import torch

import lorakit
from parity.models import (
    NAMED_WARNINGS,
    Pair,
    adapter_parameters,
    build,
    copy_trained,
    output_of,
    pair,
    peft,
    randomize,
)

pytestmark = NAMED_WARNINGS

QV = ["q_proj", "v_proj"]
FIELDS = {
    "default": {"target_modules": QV, "r": 8, "task_type": "CAUSAL_LM"},
    "second": {"target_modules": QV, "r": 4, "lora_alpha": 20, "task_type": "CAUSAL_LM"},
    "narrow": {"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"},
}


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def several(*names):
    """Both libraries with these adapters, random and equal; the first is active."""
    first, *rest = names
    ours, theirs = pair("llama", FIELDS[first], name=first)
    for seed, name in enumerate(rest, 1):
        ours.add_adapter(name, lorakit.LoraConfig(**FIELDS[name]))
        theirs.add_adapter(name, peft.LoraConfig(**FIELDS[name]))
        for model in (ours, theirs):
            model.set_adapter(name)
        randomize(theirs, seed)
        copy_trained(theirs, ours)
    for model in (ours, theirs):
        model.set_adapter(first)
    return Pair(ours.eval(), theirs.eval())


def same_state(ours, theirs):
    """Names of the active adapters and of what trains, and the logits."""
    assert ours.active_adapters == theirs.active_adapters
    assert ours.active_adapter == ours.active_adapters[0]  # PEFT's is stale after base_model.set_adapter
    found = theirs.base_model.active_adapter  # a name or a list of names, as it was given
    assert ours.base_model.active_adapter == ([found] if isinstance(found, str) else found)
    assert ours.base_model.active_adapters == theirs.base_model.active_adapters
    assert adapter_parameters(ours).keys() == adapter_parameters(theirs).keys()
    close(output_of(ours, "llama"), output_of(theirs, "llama"))


ACTIVE = [["default"], ["second"], ["narrow"], ["default", "second"], ["second", "narrow"], [*FIELDS]]


@pytest.mark.parametrize("active", ACTIVE, ids="+".join)
@pytest.mark.parametrize("inference", [False, True])
def test_active_adapters_add_up_and_train_alike(active, inference):
    ours, theirs = several(*FIELDS)
    for model in (ours, theirs):
        model.base_model.set_adapter(active, inference_mode=inference)
    same_state(ours, theirs)
    assert bool(adapter_parameters(ours)) == (not inference)
    assert not torch.allclose(output_of(ours, "llama"), output_of(build("llama"), "llama"), atol=1e-3)


@pytest.mark.parametrize("active", ACTIVE, ids="+".join)
def test_reports_alike(active):
    ours, theirs = several(*FIELDS)
    for model in (ours, theirs):
        model.base_model.set_adapter(active)
    for mine, wanted in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert asdict(mine) == asdict(wanted)
    assert asdict(ours.get_model_status()) == asdict(theirs.get_model_status())
    with ours.disable_adapter(), theirs.disable_adapter():
        mine, wanted = asdict(ours.get_model_status()), asdict(theirs.get_model_status())
    for field in ("requires_grad", "trainable_params"):  # PEFT freezes what is disabled; here the flags stay
        del mine[field], wanted[field]
    assert mine == wanted


@pytest.mark.parametrize("name", FIELDS)
def test_switching_alike(name):
    ours, theirs = several(*FIELDS)
    for model in (ours, theirs):
        model.set_adapter(name)
    same_state(ours, theirs)
    assert ours.active_adapter == theirs.active_adapter == name


def test_deleting_an_idle_adapter_alike():
    ours, theirs = several(*FIELDS)
    for model in (ours, theirs):
        model.delete_adapter("second")
    same_state(ours, theirs)
    assert ours.peft_config.keys() == theirs.peft_config.keys() == {"default", "narrow"}
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_deleting_the_active_adapter_alike():
    ours, theirs = several("default", "second")
    with pytest.warns(UserWarning, match=re.escape("'default' was deleted; 'second' is active now")):
        ours.delete_adapter("default")
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        theirs.delete_adapter("default")
    same_state(ours, theirs)
    assert ours.active_adapters == ["second"]
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_deleting_one_of_two_active_adapters_alike():
    ours, theirs = several("default", "second")
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
        model.delete_adapter("default")
    same_state(ours, theirs)
    assert ours.active_adapters == ["second"]


@pytest.mark.parametrize("chosen", [["second"], ["default", "second"], ["narrow", "default"]], ids="+".join)
def test_chosen_adapters_merge_alike(chosen):
    ours, theirs = several(*FIELDS)
    mine = ours.merge_and_unload(adapter_names=chosen)
    wanted = theirs.merge_and_unload(adapter_names=chosen).state_dict()
    assert mine.state_dict().keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(mine.state_dict()[name], tensor)


@torch.no_grad()
def test_injected_alike():
    models = []
    for library in (lorakit, peft):
        base = build("llama")
        assert library.inject_adapter_in_model(library.LoraConfig(target_modules=QV), base) is base
        models.append(base)
    ours, theirs = models
    randomize(theirs)
    values = peft.get_peft_model_state_dict(theirs)
    assert lorakit.get_peft_model_state_dict(ours).keys() == values.keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    result = lorakit.set_peft_model_state_dict(ours, values)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, value in lorakit.get_peft_model_state_dict(ours).items():
        assert torch.equal(value, values[key]), key
    close(output_of(ours, "llama"), output_of(theirs, "llama"))


@pytest.mark.parametrize("name", ["default", "second"])
@torch.no_grad()
def test_state_dicts_are_exchanged(name):
    ours, theirs = several("default", "second")
    values = lorakit.get_peft_model_state_dict(ours, adapter_name=name)
    wanted = peft.get_peft_model_state_dict(theirs, adapter_name=name)
    assert values.keys() == wanted.keys()
    doubled = {key: 2 * value for key, value in values.items()}
    lorakit.set_peft_model_state_dict(ours, doubled, adapter_name=name)
    peft.set_peft_model_state_dict(theirs, doubled, adapter_name=name)
    for model in (ours, theirs):
        model.set_adapter(name)
    same_state(ours, theirs)
    assert torch.equal(next(iter(lorakit.get_peft_model_state_dict(ours, adapter_name=name).values())), next(iter(doubled.values())))  # fmt: skip


@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_the_same_tokens(use_cache):
    ours, theirs = several("default", "second")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False,
        "use_cache": use_cache, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    mine, wanted = (model.generate(input_ids=ids, **options) for model in (ours, theirs))
    assert mine.sequences.shape == (2, 12)
    assert torch.equal(mine.sequences, wanted.sequences)
    close(torch.stack(mine.scores), torch.stack(wanted.scores), 1e-5)


def test_a_saved_module_named_norm_is_the_same_modules():
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    ours = lorakit.get_peft_model(build("llama"), lorakit.LoraConfig(**fields))
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**fields))
    assert adapter_parameters(ours).keys() == adapter_parameters(theirs).keys()


@pytest.mark.parametrize("kind", ["llama_bias", "bert"])
def test_a_file_with_all_biases_and_saved_modules_loads(kind, tmp_path):
    """PEFT also writes the biases of a saved module's original and copy by their names inside the wrapper."""
    targets, whole = {"llama_bias": (["q_proj"], ["o_proj"]), "bert": (["query"], ["classifier"])}[kind]
    config = peft.LoraConfig(target_modules=targets, modules_to_save=whole, bias="all")
    theirs = peft.get_peft_model(build(kind), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = lorakit.PeftModel.from_pretrained(build(kind), tmp_path)
    close(output_of(loaded, kind), output_of(theirs, kind))


@pytest.mark.parametrize("told", [True, False])
def test_gpt2_alike_whatever_fan_in_fan_out_says(told):
    fields = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": told}
    if told:
        ours, theirs = pair("gpt2", fields)
    else:
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            ours, theirs = pair("gpt2", fields)
    close(output_of(ours, "gpt2"), output_of(theirs, "gpt2"))
    assert ours.peft_config["default"].fan_in_fan_out == theirs.peft_config["default"].fan_in_fan_out
    mine, wanted = ours.merge_and_unload(), theirs.merge_and_unload()
    for name, tensor in wanted.state_dict().items():
        close(mine.state_dict()[name], tensor)
