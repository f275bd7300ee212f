"""What a merge on disk refuses: by name, before anything is written, with the inputs as they were."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import LoraConfig, merge_checkpoint
from lorakit.checkpoint.merging import conversions
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    KeyMismatchError,
    NonFiniteError,
    UnsupportedError,
)
from merging import read_bytes, save_adapter, save_base
from models import tiny_llama

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"


def lora(targets=("q_proj", "v_proj"), **changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **changes})


@pytest.fixture
def root(tmp_path):
    """A base in shards and an adapter for it."""
    transformers.utils.logging.disable_progress_bar()
    save_base(tiny_llama(), tmp_path / "base", max_shard_size="8KB")
    save_adapter(tiny_llama(), lora(), tmp_path / "adapter")
    return tmp_path


def refused(root, error, match, *, base="base", adapters="adapter", **options):
    """A merge that raises and leaves everything as it was."""
    before, entries = read_bytes(root), sorted(root.iterdir())
    paths = [root / adapters] if isinstance(adapters, str) else [root / name for name in adapters]
    with pytest.raises(error, match=match) as caught:
        merge_checkpoint(root / base, paths, root / "out", **options)
    assert sorted(root.iterdir()) == entries
    assert read_bytes(root) == before
    return str(caught.value)


def edit_config(folder, name="adapter_config.json", **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_adapter(folder, change):
    """Give an adapter other tensors, with a digest that fits."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    write_adapter(folder, config, tensors)


# ---- the request ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapters": []}, "adapters: got none"),
        ({"weights": [1.0, 2.0]}, "a finite number for each of the 1 adapters"),
        ({"weights": [float("nan")]}, "a finite number"),
        ({"dtype": "int8"}, "dtype: got 'int8', wanted one of"),
        ({"dtype": "nonsense"}, "dtype: got 'nonsense'"),
        ({"max_shard_size": "5 apples"}, "max_shard_size: got '5 apples'"),
        ({"max_shard_size": 0}, "max_shard_size: got 0"),
        ({"max_shard_size": True}, "max_shard_size: got True"),
    ],
)
def test_unsound_arguments(root, options, match):
    refused(root, ConfigError, match, **options)


def test_places_that_are_taken(root):
    out = root / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(root, ConfigError, "is not empty; choose another output, or pass overwrite=True")
    refused(root, ConfigError, "holds no checkpoint, so it is not replaced", overwrite=True)
    (out / "notes.txt").unlink()
    out.rmdir()
    out.write_text("a file")
    refused(root, ConfigError, "is there and is no folder", overwrite=True)
    out.unlink()
    out.symlink_to(root / "base")
    refused(root, ConfigError, "is there and is no folder", overwrite=True)


@pytest.mark.parametrize("place", ["base", "adapter", "base/merged", "."])
def test_outputs_that_overlap_an_input(root, place):
    before = read_bytes(root)
    with pytest.raises(ConfigError, match=r"overlaps the input|holds no checkpoint"):
        merge_checkpoint(root / "base", root / "adapter", root / place, overwrite=True)
    assert read_bytes(root) == before


# ---- the base -------------------------------------------------------------------------------------------


def _first_shard(root):
    return min((root / "base").glob("*.safetensors"))


def _index(root, change):
    path = root / "base" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def _truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


