"""Every finding of `doctor` on an adapter that has what it is about, and the loader's word on each of them."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import AdapterError, AdapterNotFoundError
from models import config, randomise, tiny_bert, tiny_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS = {
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
}


def saved(folder, base=None, **changes):
    model = lorakit.get_peft_model(base or tiny_llama(), config(**{**FIELDS, **changes}))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def tensors(folder):
    return load_file(folder / WEIGHTS)


def rewrite(folder, found):
    """As another library would write it: without our copy of the config and our digest."""
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / WEIGHTS, {"format": "pt"})


def renamed(folder, change):
    saved(folder)
    rewrite(folder, {change(key): tensor for key, tensor in tensors(folder).items()})


def changed(folder, change, **changes):
    saved(folder, **changes)
    found = tensors(folder)
    change(found)
    rewrite(folder, found)


def refielded(folder, drop=(), **fields):
    saved(folder)
    rewrite(folder, tensors(folder))  # so that the file counts and not the copy
    content = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(
        json.dumps({key: value for key, value in content.items() if key not in drop})
    )


def first(found, part):
    return next(key for key in found if part in key)


def set_first(part, value):
    def change(found):
        found[first(found, part)] = value

    return change


def zero_all_b(found):
    for key in found:
        if "lora_B" in key:
            found[key] = torch.zeros_like(found[key])


def lfs(folder):
    saved(folder)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def pickle(folder):
    saved(folder)
    torch.save(tensors(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def in_subfolder(folder):
    saved(folder / "style")


def other_file(name, keys):
    def make(folder):
        folder.mkdir()
        save_file({key: torch.ones(2, 2) for key in keys}, folder / name)

    return make


def foreign_keys(*keys):
    def make(folder):
        saved(folder)
        rewrite(folder, {key: torch.ones(2, 2) for key in keys})

    return make


def cut(folder):
    saved(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-9])


def flipped(folder):
    saved(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def edited(folder):
    saved(folder)
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {"lora_alpha": 99}))


def empty_folder(folder):
    folder.mkdir()


def half_a_pair(folder):
    changed(folder, lambda found: found.pop(first(found, "lora_B")))


def untied_head(folder):
    saved(folder, tiny_llama(tie=True), modules_to_save=["lm_head"])


def with_embeddings(folder):
    saved(folder)
    rewrite(folder, tensors(folder) | {"base_model.model.model.embed_tokens.weight": torch.ones(11, 16)})


def of_a_classifier(folder):
    saved(folder, tiny_bert(), target_modules=["query"], task_type="SEQ_CLS")


PREFIX = "base_model.model."
# name: how it is made, the check that must speak and its level, a part of what it says, of its fix, whether the base is given
CASES = {
    "pointer": (lfs, "git-lfs-pointer", "error", "git-lfs pointer", "git lfs pull", False),
    "pickle": (pickle, "pickle", "error", "can run code", "allow_pickle_bin=True", False),
    "subfolder": (in_subfolder, "in-subfolder", "error", "in style", "subfolder='style'", False),
    "nothing": (empty_folder, "no-weights", "error", "no adapter_model.safetensors", "Copy", False),
    "another file": (other_file("model.safetensors", ["a.weight"]), "no-weights", "error", "not an adapter", "", False),
    "diffusers file": (
        other_file("pytorch_lora_weights.safetensors", ["unet.a.lora_A.weight"]),
        "foreign-format", "error", "diffusers", "lorakit convert", False,
    ),
    "mlx file": (other_file("adapters.safetensors", ["m.q.lora_a"]), "foreign-format", "error", "mlx", "convert", False),
    "kohya keys": (
        foreign_keys("lora_unet_a.lora_down.weight", "lora_unet_a.alpha"), "foreign-format", "error", "kohya", "convert", False,
    ),
    "cut": (cut, "unreadable", "error", "cut off", "Copy", False),
    "flipped bit": (flipped, "digest", "error", "damaged or changed", "Copy", False),
    "edited config": (edited, "two-configs", "warning", "lora_alpha", "", False),
    "wrong value": (lambda f: refielded(f, r=-1), "config", "error", "r: got -1", "Correct", False),
    "missing field": (lambda f: refielded(f, drop=["r"]), "config", "error", "r: missing", "Correct", False),
    "unknown field": (lambda f: refielded(f, shiny=1), "unknown-fields", "note", "shiny", "", False),
    "no base": (lambda f: refielded(f, drop=["base_model_name_or_path"]), "no-base-name", "note", "is empty", "", False),
    "pissa as it is": (
        lambda f: refielded(f, init_lora_weights="pissa"), "changed-base", "error", "'pissa'", "--rank 8.", False,
    ),
    "corda as it is": (
        lambda f: refielded(f, init_lora_weights="corda"), "changed-base", "error", "'corda'", "weight_conversion=...).", False,
    ),
    "megatron": (lambda f: refielded(f, megatron_config={"a": 1}), "unsupported", "error", "megatron_config", "", False),
    "no prefix": (
        lambda f: renamed(f, lambda key: key.removeprefix(PREFIX)), "prefix", "error", "do not begin with", PREFIX, False,
    ),
    "prefix twice": (lambda f: renamed(f, lambda key: PREFIX + key), "doubled-prefix", "error", "twice", "key_mapping", False),
    "compiled": (
        lambda f: renamed(f, lambda key: key.replace(PREFIX, PREFIX + "_orig_mod.")),
        "wrapper-in-keys", "error", "_orig_mod.", "key_mapping", False,
    ),
    "state dict": (
        lambda f: renamed(f, lambda key: key.replace(".weight", ".default.weight")),
        "adapter-name-in-keys", "error", "default", "save_pretrained", False,
    ),
    "half a pair": (half_a_pair, "factors", "error", "has only", "Restore", False),
    "other rank": (lambda f: refielded(f, r=16), "factors", "error", "rank 16", "Restore", False),
    "zero": (lambda f: changed(f, set_first("lora_A", torch.zeros(0))), "zero-size", "error", "ZeRO-3", "get_state_dict", False),
    "no factors": (foreign_keys(PREFIX + "lm_head.weight"), "no-factors", "error", "no LoRA tensors", "", False),
    "not named": (
        lambda f: refielded(f, target_modules=["q_proj"]), "not-targeted", "error", "v_proj", "target_modules", False,
    ),
    "named in vain": (
        lambda f: refielded(f, target_modules=["q_proj", "v_proj", "wqkv"]), "nothing-for-target", "warning", "wqkv", "", False,
    ),
    "NaN": (
        lambda f: changed(f, set_first("lora_A", torch.full((4, 16), float("nan")))),
        "not-finite", "error", "NaN", "diverged", False,
    ),
    "no effect": (lambda f: changed(f, zero_all_b), "zero-factors", "warning", "change nothing", "before a step", False),
    "one dead": (
        lambda f: changed(f, set_first("lora_B", torch.zeros(16, 4))), "zero-factors", "warning", "1 of 4", "not reached", False,
    ),
    "dtypes": (
        lambda f: changed(f, set_first("lora_A", torch.ones(4, 16, dtype=torch.bfloat16))),
        "dtype", "note", "1 of bfloat16", "", False,
    ),
    "rank 24": (lambda f: saved(f, r=24), "vllm-rank", "note", "rank 24", "--max-lora-rank 32", False),
    "rank 600": (lambda f: saved(f, r=600), "vllm-rank", "note", "rank 600", "resize --rank 512", False),
    "dora": (lambda f: saved(f, use_dora=True), "vllm-dora", "note", "DoRA", "merge", False),
    "head": (lambda f: saved(f, modules_to_save=["lm_head"]), "vllm-modules", "note", "lm_head", "merge", False),
    "biases": (
        lambda f: saved(f, tiny_bert(), target_modules=["query"], task_type=None, bias="lora_only"),
        "vllm-bias", "note", "bias='lora_only'", "merge", False,
    ),
    "bias of B": (lambda f: saved(f, lora_bias=True), "vllm-bias", "note", "lora_bias", "merge", False),
    "tokens": (lambda f: saved(f, trainable_token_indices=[1, 2]), "vllm-tokens", "note", "trainable_token", "merge", False),
    "ranks": (lambda f: saved(f, rank_pattern={"q_proj": 2}), "vllm-patterns", "note", "rank_pattern", "merge", False),
    "what it adapts": (saved, "targets", "note", "2 q_proj, 2 v_proj", "", False),
    "fits": (saved, "fits", "note", "4 adapted weights of kinds linear", "", True),
    "another name": (saved, "base-name", "warning", "'org/base'", "another model of the same shapes", True),
    "a wider base": (
        lambda f: saved(f, wide_llama()), "wrong-base", "error", "4 of 8", "hidden size of the one given is 16", True,
    ),
    "a longer base": (lambda f: saved(f, tiny_llama_of(3)), "unexpected-keys", "error", "layers.2", "strict=False", True),
    "a shorter base": (lambda f: saved(f, tiny_llama_of(1)), "missing-keys", "error", "layers.1", "strict=False", True),
    "another architecture": (
        lambda f: saved(f, tiny_bert(), target_modules=["query"], task_type=None, auto_mapping=None),
        "plan", "error", "matches no module", "Is this the base", True,
    ),
    "embeddings": (with_embeddings, "base-weights", "error", "embed_tokens", "allow_base_weights", True),
    "a larger vocabulary": (
        lambda f: saved(f, resized_llama(), modules_to_save=["lm_head"]),
        "wrong-shapes", "error", "lm_head.weight", "resize_token_embeddings", True,
    ),
    "tied": (untied_head, "tied-embeddings", "warning", "lm_head has an adapter", "ensure_weight_tying", "tied"),
    "named in vain for the base": (
        lambda f: refielded(f, target_modules=["q_proj", "v_proj", "wqkv"]), "base-note", "warning", "wqkv", "", True,
    ),
}  # fmt: skip


def tiny_llama_of(layers):
    from transformers import LlamaForCausalLM

    given = tiny_llama().config
    given.num_hidden_layers = layers
    return LlamaForCausalLM(given)


def wide_llama():
    from transformers import LlamaForCausalLM

    given = tiny_llama().config
    given.hidden_size = 32
    return LlamaForCausalLM(given)


def resized_llama():
    model = tiny_llama()
    model.resize_token_embeddings(20, mean_resizing=False)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tiny_llama().config.save_pretrained(folder / "plain")
    tiny_llama(tie=True).config.save_pretrained(folder / "tied")
    return folder


def make(name, tmp_path):
    folder = tmp_path / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES[name][0](folder)
        if name == "another architecture":  # its config must not name the class, which would be built then
            content = json.loads((folder / CONFIG).read_text()) | {
                "auto_mapping": None,
                "task_type": "CAUSAL_LM",
            }
            rewrite(folder, tensors(folder))
            (folder / CONFIG).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_each_finding_is_found(name, tmp_path, bases):
    _, check, level, what, fix, base = CASES[name]
    folder = make(name, tmp_path)
    given = None if not base else bases / ("tied" if base == "tied" else "plain")
    found = lorakit.doctor(folder, given)
    mine = [finding for finding in found if finding.check == check]
    assert mine, found
    assert all(finding.level == level for finding in mine)
    assert any(what in finding.what and fix in finding.fix for finding in mine), mine
    assert all(finding.where and finding.what for finding in found)
    order = [("error", "warning", "note").index(finding.level) for finding in found]
    assert order == sorted(order)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] != "base-name"])
@pytest.mark.filterwarnings("ignore")
def test_the_loader_agrees(name, tmp_path, bases):
    """It refuses what doctor calls an error, and takes the rest."""
    folder = make(name, tmp_path)
    of_bert = name == "biases"
    base = tiny_bert() if of_bert else tiny_llama(tie=CASES[name][5] == "tied")
    errors = [finding for finding in lorakit.doctor(folder, base) if finding.level == "error"]
    if errors:
        with pytest.raises(AdapterError):
            lorakit.PeftModel.from_pretrained(base, folder)
    else:
        lorakit.PeftModel.from_pretrained(base, folder)


def test_a_healthy_adapter_has_notes_alone(tmp_path, bases):
    saved(tmp_path / "a", base_model_name_or_path=str(bases / "plain"))
    found = lorakit.doctor(tmp_path / "a", bases / "plain")
    assert [finding.check for finding in found] == ["targets", "fits"]


def test_a_classifier_is_fitted_with_its_own_number_of_labels(tmp_path):
    of_a_classifier(tmp_path / "a")
    base = tiny_bert()
    base.config.num_labels = 2  # what a config says that nobody told the labels
    assert [f for f in lorakit.doctor(tmp_path / "a", base.config) if f.level == "error"] == []


def test_single_files_and_broken_ones_are_told(tmp_path):
    saved(tmp_path / "a")
    shutil.copy(tmp_path / "a" / WEIGHTS, tmp_path / "lone.safetensors")
    assert lorakit.doctor(tmp_path / "lone.safetensors")[0].check == "no-weights"
    save_file({"lora_te_a.lora_up.weight": torch.ones(1, 1)}, tmp_path / "k.safetensors")
    assert "kohya" in lorakit.doctor(tmp_path / "k.safetensors")[0].what
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "gguf" in lorakit.doctor(tmp_path / "x.gguf")[0].what
    (tmp_path / "y.safetensors").write_bytes(b"x")
    assert lorakit.doctor(tmp_path / "y.safetensors")[0].check == "unreadable"
    (tmp_path / "z.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert lorakit.doctor(tmp_path / "z.safetensors")[0].check == "git-lfs-pointer"


def test_nothing_is_written(tmp_path, bases):
    saved(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    lorakit.doctor(tmp_path / "a", bases / "plain")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        lorakit.doctor(tmp_path / "none")
    saved(tmp_path / "a")
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        lorakit.doctor(tmp_path / "a", tmp_path / "none")


def test_a_config_of_another_rank_is_not_blamed_on_the_base(tmp_path, bases):
    folder = tmp_path / "adapter"
    folder.mkdir()
    refielded(folder, r=2)
    found = {finding.check for finding in lorakit.doctor(folder, bases / "plain") if finding.level == "error"}
    assert found == {"factors"}
