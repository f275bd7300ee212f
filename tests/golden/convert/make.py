"""The golden files, made once with the libraries of the formats and names written out by hand: nothing of lorakit's.

`python tests/golden/convert/make.py` writes them anew; say so in the changelog if one of them changes.

A llama of hidden size 4 with two heads of size 4, one of them for keys and values, and a UNet with a text encoder. All numbers
are small whole numbers, so that every dtype holds them.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def numbers(*shape, start=0, dtype=torch.float32):
    count = torch.Size(shape).numel()
    return (torch.arange(start, start + count) - count // 2).to(dtype).reshape(shape)


# path, rows of A, rows of B; the q and k of layer 0, a down projection in bf16, and an embedding
Q_A, Q_B = numbers(2, 4), numbers(8, 2, start=1)
K_A, K_B = numbers(2, 4, start=2), numbers(4, 2, start=3)
DOWN_A, DOWN_B = numbers(2, 6, dtype=torch.bfloat16), numbers(4, 2, start=5, dtype=torch.bfloat16)
EMBED_A, EMBED_B = numbers(2, 5, start=6), numbers(4, 2, start=7)
# rows of halves (0 1 | 2 3) of a head of size 4 as rows of neighbours (0 2, 1 3), head by head
Q_NEIGHBOURS, K_NEIGHBOURS = [0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 1, 3]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path, tensors, metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def peft(name, tensors, **config):
    write_json(HERE / name / "adapter_config.json", {"peft_type": "LORA", **config})
    keyed = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
    write_tensors(HERE / name / "adapter_model.safetensors", keyed, {"format": "pt"})


def llama():
    layers = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": Q_A,
        "model.layers.0.self_attn.q_proj.lora_B.weight": Q_B,
        "model.layers.0.self_attn.k_proj.lora_A.weight": K_A,
        "model.layers.0.self_attn.k_proj.lora_B.weight": K_B,
        "model.layers.11.mlp.down_proj.lora_A.weight": DOWN_A,
        "model.layers.11.mlp.down_proj.lora_B.weight": DOWN_B,
    }
    embedding = {
        "model.embed_tokens.lora_embedding_A": EMBED_A,
        "model.embed_tokens.lora_embedding_B": EMBED_B,
    }
    settings = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"}
    targets = ["q_proj", "k_proj", "down_proj"]
    peft("llama-peft", layers, target_modules=targets, **settings)
    peft("llama-peft-embedding", layers | embedding, target_modules=[*targets, "embed_tokens"], **settings)
    write_json(HERE / "llama" / "config.json", LLAMA)


def llama_gguf():
    writer = gguf.GGUFWriter(HERE / "llama.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 3.0)
    tensors = {
        "token_embd.weight.lora_a": EMBED_A.t(),
        "token_embd.weight.lora_b": EMBED_B,
        "blk.0.attn_k.weight.lora_a": K_A,
        "blk.0.attn_k.weight.lora_b": K_B[K_NEIGHBOURS],
        "blk.0.attn_q.weight.lora_a": Q_A,
        "blk.0.attn_q.weight.lora_b": Q_B[Q_NEIGHBOURS],
        "blk.11.ffn_down.weight.lora_a": DOWN_A,
        "blk.11.ffn_down.weight.lora_b": DOWN_B,
    }
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_mlx():
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": Q_A.t(),
        "model.layers.0.self_attn.q_proj.lora_b": Q_B.t(),
        "model.layers.0.self_attn.k_proj.lora_a": K_A.t(),
        "model.layers.0.self_attn.k_proj.lora_b": K_B.t(),
        "model.layers.11.mlp.down_proj.lora_a": DOWN_A.t(),
        "model.layers.11.mlp.down_proj.lora_b": DOWN_B.t(),
        "model.embed_tokens.lora_a": EMBED_A.t(),
        "model.embed_tokens.lora_b": EMBED_B.t(),
    }
    write_tensors(HERE / "llama-mlx" / "adapters.safetensors", tensors, {"format": "mlx"})
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": 2, "scale": 1.5},
        "model": None,
        "num_layers": -1,
    }
    write_json(HERE / "llama-mlx" / "adapter_config.json", config)


def llama_torchtune():
    tensors = {
        "layers.0.attn.q_proj.lora_a.weight": Q_A,
        "layers.0.attn.q_proj.lora_b.weight": Q_B[Q_NEIGHBOURS],
        "layers.0.attn.k_proj.lora_a.weight": K_A,
        "layers.0.attn.k_proj.lora_b.weight": K_B[K_NEIGHBOURS],
        "layers.11.mlp.w2.lora_a.weight": DOWN_A,
        "layers.11.mlp.w2.lora_b.weight": DOWN_B,
    }
    folder = HERE / "llama-torchtune"
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_model.pt")
    config = {
        "base_model_name_or_path": None,
        "lora_alpha": 3,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["down_proj", "k_proj", "q_proj"],
    }
    write_json(folder / "adapter_config.json", config)


# of SDXL: a linear layer in a deep attention, a 3x3 convolution, and one layer of each text encoder
TO_OUT_A, TO_OUT_B = numbers(2, 4), numbers(4, 2, start=1)
CONV_A, CONV_B = numbers(3, 2, 3, 3, dtype=torch.float16), numbers(4, 3, 1, 1, start=2, dtype=torch.float16)
FC1_A, FC1_B = numbers(2, 4, start=3), numbers(6, 2, start=4)
V_A, V_B = numbers(2, 4, start=5), numbers(4, 2, start=6)


def sdxl():
    unet = {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0.lora_A.weight": TO_OUT_A,
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0.lora_B.weight": TO_OUT_B,
        "up_blocks.0.resnets.2.conv1.lora_A.weight": CONV_A,
        "up_blocks.0.resnets.2.conv1.lora_B.weight": CONV_B,
    }
    text = {
        "text_model.encoder.layers.3.mlp.fc1.lora_A.weight": FC1_A,
        "text_model.encoder.layers.3.mlp.fc1.lora_B.weight": FC1_B,
    }
    text_2 = {
        "text_model.encoder.layers.31.self_attn.v_proj.lora_A.weight": V_A,
        "text_model.encoder.layers.31.self_attn.v_proj.lora_B.weight": V_B,
    }
    conv = r"^up_blocks\.0\.resnets\.2\.conv1"
    targets = sorted({name.rpartition(".lora_")[0] for name in unet})
    peft(
        "sdxl-peft-unet",
        unet,
        target_modules=targets,
        r=2,
        lora_alpha=1,
        rank_pattern={conv: 3},
        alpha_pattern={conv: 4.5},
    )
    sides = {"unet": unet, "text_encoder": text, "text_encoder_2": text_2}
    keyed = {f"{side}.{name}": tensor for side, own in sides.items() for name, tensor in own.items()}
    told = {
        f"{side}.{name}": value
        for side, own in sides.items()
        for name, value in {
            "r": 2,
            "lora_alpha": {"unet": 1, "text_encoder": 2, "text_encoder_2": 0.3}[side],
            "rank_pattern": {conv: 3} if side == "unet" else {},
            "alpha_pattern": {conv: 4.5} if side == "unet" else {},
            "target_modules": sorted({name.rpartition(".lora_")[0] for name in own}),
            "use_dora": False,
            "lora_bias": False,
        }.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told, indent=2, sort_keys=True)}
    write_tensors(HERE / "sdxl-diffusers.safetensors", keyed, metadata)


def sdxl_kohya():
    modules = {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0": (TO_OUT_A, TO_OUT_B, 1.0),
        "lora_unet_output_blocks_2_0_in_layers_2": (CONV_A, CONV_B, 4.5),
        "lora_te1_text_model_encoder_layers_3_mlp_fc1": (FC1_A, FC1_B, 2.0),
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj": (V_A, V_B, 0.3),
    }
    tensors = {}
    for name, (down, up, alpha) in modules.items():
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        # 0.3 is no float32
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64 if alpha == 0.3 else torch.float32)
    write_tensors(HERE / "sdxl-kohya.safetensors", tensors, {"format": "pt"})


if __name__ == "__main__":
    for make in (llama, llama_gguf, llama_mlx, llama_torchtune, sdxl, sdxl_kohya):
        make()