BASES = {
    "no folder": (
        lambda root: (root / "base").rename(root / "other"),
        AdapterNotFoundError,
        "no such folder; wanted one",
    ),
    "no weights": (
        lambda root: [path.unlink() for path in (root / "base").glob("*.safetensors*")],
        AdapterNotFoundError,
        "has neither model.safetensors nor",
    ),
    "a pickle": (
        lambda root: (
            [path.unlink() for path in (root / "base").glob("*.safetensors*")],
            (root / "base" / "pytorch_model.bin").write_bytes(b""),
        ),
        UnsupportedError,
        "only safetensors can be read in place",
    ),
    "a shard is missing": (
        lambda root: _first_shard(root).unlink(),
        AdapterNotFoundError,
        r"the index names files that are not there:\n  - model-00001",
    ),
    "a shard is cut": (
        lambda root: _truncate(_first_shard(root), 3000),
        AdapterFormatError,
        r"model-00001.*cut off",
    ),
    "a header is cut": (
        lambda root: _truncate(_first_shard(root), 20),
        AdapterFormatError,
        "model-00001.*cut off",
    ),
    "a header that claims too much": (
        lambda root: _first_shard(root).write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
        AdapterFormatError,
        "its header claims",
    ),
    "a header of overlapping tensors": (
        lambda root: _first_shard(root).write_bytes(
            len(
                raw
                := b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
            ).to_bytes(8, "little")
            + raw
            + bytes(4)
        ),
        AdapterFormatError,
        "overlaps the tensor before it",
    ),
    "a git-lfs pointer": (
        lambda root: _first_shard(root).write_text("version https://git-lfs.github.com/spec/v1\n"),
        AdapterFormatError,
        "git lfs pull",
    ),
    "an index that disagrees": (
        lambda root: _index(root, lambda names: names.update({"model.norm.weight": min(names.values())})),
        AdapterFormatError,
        "its files do not agree",
    ),
    "an index of files elsewhere": (
        lambda root: _index(root, lambda names: names.update({"model.norm.weight": "../x.safetensors"})),
        AdapterFormatError,
        "wanted a weight_map",
    ),
    "a shard that is a link to elsewhere": (
        lambda root: (
            _first_shard(root).rename(root / "elsewhere"),
            (root / "base" / "model-00001-of-00003.safetensors").symlink_to(root / "elsewhere"),
        ),
        AdapterFormatError,
        "a symbolic link to",
    ),
    "a config that is no object": (
        lambda root: (root / "base" / "config.json").write_text("[]"),
        AdapterFormatError,
        "config.json: holds a list",
    ),
    "quantised": (
        lambda root: edit_config(
            root / "base", "config.json", quantization_config={"quant_method": "bitsandbytes"}
        ),
        UnsupportedError,
        r"quantised \(bitsandbytes\); merge into the one that it was quantised from",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_cannot_be_read(root, name):
    damage, error, match = BASES[name]
    damage(root)
    refused(root, error, f"(?s){match}")


def test_a_base_with_a_tensor_twice(root):
    first, second = sorted((root / "base").glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
    refused(root, AdapterFormatError, "is in two files")


def test_quantised_numbers_are_told_by_their_weight(root):
    file = next(path for path in (root / "base").glob("*.safetensors") if f"{Q}.weight" in load_file(path))
    tensors = load_file(file)
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    refused(root, KeyMismatchError, "q_proj: the base's weight is int8, quantised")


# ---- whether the two go together ----------------------------------------------------------------------


def test_an_adapter_for_a_base_of_another_size(root):
    text = refused(
        _with_base(root, hidden_size=24), KeyMismatchError, "found .*'A': .4, 16.*needs .*'A': .4, 24"
    )
    assert text.count("wrong shape") == 4


def _with_base(root, **changes):
    config = tiny_llama().config
    for name, value in {"head_dim": 8, **changes}.items():
        setattr(config, name, value)
    for path in (root / "base").iterdir():
        path.unlink()
    save_base(transformers.LlamaForCausalLM(config), root / "base")
    return root


def test_an_adapter_for_a_deeper_base_is_listed_whole_with_near_names(root):
    text = refused(
        _with_base(root, num_hidden_layers=1), KeyMismatchError, "did you mean 'model.layers.0.self_attn"
    )
    assert text.count("unexpected") == 4
    assert "Is this the base that the adapter was made for?" in text


def test_names_that_could_stand_for_several_parts(root):
    for path in (root / "base").iterdir():
        path.unlink()
    tensors = tiny_llama().model.state_dict()
    both = {
        f"{part}.{name}": tensor.clone() for part in ("text", "vision") for name, tensor in tensors.items()
    }
    save_file(both, root / "base" / "model.safetensors")
    save_adapter(tiny_llama().model, lora(), root / "adapter")
    refused(root, UnsupportedError, "could stand for several parts of the base")


ADAPTERS = {
    "no folder": (
        lambda folder: folder.rename(folder.parent / "other"),
        AdapterNotFoundError,
        "no such folder",
    ),
    "cut": (
        lambda folder: _truncate(folder / "adapter_model.safetensors", 500),
        AdapterFormatError,
        "cut off",
    ),
    "a bit that flipped": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-1] + b"\x00"
        ),
        AdapterFormatError,
        "its digest does not fit",
    ),
    "not finite": (
        lambda folder: save_file(
            {
                name: torch.full_like(tensor, torch.nan) if "lora_B" in name else tensor
                for name, tensor in load_file(folder / "adapter_model.safetensors").items()
            },
            folder / "adapter_model.safetensors",
        ),
        NonFiniteError,
        "NaN",
    ),
    "a factor is missing": (
        lambda folder: rewrite_adapter(folder, lambda tensors: tensors.pop(KEY)),
        KeyMismatchError,
        f"{Q}: lacks A",
    ),
    "a weight is missing": (
        lambda folder: rewrite_adapter(
            folder,
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.self_attn.q" in name],
        ),
        KeyMismatchError,
        r"missing: model.layers.1.self_attn.q_proj.weight\n.*--no-strict",
    ),
    "a weight of the base": (
        lambda folder: rewrite_adapter(
            folder, lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(16)})
        ),
        KeyMismatchError,
        "unexpected: base_model.model.model.norm.weight",
    ),
    "a key without the prefix of the others": (
        lambda folder: rewrite_adapter(
            folder, lambda tensors: tensors.update({"x.lora_A.weight": torch.ones(4, 4)})
        ),
        AdapterFormatError,
        "does not start with 'base_model.model.'",
    ),
    "a key that is two": (
        lambda folder: rewrite_adapter(
            folder,
            lambda tensors: tensors.update(
                {f"base_model.model.{Q}{name}.bias": torch.ones(4) for name in ("", ".base_layer")}
            ),
        ),
        AdapterFormatError,
        "are one tensor of the base",
    ),
    "another rank than the config's": (
        lambda folder: edit_config(folder, r=2),
        KeyMismatchError,
        "with rank 2 needs",
    ),
    "an unknown kind": (lambda folder: edit_config(folder, peft_type="IA3"), ConfigError, "peft_type"),
    "aLoRA": (
        lambda folder: edit_config(folder, alora_invocation_tokens=[1]),
        UnsupportedError,
        "does what no weight does",
    ),
    "more layers": (
        lambda folder: edit_config(folder, layer_replication=[[0, 2], [0, 2]]),
        UnsupportedError,
        "layer_replication makes a deeper model",
    ),
    "an unconverted PiSSA": (
        lambda folder: edit_config(folder, init_lora_weights="pissa"),
        UnsupportedError,
        "belongs to a base whose weights this scheme",
    ),
}


