"""Status reports and gradient flags on every kind of layer and content, as PEFT gives them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.errors import AdapterNameError
from parity.models import NAMED_WARNINGS, Pair, adapter_parameters, build, peft
from zoo import ATTENTION, EXPERTS, KINDS, zoo

pytestmark = [
    *NAMED_WARNINGS,
    *(
        pytest.mark.filterwarnings(f"ignore:{line}")
        for line in (
            ".*targeted convolutions are grouped:UserWarning",
            "LoRA adapter added to ConvNd layer with groups:UserWarning",
            "fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
            ".*tied modules:UserWarning",
            "Model with `tie_word_embeddings=True`:UserWarning",
            "Model has `tie_word_embeddings=True`:UserWarning",
        )
    ),
]


def tied():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


llama = partial(build, "llama")
PARTS = [kind for kind in KINDS if kind != "turned"]  # PEFT: fan_in_fan_out cannot go with parameters
CASES = {
    "every module": (zoo, {"target_modules": KINDS}),
    "parameters and attention": (zoo, {"target_modules": PARTS + ATTENTION, "target_parameters": EXPERTS}),
    "whole modules": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "token rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "tokens by name": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1], "embed_tokens": [2, 3]}}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "trained biases": (partial(build, "llama_bias"), {"target_modules": ["q_proj"], "bias": "all"}),
    "lora_bias": (partial(build, "llama_bias"), {"target_modules": ["q_proj"], "lora_bias": True}),
    "tied factors": (tied, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied rows": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [1], "ensure_weight_tying": True}),
    "tied whole modules": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES)


def both(case, **more):
    base, fields = CASES[case]
    return Pair(
        lorakit.get_peft_model(base(), lorakit.LoraConfig(**fields, **more)),
        peft.get_peft_model(base(), peft.LoraConfig(**fields, **more)),
    )


def same_reports(ours, theirs):
    for mine, wanted in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert asdict(mine) == asdict(wanted)
    mine, wanted = asdict(ours.get_model_status()), asdict(theirs.get_model_status())
    if any(layer.is_tied for layer in ours.base_model.registry.layers.values()):
        for field in ("trainable_params", "total_params"):  # PEFT makes the head parameters of its own
            assert mine.pop(field) <= wanted.pop(field)
    assert mine == wanted


@EACH
def test_reports_alike(case):
    ours, theirs = both(case)
    same_reports(ours, theirs)
    for flag in (False, True):
        for model in (ours, theirs):
            model.set_requires_grad("default", flag)
        if case != "trained biases" or flag:  # the base's own biases stay as they were with PEFT
            same_reports(ours, theirs)


@EACH
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_reports_alike_of_injected_layers(case):
    base, fields = CASES[case]
    models = []
    for library in (lorakit, peft):
        model = base()
        library.inject_adapter_in_model(library.LoraConfig(**fields), model)
        models.append(model)
    ours, theirs = models
    mine, wanted = lorakit.get_layer_status(ours), peft.get_layer_status(theirs)
    assert [asdict(row) for row in mine] == [asdict(row) for row in wanted]


SEVERAL = {
    "default": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "other": {"target_modules": ["q_proj", "v_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


def several(*names):
    models = []
    for library in (lorakit, peft):
        first, *rest = names or SEVERAL
        model = library.get_peft_model(build("llama"), library.LoraConfig(**SEVERAL[first]), first)
        for name in rest:
            model.add_adapter(name, library.LoraConfig(**SEVERAL[name]))
        models.append(model)
    return Pair(*models)


@pytest.mark.parametrize("active", SEVERAL)
def test_reports_of_several_adapters_alike(active):
    ours, theirs = several()
    for model in (ours, theirs):
        model.set_adapter(active)
    for mine, wanted in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert asdict(mine) == asdict(wanted)
    mine, wanted = asdict(ours.get_model_status()), asdict(theirs.get_model_status())
    # a module that the active adapter has no copy of makes PEFT call the whole model irregular
    assert wanted.pop("active_adapters") == "irregular"
    assert mine.pop("active_adapters") == [active]
    assert mine == wanted


@pytest.mark.parametrize("names", [["other"], ["default"], ["default", "other"]], ids="+".join)
def test_reports_of_merged_adapters_alike(names):
    ours, theirs = several("default", "other")  # PEFT cannot merge what has no rows beside what has
    for model in (ours, theirs):
        model.merge_adapter(names)
    mine, wanted = ours.get_model_status(), theirs.get_model_status()
    assert mine.merged_adapters == wanted.merged_adapters
    for row, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        assert (row.name, row.merged_adapters) == (other.name, other.merged_adapters)
    next(iter(ours.base_model.registry.layers.values())).unmerge()
    assert ours.get_model_status().merged_adapters == "irregular"


# ---- who trains ---------------------------------------------------------------------------------------


def trained(model):
    """Names of what trains, without the factors that PEFT gives to a tied head and lorakit does not."""
    head = "base_model.model.lm_head.lora_"
    tied = "embed_tokens" in str(model.peft_config["default"].target_modules)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name in names if not (tied and name.startswith(head))}


@EACH
@pytest.mark.parametrize("given", ["default", ["default"], ("default",)], ids=repr)
def test_set_requires_grad_alike(case, given):
    ours, theirs = both(case)
    begin = trained(ours)
    assert begin == trained(theirs)
    for model in (ours, theirs):
        model.set_requires_grad(given, requires_grad=False)
    left = {name for name in trained(theirs) if "lora_" not in name}
    assert trained(ours) == set()
    assert not trained(theirs) - left  # the base's biases, which PEFT leaves as they are
    assert all(name.endswith(".bias") for name in left)
    for model in (ours, theirs):
        model.set_requires_grad(given)
    assert trained(ours) == trained(theirs) == begin


@pytest.mark.parametrize(
    "names", [["default"], ["other"], ["tokens", "default"], [*SEVERAL], []], ids="+".join
)
@pytest.mark.parametrize("state", ["as it is", "disabled", "merged"])
def test_set_requires_grad_of_several_alike(names, state):
    """Only the named adapters, active or not, whatever else is going on; what is active stays so."""
    ours, theirs = several("default", "other") if state == "merged" else several()
    names = [name for name in names if name in ours.peft_config]
    for model in (ours, theirs):
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        if state == "merged":
            model.merge_adapter(["other"])
    for flag in (True, False, True):
        for model in (ours, theirs):
            model.base_model.set_requires_grad(names, flag)
            model.set_requires_grad("other", requires_grad=not flag)
        mine, wanted = trained(ours), trained(theirs)
        # while disabled, PEFT freezes what is active; here flags stay as they were set
        named = {name for name in mine | wanted if any(f".{n}" in name for n in (*names, "other"))}
        assert mine & named == wanted & named
        assert ours.active_adapters == ["default"]
    if state != "disabled":
        assert adapter_parameters(ours).keys() == adapter_parameters(theirs).keys()
    assert [r.active_adapters for r in ours.get_layer_status()] == [
        r.active_adapters for r in theirs.get_layer_status()
    ]


def test_names_that_nobody_has():
    ours, theirs = several()
    before = trained(ours)
    theirs.set_requires_grad("nobody")  # silent
    with pytest.raises(AdapterNameError, match="nobody"):
        ours.set_requires_grad(["other", "nobody"])
    assert trained(ours) == before


def test_tied_tensors_whichever_layer_came_first():
    """The head shows the embedding's tensors, and they are not its own to flag."""
    model = lorakit.get_peft_model(tied(), lorakit.LoraConfig(target_modules=["lm_head"]))
    fields = CASES["tied factors"][1]
    model.add_adapter("both", lorakit.LoraConfig(**{**fields, "target_modules": ["lm_head"]}))
    assert next(iter(model.base_model.registry.layers)) == "lm_head"
    for flag in (True, False, True):
        model.set_requires_grad("both", flag)
        own = {name for name in trained(model) if ".both" in name}
        assert bool(own) == flag


def test_embeddings_that_came_with_an_adapter_stay_frozen(tmp_path):
    model = lorakit.get_peft_model(build("llama"), lorakit.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.add_(1)
    model.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    loaded = lorakit.PeftModel.from_pretrained(build("llama"), tmp_path / "grown", allow_base_weights=True)
    loaded.set_requires_grad("default")
    assert all("lora_" in name for name in trained(loaded))
