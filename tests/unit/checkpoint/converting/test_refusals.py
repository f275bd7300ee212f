"""What cannot be converted is refused by name, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversions import OUTPUTS, TARGETS, save_config, save_llama
from lorakit import convert
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    NonFiniteError,
    UnsupportedError,
)

GOLDEN = Path(__file__).parents[3] / "golden" / "convert"
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def refused(error, words, root, source, output, **options):
    """The message of a refusal; the outputs are as they were."""
    before = sorted(root.rglob("*"))
    with pytest.raises(error) as caught:
        convert(source, root / output, **options)
    message = str(caught.value)
    assert words in message, message
    assert sorted(root.rglob("*")) == before
    return message


REQUESTS = {
    "a format that there is not": (
        {"to": "gguff"},
        "a",
        ConfigError,
        "no format 'gguff'; did you mean 'gguf'?",
    ),
    "a source of no such format": ({"to": "mlx", "from_": "peftt"}, "a", ConfigError, "did you mean 'peft'?"),
    "nothing to convert": ({"to": "peft"}, "a", ConfigError, "of the format 'peft' already"),
    "a component that there is not": ({"to": "kohya", "component": "vae"}, "a", ConfigError, "'vae'"),
    "which model": ({"to": "kohya"}, "a.safetensors", ConfigError, "which model of the pipeline"),
    "no base": ({"to": "gguf"}, "a.gguf", ConfigError, "name the base model's folder"),
    "no base for torchtune": ({"to": "torchtune"}, "a", ConfigError, "name the base model's folder"),
    "a base that is not there": (
        {"to": "gguf", "base": "nowhere"},
        "a.gguf",
        AdapterNotFoundError,
        "no such folder",
    ),
    "the name of a gguf": ({"to": "gguf", "base": GOLDEN / "llama"}, "a.bin", ConfigError, "ends in .gguf"),
    "the name of a kohya": (
        {"to": "kohya", "component": "unet"},
        "a.bin",
        ConfigError,
        "ends in .safetensors",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests(tmp_path, case):
    options, output, error, words = REQUESTS[case]
    refused(error, words, tmp_path, GOLDEN / "llama-peft", output, **options)


def test_sources_that_tell_no_format(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refused(AdapterNotFoundError, "no such file", tmp_path, tmp_path / "b", "o", to="mlx")
    refused(AdapterFormatError, "of none of the formats", tmp_path, tmp_path / "a.txt", "o", to="mlx")
    refused(AdapterFormatError, "of none of the formats", tmp_path, tmp_path, "o", to="mlx")
    both = tmp_path / "both"
    save_llama(both)
    torch.save({}, both / "adapter_model.pt")
    refused(ConfigError, "peft and torchtune; say which", tmp_path, both, "o", to="mlx")
    assert convert(both, tmp_path / "o", to="mlx", from_="peft").modules == 6


@pytest.mark.parametrize(
    ("to", "name"), [("gguf", "o.gguf"), ("mlx", "o"), ("torchtune", "o"), ("peft", "o")]
)
def test_outputs_that_are_taken(tmp_path, to, name):
    base = GOLDEN / "llama"
    source = GOLDEN / ("llama-mlx" if to == "peft" else "llama-peft")
    convert(source, tmp_path / name, to=to, base=base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(ConfigError, "overwrite=True", tmp_path, source, name, to=to, base=base)
    convert(source, tmp_path / name, to=to, base=base, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_outputs_that_are_something_else(tmp_path):
    source, base = GOLDEN / "llama-peft", GOLDEN / "llama"
    (tmp_path / "folder.gguf").mkdir()
    refused(ConfigError, "a folder", tmp_path, source, "folder.gguf", to="gguf", base=base, overwrite=True)
    (tmp_path / "file").write_text("x")
    refused(ConfigError, "not a folder", tmp_path, source, "file", to="mlx", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    refused(ConfigError, "diary.txt", tmp_path, source, "mine", to="mlx", overwrite=True)


# ---- features -----------------------------------------------------------------------------------------

FEATURES = {
    "dora": ({"use_dora": True}, "DoRA", {"gguf", "kohya"}),
    "bias of B": ({"lora_bias": True}, "a bias of B", {"gguf", "mlx", "torchtune", "kohya"}),
    "embedding": (
        {"target_modules": [*TARGETS, "embed_tokens"]},
        "adapters of an embedding, at model.embed_tokens",
        {"torchtune", "kohya"},
    ),
    "alora": (
        {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
        "aLoRA",
        {"mlx", "torchtune", "kohya"},
    ),
}


@pytest.mark.filterwarnings("ignore:lora_bias=True, but:UserWarning")
@pytest.mark.parametrize("feature", FEATURES)
def test_features_without_a_place(tmp_path, feature):
    fields, words, without = FEATURES[feature]
    base = save_config(tmp_path / "base")
    save_llama(tmp_path / "a", **fields)
    for to in sorted(without):
        options = {"component": "text_encoder"} if to == "kohya" else {"base": base}
        message = refused(UnsupportedError, words, tmp_path, tmp_path / "a", OUTPUTS[to], to=to, **options)
        assert "PEFT" in message  # which has a place


MORE = {
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: whole modules"),
    "token rows": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: token rows"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "repeated layers": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    "kasa": ({"kasa_config": {}}, "kasa_config"),
}


@pytest.mark.parametrize("case", MORE)
def test_more_than_factors(tmp_path, case):
    fields, words = MORE[case]
    save_llama(tmp_path / "a", **fields)
    refused(UnsupportedError, words, tmp_path, tmp_path / "a", "o", to="mlx")


def test_an_adapter_of_a_changed_base(tmp_path):
    save_llama(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.warns(UserWarning, match="changed after"):
        refused(UnsupportedError, "pissa", tmp_path, tmp_path / "a", "o", to="mlx")


# ---- names --------------------------------------------------------------------------------------------


def write_peft(folder, paths, *, out=8, r=2, **config):
    tensors = {}
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(r, 4)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(out, r)
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": 1, "target_modules": sorted(paths), **config}
    write_adapter(folder, fields, tensors)
    return folder


@pytest.mark.parametrize("to", ["gguf", "mlx", "torchtune"])
def test_modules_without_a_name(tmp_path, to):
    paths = [
        "model.layers.3.self_attn.q_prj",
        "model.layers.3.block_sparse_moe.gate",
        "model.layers.3.mlp.up_proj",
    ]
    source = write_peft(tmp_path / "a", paths)
    base = GOLDEN / "llama"
    message = refused(AdapterFormatError, "q_prj", tmp_path, source, OUTPUTS[to], to=to, base=base)
    assert "did you mean 'model.layers.3.self_attn.q_proj'" in message
    assert "block_sparse_moe" in message
    assert "  - model.layers.3.mlp.up_proj" not in message


@pytest.mark.parametrize("to", ["gguf", "torchtune"])
def test_bases_that_do_not_fit(tmp_path, to):
    source = write_peft(tmp_path / "a", ["model.layers.0.self_attn.q_proj"], out=10)
    base = GOLDEN / "llama"
    refused(AdapterFormatError, "2 heads", tmp_path, source, OUTPUTS[to], to=to, base=base)
    mixtral = save_config(tmp_path / "mixtral", model_type="mixtral")
    refused(UnsupportedError, "'mixtral'", tmp_path, source, OUTPUTS[to], to=to, base=mixtral)
    silent = save_config(tmp_path / "silent", num_attention_heads=None)
    refused(ConfigError, "num_attention_heads", tmp_path, source, OUTPUTS[to], to=to, base=silent)


@pytest.mark.parametrize("to", ["gguf", "mlx", "torchtune"])
def test_tied_heads(tmp_path, to):
    tied = save_config(tmp_path / "tied", tie_word_embeddings=True)
    source = write_peft(tmp_path / "a", ["lm_head"])
    refused(UnsupportedError, "share a weight", tmp_path, source, OUTPUTS[to], to=to, base=tied)


def test_a_gguf_of_another_model(tmp_path):
    qwen = save_config(tmp_path / "qwen", **QWEN)
    refused(ConfigError, "'llama'", tmp_path, GOLDEN / "llama.gguf", "o", to="peft", base=qwen)


# ---- kohya --------------------------------------------------------------------------------------------

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{Q}.lora_down.weight": (2, 4), f"{Q}.lora_up.weight": (4, 2)}
NEAR = f"{Q[:-1]}x"
KOHYA = {
    "a name of no module": (
        {f"{NEAR}.lora_down.weight": (2, 4), f"{NEAR}.lora_up.weight": (4, 2)},
        AdapterFormatError,
        "did you mean",
    ),
    "a key of no kind": ({**GOOD, f"{Q}.extra": (1,)}, AdapterFormatError, f"{Q}.extra"),
    "another prefix": ({**GOOD, "lora_vae_x.lora_down.weight": (2, 4)}, AdapterFormatError, "lora_vae_x"),
    "dora": ({**GOOD, f"{Q}.dora_scale": (4, 1)}, UnsupportedError, "DoRA"),
    "locon": ({**GOOD, f"{Q}.lora_mid.weight": (2, 2, 3, 3)}, UnsupportedError, "CP decomposition"),
    "loha": ({f"{Q}.hada_w1_a": (4, 2)}, UnsupportedError, "LoHa"),
    "lokr": ({f"{Q}.lokr_w1": (4, 2)}, UnsupportedError, "LoKr"),
    "whole": ({f"{Q}.diff": (4, 4)}, UnsupportedError, "whole differences"),
    "one factor": ({f"{Q}.lora_up.weight": (4, 2)}, AdapterFormatError, "has only ['B']"),
    "ranks that differ": (
        {f"{Q}.lora_down.weight": (3, 4), f"{Q}.lora_up.weight": (4, 2)},
        AdapterFormatError,
        "do not go together",
    ),
    "no rank": (
        {f"{Q}.lora_down.weight": (0, 4), f"{Q}.lora_up.weight": (4, 0)},
        AdapterFormatError,
        "do not go together",
    ),
    "alpha of zero": ({**GOOD, f"{Q}.alpha": None}, AdapterFormatError, "alpha is 0.0"),
    "two names of a module": (
        {
            **GOOD,
            **{key.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): s for key, s in GOOD.items()},
        },
        AdapterFormatError,
        "under another name too",
    ),
    "two prefixes": (
        {
            f"{prefix}text_model_encoder_layers_0_mlp_fc1.lora_{which}.weight": shape
            for prefix in ("lora_te_", "lora_te1_")
            for which, shape in (("down", (2, 4)), ("up", (4, 2)))
        },
        AdapterFormatError,
        "under another prefix too",
    ),
}


@pytest.mark.parametrize("case", KOHYA)
def test_kohya(tmp_path, case):
    shapes, error, words = KOHYA[case]
    tensors = {
        name: torch.tensor(0.0) if shape is None else torch.ones(shape) for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    refused(error, words, tmp_path, tmp_path / "a.safetensors", "o", to="peft")


def test_kohya_for_models_that_it_names_otherwise(tmp_path):
    source = write_peft(tmp_path / "a", ["transformer_blocks.0.attn.to_q"])
    options = {"to": "kohya", "component": "transformer"}
    refused(UnsupportedError, "fused", tmp_path, source, "o.safetensors", **options)
    source = write_peft(tmp_path / "b", ["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qq"])
    message = refused(AdapterFormatError, "to_qq", tmp_path, source, "o.safetensors", to="kohya")
    assert "did you mean" in message


def test_flat_names_that_mean_two_modules(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"a.b_c.weight": torch.ones(1), "a_b.c.weight": torch.ones(1)}, base / "x.safetensors")
    save_file(
        {
            "lora_unet_a_b_c.lora_down.weight": torch.ones(1, 1),
            "lora_unet_a_b_c.lora_up.weight": torch.ones(1, 1),
        },
        tmp_path / "a.safetensors",
    )
    refused(AdapterFormatError, "a_b_c", tmp_path, tmp_path / "a.safetensors", "o", to="peft", base=base)


# ---- the others ---------------------------------------------------------------------------------------


def test_several_models_in_a_file_for_one(tmp_path):
    source = GOLDEN / "sdxl-kohya.safetensors"
    refused(ConfigError, "say which: component", tmp_path, source, "o", to="peft")
    refused(ConfigError, "none of transformer", tmp_path, source, "o", to="peft", component="transformer")


DIFFUSERS = {
    "a name of no factor": ({"unet.mid_block.x.lora_C.weight": (1, 1)}, {}, AdapterFormatError, "lora_C"),
    "a name of no model": (
        {"vae.x.lora_A.weight": (1, 1), "unet.y.lora_A.weight": (1, 1)},
        {},
        AdapterFormatError,
        "vae.x",
    ),
    "two names of a tensor": (
        {"unet.x.lora_A.weight": (1, 1), "unet.x.lora.down.weight": (1, 1)},
        {},
        AdapterFormatError,
        "under another name too",
    ),
    "metadata that are no object": (
        {"unet.x.lora_A.weight": (1, 1)},
        [],
        AdapterFormatError,
        "wanted an object",
    ),
    "a config of another rank": (
        {"unet.x.lora_A.weight": (1, 1), "unet.x.lora_B.weight": (1, 1)},
        {"unet.r": 2, "unet.lora_alpha": 2},
        AdapterFormatError,
        "the config says rank 2",
    ),
}


@pytest.mark.parametrize("case", DIFFUSERS)
def test_diffusers(tmp_path, case):
    shapes, told, error, words = DIFFUSERS[case]
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    metadata = {"lora_adapter_metadata": json.dumps(told)} if told != {} else None
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    refused(error, words, tmp_path, tmp_path / "a.safetensors", "o", to="peft")


MLX_GOOD = {
    "fine_tune_type": "lora",
    "num_layers": 4,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0},
}
V = "model.layers.0.self_attn.v_proj"
MLX = {
    "a whole model": ({"fine_tune_type": "full"}, {}, UnsupportedError, "fine_tune_type 'full'"),
    "no settings": ({"lora_parameters": None}, {}, AdapterFormatError, "wanted rank and scale"),
    "no scale": ({"lora_parameters": {"rank": 2}}, {}, AdapterFormatError, "scale: None"),
    "another rank": ({"lora_parameters": {"rank": 3, "scale": 1}}, {}, AdapterFormatError, "wanted (in, 3)"),
    "dora without m": ({"fine_tune_type": "dora"}, {}, AdapterFormatError, "magnitude"),
    "a module of no known name": ({}, {"model.layers.0.self_attn.v_prj.lora_a": (4, 2)}, AdapterFormatError, "did you mean"),
    "experts": ({}, {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": (2, 2, 2)}, AdapterFormatError, "switch_mlp"),
    "a head without its base": ({}, {"lm_head.lora_a": (4, 2), "lm_head.lora_b": (2, 4)}, ConfigError, "base's config"),
}  # fmt: skip


@pytest.mark.parametrize("case", MLX)
def test_mlx(tmp_path, case):
    fields, shapes, error, words = MLX[case]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**MLX_GOOD, **fields}))
    found = {f"{V}.lora_a": (4, 2), f"{V}.lora_b": (2, 4), **shapes}
    save_file({name: torch.ones(shape) for name, shape in found.items()}, folder / "adapters.safetensors")
    refused(error, words, tmp_path, folder, "o", to="peft")


TUNE = "layers.0.attn.v_proj"
TORCHTUNE = {
    "another rank": ({"r": 3}, {}, AdapterFormatError, "not with r=3"),
    "no alpha": ({"lora_alpha": None}, {}, AdapterFormatError, "lora_alpha: None"),
    "a module of no known name": ({}, {"layers.0.attn.vv_proj.lora_a.weight": torch.ones(2, 4)}, AdapterFormatError, "did you mean"),
    "something else": ({}, {"layers.0.attn.q_proj.weight": torch.ones(2, 4)}, AdapterFormatError, "q_proj.weight"),
    "half of the magnitudes": (
        {},
        {f"{TUNE}.magnitude": torch.ones(4), **{f"layers.1.attn.v_proj.lora_{x}.weight": torch.ones(s) for x, s in (("a", (2, 4)), ("b", (4, 2)))}},
        AdapterFormatError,
        "only some",
    ),
    "a magnitude of another size": ({}, {f"{TUNE}.magnitude": torch.ones(3)}, AdapterFormatError, "wanted (4,)"),
    "no tensor": ({}, {"x": 3}, AdapterFormatError, "int"),
    "not finite": ({}, {f"{TUNE}.magnitude": torch.full((4,), torch.nan)}, NonFiniteError, "4 NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORCHTUNE)
def test_torchtune(tmp_path, case):
    fields, tensors, error, words = TORCHTUNE[case]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **fields}))
    found = {f"{TUNE}.lora_a.weight": torch.ones(2, 4), f"{TUNE}.lora_b.weight": torch.ones(4, 2), **tensors}
    torch.save(found, folder / "adapter_model.pt")
    refused(error, words, tmp_path, folder, "o", to="peft", base=GOLDEN / "llama")
