"""PEFT as the judge: the same fields, the same file, the same modules."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from lorakit.config import TARGET_MODULES, LoraConfig, Matcher

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
    from peft.utils.other import get_pattern_key

PATHS = [
    "q_proj", "lm_head", "model.lm_head", "score", "layers.1.q_proj", "0.q_proj", "a.0.q_proj", "a.b.0", "a.b.0.q_proj",
    "model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.v_proj", "model.layers.1.mlp.experts.7.up_proj",
    "h.3.attn.c_attn", "transformer.h.3.attn.c_attn", "model.model_layers.1.q_proj", "a.b.c.1.2.q_proj", "a.b.x1.2.q_proj",
    "visual.blocks.5.q_proj", "model.layersx.1.q_proj", "encoder.layer.2.score.dense", "model.score.q_proj", "a..1.q_proj",
]  # fmt: skip

CONFIGS = [
    {"target_modules": ["q_proj", "c_attn"]},
    {"target_modules": ["self_attn.q_proj", "1.q_proj", "lm_head", "a.0.q_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"q_proj|.*score.*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj", "visual"]},
    {"target_modules": ["q_proj"], "exclude_modules": r"visual.*|a\..*"},
    {"target_modules": [], "exclude_modules": []},
    {"target_modules": ["q_proj", "dense", "lm_head"], "modules_to_save": ["score", "lm_head"]},
    {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["model.s.*", "h"]},
    *(
        {"target_modules": ["q_proj", "v_proj", "c_attn", "up_proj"], "layers_to_transform": layers, "layers_pattern": names}
        for layers in (0, 1, [1, 10], [2], [3, 7], [])
        for names in (None, "layers", ["h", "layers"], ["experts"], "", [], ["lay.*"], ["model_layers"], "h|layers")
        if names in (None, "", []) or layers is not None
    ),
]  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_same_modules(fields):
    ours, theirs = Matcher(LoraConfig(**fields)), peft.LoraConfig(**fields)
    for path in PATHS:
        assert ours.target(path) == bool(check_target_module_exists(theirs, path)), path


@pytest.mark.parametrize(
    "keys",
    [["q_proj", "layers.1.self_attn.q_proj"], ["layers.1.self_attn.q_proj", "q_proj"], ["^q_proj", "^a.b", "score$"],
     [r".*\.1\..*", "q_proj"], [r"layers\.1\..*", r"model.*proj"], ["1.q_proj", "layers.1"], ["q_proj|v_proj", "attn.v_proj"],
     ["proj", "_attn", "c.attn", r"c\.attn"], ["^model.layers.1.self_attn.q_proj$"]],
    ids=str,
)  # fmt: skip
def test_same_first_key(keys):
    ranks = {key: order + 50 for order, key in enumerate(keys)}
    matcher = Matcher(LoraConfig(rank_pattern=ranks, alpha_pattern=ranks))
    for path in PATHS:
        wanted = ranks.get(get_pattern_key(ranks.keys(), path), 8)
        assert (matcher.rank(path), matcher.alpha(path)) == (wanted, wanted), path


def test_same_fields_order_and_defaults():
    ours = [f for f in dataclasses.fields(LoraConfig) if f.name != "extra"]
    theirs = dataclasses.fields(peft.LoraConfig)
    assert [f.name for f in ours] == [f.name for f in theirs]
    a, b = LoraConfig(), peft.LoraConfig()
    for name in (f.name for f in ours if f.name not in ("runtime_config", "peft_version")):
        assert getattr(a, name) == getattr(b, name), name
        assert str(getattr(a, name)) == str(getattr(b, name)) or name == "peft_type", name


FILES = [
    {
        "target_modules": ["b", "a"],
        "r": 4,
        "task_type": "CAUSAL_LM",
        "rank_pattern": {"a": 2},
        "lora_alpha": 32,
    },
    {
        "target_modules": r".*q",
        "exclude_modules": ["x"],
        "modules_to_save": ["score"],
        "use_rslora": True,
        "bias": "all",
    },
    {"target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "h", "lora_bias": True},
    {"target_modules": ["q"], "init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    {"target_modules": ["q"], "init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 8}},
    {"target_modules": ["q"], "init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    {
        "target_modules": ["q"],
        "trainable_token_indices": {"embed": [1]},
        "layer_replication": [[0, 2], [1, 3]],
    },
    {"target_modules": ["q"], "kasa_config": {}, "arrow_config": {"top_k": 2}, "use_bdlora": {"nblocks": 2}},
]


@pytest.mark.parametrize("fields", FILES, ids=str)
def test_each_reads_the_file_of_the_other(fields, tmp_path):
    theirs, ours = peft.LoraConfig(**fields), LoraConfig(**fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()

    read_theirs = LoraConfig.from_pretrained(tmp_path / "theirs")
    read_ours = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    assert read_ours.to_dict() == {**theirs.to_dict(), "peft_version": peft.__version__} | {
        key: read_ours.to_dict()[key] for key in ("layer_replication",)
    }
    read_theirs.save_pretrained(tmp_path / "again")
    for file in files:
        file.pop("peft_version")
        file["target_modules"] = sorted(file["target_modules"])
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again.pop("peft_version") == peft.__version__
    again["target_modules"] = sorted(again["target_modules"])
    assert again == files[0]


def test_known_targets_hold_all_of_pefts():
    for model_type, names in PEFT_TARGETS.items():
        ours = TARGET_MODULES[model_type]
        assert (ours if isinstance(ours, str) else list(ours)) == names
