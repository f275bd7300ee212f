"""Describing a model and planning an adapter: what is found, what is refused, and that nothing is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import get_peft_model
from lorakit.api import plan
from lorakit.config import VeloraConfig
from lorakit.errors import PlanError
from lorakit.layers import LoraLayer
from lorakit.surgery import describe, make_plan
from models import Snapshot, Tiny, another, config, ids, tiny, tiny_llama, with_adapter


class Shared(nn.Module):
    """One module under two names, and attention that reads a weight instead of calling its layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.second(self.first(x))


def test_describe_meets_each_module_once_and_knows_all_places():
    model = Shared()
    found = describe(model)
    assert "second" not in found.nodes
    assert [place.attribute for place in found.nodes["first"].places] == ["first", "second"]
    assert all(place.owner is model for place in found.nodes["first"].places)
    assert found.nodes["first"].kind.name == "linear"
    assert found.nodes["conv"].kind.name == "conv"
    assert found.nodes["attention"].kind is None, "its parts carry adapters, not it"
    assert [node.path for node in found.children_of("attention")] == ["attention", "attention.out_proj"]


def test_describe_stops_at_adapters():
    model = with_adapter(tiny(), modules_to_save=["head"]).get_base_model()
    found = describe(model)
    assert not any(
        "lora_" in path or "base_layer" in path or "modules_to_save" in path for path in found.nodes
    )
    assert isinstance(found.nodes["layers.0.q_proj"].layer, LoraLayer)
    assert found.nodes["layers.0.q_proj"].module is model.layers[0].q_proj.base_layer
    assert list(found.saved) == ["head"]


def test_a_shared_module_gets_one_adapter_in_both_places():
    model = Shared()
    base = model.first
    peft = get_peft_model(model, config(target_modules=["first"]))
    assert model.first is model.second
    assert isinstance(model.first, LoraLayer)
    peft.unload()
    assert model.first is base
    assert model.second is base


ERRORS = {
    "one entry among several": (
        {"target_modules": ["q_proj", "v_projj"]},
        ["target_modules", "'v_projj'", "v_proj"],
    ),
    "nothing matches": ({"target_modules": ["query"]}, ["target_modules", "matches no module"]),
    "pattern": ({"target_modules": ".*_qq"}, ["target_modules", ".*_qq", "matches no module"]),
    "unsupported type": (
        {"target_modules": ["norm"]},
        ["layers.0.norm: LayerNorm cannot carry", "nn.Linear"],
    ),
    "rank_pattern": ({"rank_pattern": {"down": 2}}, ["rank_pattern", "'down'"]),
    "alpha_pattern": ({"alpha_pattern": {"q_prj": 2}}, ["alpha_pattern", "'q_prj'", "q_proj"]),
    "exclude_modules": ({"exclude_modules": ["nope"]}, ["exclude_modules", "'nope'"]),
    "layers_to_transform": ({"layers_to_transform": [0, 9]}, ["layers_to_transform: 9"]),
    "modules_to_save": ({"modules_to_save": ["heed"]}, ["modules_to_save", "'heed'", "head"]),
    "no default": ({"target_modules": None}, ["target_modules is None", "all-linear", "q_proj", "c_fc"]),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_each_refusal_says_what_and_where(case):
    changes, words = ERRORS[case]
    model = tiny()
    before = Snapshot(model)
    with pytest.raises(PlanError) as caught:
        get_peft_model(model, config(**changes))
    for word in words:
        assert word in str(caught.value)
    before.assert_same(model)


def test_all_problems_come_at_once():
    wrong = config(
        target_modules=["q_proj", "norm", "v_projj"], rank_pattern={"down": 2}, modules_to_save=["heed"]
    )
    with pytest.raises(PlanError) as caught:
        plan(tiny(), wrong)
    text = "\n".join(caught.value.problems)
    for word in ("norm", "v_projj", "down", "heed"):
        assert word in text
    assert len(caught.value.problems) == 5, "two norms, and one for each of the other three"


def test_from_a_file_what_matches_nothing_is_a_note():
    made = make_plan(tiny(), config(target_modules=["q_proj", "nope"]), source="file")
    assert [spec.path for spec in made.specs] == ["layers.0.q_proj", "layers.1.q_proj"]
    assert any("'nope'" in note for note in made.notes)


def test_attention_that_reads_the_weight_is_refused_by_name_and_left_out_of_all():
    with pytest.raises(PlanError, match=r"attention\.out_proj.*without calling"):
        plan(Shared(), config(target_modules=["out_proj"]))
    made = plan(Shared(), config(target_modules="all-linear"))
    assert [spec.path for spec in made.specs] == ["first"]


def test_all_linear_leaves_out_the_head_and_what_is_trained_whole():
    made = plan(tiny_llama(), config(target_modules="all-linear"))
    assert {spec.path.rpartition(".")[2] for spec in made.specs} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    made = plan(tiny(), config(target_modules="all-linear", modules_to_save=["layers.0"]))
    assert all(spec.path.startswith(("layers.1", "head")) for spec in made.specs)


def test_default_targets_of_a_known_model():
    made = plan(tiny_llama(), config(target_modules=None))
    assert {spec.path.rpartition(".")[2] for spec in made.specs} == {"q_proj", "v_proj"}
    assert made.config.target_modules == {"q_proj", "v_proj"}


PLANS = (
    {},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"c_fc": 3}},
    {"lora_bias": True, "target_modules": ["q_proj"]},
    {"bias": "all"},
    {"bias": "lora_only", "modules_to_save": ["head", "norm"]},
)