@pytest.mark.filterwarnings("ignore:.*changed after the adapter was saved:UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_cannot_be_merged(root, name):
    damage, error, match = ADAPTERS[name]
    damage(root / "adapter")
    refused(root, error, f"(?s){match}")


def test_what_is_missing_is_a_note_where_it_may_be(root):
    rewrite_adapter(
        root / "adapter",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.self_attn.q" in name],
    )
    report = merge_checkpoint(root / "base", root / "adapter", root / "out", strict=False)
    assert report.notes == (
        "model.layers.1.self_attn.q_proj.weight: the config names it, and the adapter has nothing for it",
    )
    assert report.merged == 3


def test_a_merge_that_overflows(root):
    for path in (root / "base").iterdir():
        path.unlink()
    save_base(tiny_llama().half(), root / "base")
    rewrite_adapter(root / "adapter", lambda tensors: tensors.update({KEY: torch.full((4, 16), 3e5)}))
    refused(root, NonFiniteError, "q_proj.weight: merging would give NaN or infinity in float16")


def test_numbers_that_a_narrow_dtype_cannot_hold(root):
    file = next(
        path for path in (root / "base").glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    save_file({**load_file(file), "model.norm.weight": torch.full((16,), 1e6)}, file, {"format": "pt"})
    refused(root, NonFiniteError, "model.norm.weight: .*in float16", dtype="float16")


# ---- what adapters own ----------------------------------------------------------------------------------


def test_a_vocabulary_that_was_resized(root):
    save_adapter(tiny_llama(), lora(modules_to_save=["lm_head"]), root / "adapter")
    key = "base_model.model.lm_head.weight"
    rewrite_adapter(root / "adapter", lambda tensors: tensors.update({key: torch.ones(13, 16)}))
    refused(root, KeyMismatchError, "resize and save the base first")


def test_part_of_a_module_that_is_saved_whole(root):
    save_adapter(tiny_llama(), lora(modules_to_save=["mlp"]), root / "adapter")
    key = "base_model.model.model.layers.1.mlp.up_proj.weight"
    rewrite_adapter(root / "adapter", lambda tensors: tensors.pop(key))
    refused(root, KeyMismatchError, "missing: model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([3, 99], "tokens .99. are not among the 11 rows"),
        ([3], "2 token rows .* names 1"),
        ([3, 3], "names 1 different"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*changed after the adapter was saved:UserWarning")
def test_token_rows_that_the_base_does_not_have(root, tokens, match):
    save_adapter(tiny_llama(), lora(trainable_token_indices=[3, 5]), root / "adapter")
    edit_config(root / "adapter", trainable_token_indices={"embed_tokens": tokens})
    refused(root, (KeyMismatchError, AdapterFormatError, ConfigError), match)


def test_two_adapters_that_own_the_same(root):
    for name, changes in {
        "a": {"modules_to_save": ["lm_head"]},
        "b": {"trainable_token_indices": [3]},
    }.items():
        save_adapter(tiny_llama(), lora(**changes), root / name)
        save_adapter(tiny_llama(), lora(**changes), root / f"{name}2", seed=5)
    refused(root, AdapterStateError, "lm_head.weight: .*each bring their own", adapters=["a", "a2"])
    refused(root, AdapterStateError, r"two adapters replace the rows of tokens \[3\]", adapters=["b", "b2"])
    save_adapter(tiny_llama(), lora(["lm_head"]), root / "c")
    refused(root, AdapterStateError, "one adapter replaces what another one changes", adapters=["a", "c"])


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}])
def test_what_replaces_cannot_be_weighed(root, changes):
    save_adapter(tiny_llama(), lora(**changes), root / "adapter")
    refused(root, UnsupportedError, "cannot be weighed; merge it with weight 1", weights=[0.5])


def test_a_bias_for_which_the_base_has_no_place(root):
    save_adapter(tiny_llama(), lora(lora_bias=True), root / "adapter")
    refused(root, KeyMismatchError, "lora_bias=True, and the base's layer has no bias")


# ---- what files do not tell -----------------------------------------------------------------------------


def test_an_encoder_decoder_with_tied_weights(root):
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    model = transformers.T5ForConditionalGeneration(config)
    save_base(model, root / "t5")
    save_adapter(model, lora(["shared"]), root / "adapter")
    refused(root, UnsupportedError, "are tied in an encoder-decoder", base="t5")
    save_adapter(transformers.T5ForConditionalGeneration(config), lora(["q"]), root / "other")
    assert merge_checkpoint(root / "t5", root / "other", root / "out").untied == ()


def test_a_class_whose_ties_nobody_knows(root):
    save_adapter(tiny_llama(tie=True), lora(["embed_tokens"]), root / "adapter")
    save_base(tiny_llama(tie=True), root / "tied")
    edit_config(root / "tied", "config.json", architectures=["OwnForCausalLM"])
    refused(root, UnsupportedError, "may be tied to other weights", base="tied")
    edit_config(root / "tied", "config.json", tie_word_embeddings=False)
    assert merge_checkpoint(root / "tied", root / "adapter", root / "out").merged == 1


class Experts(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape)))


