"""Adapters of Stable Diffusion's models: names, convolutions, alphas, and what older files call their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit import LoraConfig, convert
from lorakit.checkpoint.converting.unet_names import original_upsamplers, text_modules, unet_modules
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import write_adapter
from lorakit.config import Matcher

GOLDEN = Path(__file__).parents[3] / "golden" / "convert"
BLOCK = "down_blocks.0.attentions.0"
SD15 = {
    f"{BLOCK}.proj_in": ((3, 4, 1, 1), (8, 3, 1, 1)),
    f"{BLOCK}.transformer_blocks.0.attn1.to_q": ((2, 4), (8, 2)),
    "up_blocks.0.upsamplers.0.conv": ((2, 4, 3, 3), (8, 2, 1, 1)),
    "mid_block.resnets.1.conv_shortcut": ((2, 4, 1, 1), (8, 2, 1, 1)),
}


def write_unet(folder, shapes, **config):
    torch.manual_seed(0)
    tensors = {}
    for path, (a, b) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(a)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(b)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": sorted(shapes), **config}
    write_adapter(folder, fields, tensors)
    return folder


def same(folder, other):
    before, after = open_adapter(folder).load(), open_adapter(other).load()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    first, second = (Matcher(LoraConfig.from_pretrained(each)) for each in (folder, other))
    for name in before:
        path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        assert second.alpha(path) / second.rank(path) == first.alpha(path) / first.rank(path)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_round_trips_of_a_unet(tmp_path, to):
    patterns = {"rank_pattern": {"proj_in": 3}, "alpha_pattern": {"to_q": 0.7}}
    write_unet(tmp_path / "a", SD15, **patterns)
    told = convert(tmp_path / "a", tmp_path / "b.safetensors", to=to)
    assert (told.components, told.notes) == (("unet",), ())
    convert(tmp_path / "b.safetensors", tmp_path / "c", to="peft")
    same(tmp_path / "a", tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "d.safetensors", to=to)
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "d.safetensors").keys()


def test_rslora_in_kohyas_alpha(tmp_path):
    shapes = {f"{BLOCK}.proj_in": ((3, 4), (8, 3))}
    write_unet(tmp_path / "a", shapes, r=3, use_rslora=True)
    convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya")
    flat = f"lora_unet_{BLOCK}.proj_in".replace(".", "_")
    alpha = load_file(tmp_path / "b.safetensors")[f"{flat}.alpha"]
    assert float(alpha) / 3 == 3 / 3**0.5


def test_the_names_of_sd15_and_of_sdxl(tmp_path):
    """SD 1.5 goes by diffusers' names, SDXL by those of the original code."""
    write_unet(tmp_path / "a", SD15, rank_pattern={"proj_in": 3})
    convert(tmp_path / "a", tmp_path / "a.safetensors", to="kohya")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "a.safetensors")}
    assert names == {"lora_unet_" + path.replace(".", "_") for path in SD15}
    deep = "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj"
    write_unet(tmp_path / "b", {deep: ((2, 4), (8, 2)), "time_embedding.linear_2": ((2, 4), (8, 2))})
    convert(tmp_path / "b", tmp_path / "b.safetensors", to="kohya")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "b.safetensors")}
    assert names == {
        "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
        "lora_unet_time_embed_2",
    }


def test_no_flat_name_means_two_modules():
    rows = [*unet_modules().items(), *original_upsamplers().items()]
    meanings = {}
    for path, name in rows:
        for flat in (path.replace(".", "_"), name.replace(".", "_")):
            meanings.setdefault(flat, set()).add(path)
    assert all(len(paths) == 1 for paths in meanings.values())
    assert len({path.replace(".", "_") for path in text_modules()}) == len(text_modules()) == 32 * 6 + 1