@pytest.mark.parametrize("changes", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_is_what_is_made_and_planning_touches_nothing(changes, dtype):
    model, wanted = tiny(dtype=dtype), config(**changes)
    before, said = Snapshot(model), wanted.to_dict()
    made = plan(model, wanted)
    before.assert_same(model)
    assert wanted.to_dict() == said
    peft = get_peft_model(model, wanted)
    tensors = [item.tensor for item in peft.base_model.registry.tensors("default")]
    assert (
        made.parameters == sum(tensor.numel() for tensor in tensors) == peft.get_nb_trainable_parameters()[0]
    )
    assert made.bytes == sum(tensor.nbytes for tensor in tensors)
    for spec in made.specs:
        layer = peft.base_model.registry.layers[spec.path]
        assert (layer.r["default"], layer.scaling["default"]) == (spec.r, spec.lora_alpha / spec.r)
        assert layer.lora_A["default"].weight.dtype == spec.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "mica"},
        {"velora_config": VeloraConfig(num_groups=2)},
        {"use_dora": True},
        {"modules_to_save": ["head"], "init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_the_plan_counts_as_trained_what_is_trained(changes):
    """MiCA's B and VeLoRA's direction are the adapter's, in its bytes, and never trained."""
    model, wanted = tiny(), config(**changes)
    made = plan(model, wanted)
    peft = get_peft_model(model, wanted)
    assert made.parameters == peft.get_nb_trainable_parameters()[0]
    assert made.bytes == sum(item.tensor.nbytes for item in peft.base_model.registry.tensors("default"))


def test_a_plan_reads_as_a_table():
    made = plan(tiny(), config(modules_to_save=["head"], bias="lora_only"))
    lines = str(made).splitlines()
    assert lines[0].split()[0] == "layers.0.q_proj"
    assert sum("trained whole" in line for line in lines) == 1
    assert sum("trained bias" in line for line in lines) == 4
    assert lines[-1] == f"4 modules, {made.parameters:,} parameters, {made.bytes:,} bytes"


def test_planning_a_second_adapter_sees_the_base_not_the_wrappers():
    model = with_adapter(tiny())
    another(model, "other", target_modules="all-linear")
    assert set(model.base_model.registry.layers) == {
        name
        for name, module in Tiny().named_modules()
        if (kind := describe(Tiny()).nodes[name].kind) is not None and kind.is_linear
    }
    assert model(ids()).shape == (2, 5, 11)