class Model(nn.Module):
    def __init__(self, *shapes, groups=1):
        super().__init__()
        self.experts = Experts(*shapes)
        self.conv = nn.Conv1d(8, 8, 3, groups=groups)


def _from_parts(root, model, config, **json_config):
    save_base(model, root / "own")
    (root / "own" / "config.json").write_text(json.dumps(json_config))
    save_adapter(model, config, root / "adapter")


@pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")
def test_a_grouped_convolution(root):
    _from_parts(root, Model((2, 4, 6), groups=2), lora(["conv"]))
    refused(root, KeyMismatchError, "conv: a convolution in 2 groups; merging makes it ungrouped", base="own")


def test_parameters_that_look_alike(root):
    config = lora([], target_parameters=["experts.w0", "experts.w1"])
    _from_parts(root, Model((2, 4, 6), (2, 4, 6)), config)
    refused(root, KeyMismatchError, r"fits \['experts.w0', 'experts.w1'\] alike", base="own")


def test_square_experts_of_foreign_code(root):
    config = lora([], target_parameters=["experts.w0"])
    _from_parts(root, Model((2, 6, 6)), config, auto_map={"AutoModel": "own.Model"})
    refused(root, KeyMismatchError, "in a model with code of its own", base="own")


def test_a_conversion_that_is_no_range_of_elements(root, monkeypatch):
    config = transformers.MixtralConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    save_base(model, root / "mixtral")
    save_adapter(model, lora([], target_parameters=["experts.down_proj"]), root / "adapter")
    monkeypatch.setattr(conversions, "_RECIPES", {})
    refused(root, UnsupportedError, "makes it of the checkpoint's tensors by MergeModulelist", base="mixtral")