ORIGINAL = {
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block.1.proj_out": "mid_block.attentions.0.proj_out",
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",  # of SD 1.5
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


def test_names_of_the_original_code(tmp_path):
    tensors = {}
    for name in ORIGINAL:
        flat = "lora_unet_" + name.replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = torch.ones(2, 4)
        tensors[f"{flat}.lora_up.weight"] = torch.ones(4, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    config = LoraConfig.from_pretrained(tmp_path / "b")
    assert config.target_modules == set(ORIGINAL.values())
    assert (config.r, config.lora_alpha) == (2, 2)  # without alpha the scaling is 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_alphas_of_any_dtype(tmp_path, dtype):
    flat = "lora_te_text_model_encoder_layers_0_mlp_fc2"
    tensors = {
        f"{flat}.lora_down.weight": torch.ones(2, 4),
        f"{flat}.lora_up.weight": torch.ones(4, 2),
        f"{flat}.alpha": torch.tensor(5, dtype=dtype),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    assert LoraConfig.from_pretrained(tmp_path / "b").lora_alpha == 5


def test_names_from_a_base(tmp_path):
    """Of a pipeline, of one of its models, and of a model that no table has."""
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file(
        {"odd.name_x.weight": torch.ones(1), "odd.bias": torch.ones(1)}, pipeline / "unet" / "m.safetensors"
    )
    write_unet(tmp_path / "a", {"odd.name_x": ((2, 4), (8, 2))})
    for base in (pipeline, pipeline / "unet"):
        out = tmp_path / f"{base.name}.safetensors"
        convert(tmp_path / "a", out, to="kohya", component="unet", base=base)
        assert "lora_unet_odd_name_x.alpha" in load_file(out)
        convert(out, tmp_path / f"back-{base.name}", to="peft", base=base)
        same(tmp_path / "a", tmp_path / f"back-{base.name}")


def test_text_encoders_of_transformers_5_have_other_paths(tmp_path):
    """Their paths begin with `encoder.`; kohya's names keep `text_model`."""
    write_unet(tmp_path / "a", {"encoder.layers.3.self_attn.q_proj": ((2, 4), (8, 2))})
    convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya", component="text_encoder")
    assert "lora_te_text_model_encoder_layers_3_self_attn_q_proj.alpha" in load_file(
        tmp_path / "b.safetensors"
    )


OLD = {
    "unet": {
        f"{BLOCK}.transformer_blocks.0.attn1.processor.to_q_lora": f"{BLOCK}.transformer_blocks.0.attn1.to_q",
        f"{BLOCK}.transformer_blocks.0.attn1.processor.to_out_lora": f"{BLOCK}.transformer_blocks.0.attn1.to_out.0",
        f"{BLOCK}.proj_in.lora": f"{BLOCK}.proj_in",
    },
    "text_encoder": {
        "text_model.encoder.layers.0.self_attn.to_out_lora": "text_model.encoder.layers.0.self_attn.out_proj",
        "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer": "text_model.encoder.layers.0.mlp.fc1",
    },
}


@pytest.mark.parametrize("component", OLD)
def test_older_names_of_diffusers(tmp_path, component):
    tensors = {}
    for name in OLD[component]:
        tensors[f"{component}.{name}.down.weight"] = torch.ones(2, 4)
        tensors[f"{component}.{name}.up.weight"] = torch.ones(4, 2)
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    convert(tmp_path / "folder", tmp_path / "b", to="peft")
    config = LoraConfig.from_pretrained(tmp_path / "b")
    assert config.target_modules == set(OLD[component].values())
    assert config.lora_alpha == config.r == 2


@pytest.mark.parametrize(
    ("field", "name"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")]
)
def test_dora_and_biases_in_diffusers(tmp_path, field, name):
    write_unet(tmp_path / "plain", {f"{BLOCK}.proj_in": ((2, 4), (8, 2))})
    tensors = open_adapter(tmp_path / "plain").load()
    tensors[f"base_model.model.{BLOCK}.proj_in.{name}"] = torch.rand(8)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["proj_in"]}
    write_adapter(tmp_path / "a", {**fields, field: True}, tensors)
    convert(tmp_path / "a", tmp_path / "folder", to="diffusers")
    file = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert told[f"unet.{field}"] is True
    convert(tmp_path / "folder", tmp_path / "b", to="peft")
    same(tmp_path / "a", tmp_path / "b")


def test_what_a_format_does_not_say_is_noted(tmp_path):
    write_unet(
        tmp_path / "a", {f"{BLOCK}.proj_in": ((2, 4), (8, 2))}, lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    told = convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya")
    assert told.notes == ("not in the file: task_type='CAUSAL_LM', lora_dropout=0.1",)
