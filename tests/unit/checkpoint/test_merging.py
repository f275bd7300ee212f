"""What a merge on disk writes is what a merge in memory gives, bit for bit, for every kind of weight and adapter."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import BdLoraConfig, KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig, merge_checkpoint
from lorakit.checkpoint import copying
from lorakit.ops import merge
from merging import (
    compare,
    config_of,
    differences,
    loaded,
    merged_in_memory,
    quiet,
    read_bytes,
    read_files,
    save_adapter,
    save_base,
)

ATTENTION = ["q_proj", "v_proj"]
SOME = [*ATTENTION, "down_proj"]


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def lora(targets=SOME, **changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **changes})


def llama(*, tie=False, dtype=torch.float32, layers=2, bias=False):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_bias=bias,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def mixtral(dtype=torch.float32):
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return transformers.MixtralForCausalLM(config).to(dtype).eval()


def gpt_oss():
    torch.manual_seed(1)
    config = transformers.GptOssConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,  # as in the real one: the down projections are square, and stored (in, out)
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return transformers.GptOssForCausalLM(config).eval()


def vit():
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


def dinov2():
    torch.manual_seed(1)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
        num_labels=3,
    )
    return transformers.Dinov2ForImageClassification(config).eval()


class Parts(nn.Module):
    """What transformers' models do not have."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.image = nn.Conv2d(4, 6, 3)
        self.wave = nn.Conv1d(4, 6, 3)
        self.volume = nn.Conv3d(2, 4, (1, 3, 3))
        self.turned = Conv1D(12, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.other = nn.MultiheadAttention(8, 2, kdim=12, vdim=20)
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.register_buffer("count", torch.arange(3))


def parts():
    torch.manual_seed(1)
    return Parts().eval()


VARIANTS = {
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": KasaConfig()},
    "bdlora": {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj", "down"], nblocks=2
        )
    },
    "qalora": {"use_qalora": True, "qalora_group_size": 8},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
}
CASES = {
    "all linear": (llama, lora("all-linear")),
    "rslora and patterns": (
        llama,
        lora(use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}),
    ),
    "some layers": (llama, lora(layers_to_transform=[1])),
    "lora_bias and trained biases": (
        lambda: llama(bias=True),
        lora(ATTENTION, lora_bias=True, bias="lora_only"),
    ),
    "a head that is saved whole": (llama, lora(modules_to_save=["lm_head"])),
    "norms that are saved whole": (
        llama,
        lora(modules_to_save=["layernorm"], trainable_token_indices=[3, 7]),
    ),
    "token rows under factors": (
        llama,
        lora([*SOME, "embed_tokens"], trainable_token_indices={"embed_tokens": [7, 3]}),
    ),
    "Conv1D, square and not": (gpt2, lora(["c_attn", "c_proj", "c_fc"])),
    "Conv1D with all biases": (gpt2, lora(["c_attn", "c_proj"], bias="all", lora_bias=True)),
    "Conv1D with DoRA": (gpt2, lora(["c_attn", "c_proj"], use_dora=True)),
    "a classifier": (bert, lora(["query", "dense"], task_type="SEQ_CLS")),
    "experts that a file holds apart": (
        mixtral,
        lora(["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "a router under another name": (mixtral, lora(["q_proj"], modules_to_save=["gate"])),
    "experts stored (in, out)": (
        gpt_oss,
        lora(["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "names that transformers changes": (
        vit,
        lora(["q_proj", "o_proj", "projection"], modules_to_save=["classifier"]),
    ),
    "tensors that transformers cuts": (dinov2, lora(["gate_proj", "up_proj"], bias="all")),
    "convolutions": (parts, lora(["image", "wave", "volume"], lora_bias=True)),
    "convolutions with DoRA": (parts, lora(["image", "wave", "volume", "turned", "embed"], use_dora=True)),
    "a Conv1D of no known model": (parts, lora(["turned", "embed"])),
    "attention in one piece": (parts, lora(["attention"], rank_pattern={"attention": 2})),
    "attention in four": (parts, lora(["other"])),
}


@pytest.mark.parametrize("name", CASES)
def test_bits_of_a_merge_in_memory(tmp_path, name):
    make, config = CASES[name]
    report = compare(tmp_path, make, [config], verify=True)
    assert report.merged
    assert report.error < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_variants(tmp_path, name, dtype):
    compare(tmp_path, lambda: llama(dtype=dtype), [lora(**VARIANTS[name])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [2**20, 100])
def test_bits_in_every_dtype_whatever_the_tiles(tmp_path, monkeypatch, dtype, elements):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", elements)
    config = lora([*SOME, "embed_tokens"], lora_bias=True, trainable_token_indices={"embed_tokens": [1, 39]})
    config.lora_bias = False
    compare(tmp_path, lambda: llama(dtype=dtype), [config])


@pytest.mark.parametrize("make", [mixtral, dinov2, gpt2])
def test_bits_where_tiles_and_tensors_of_the_file_end_apart(tmp_path, monkeypatch, make):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 160)  # five rows
    targets = {mixtral: ["q_proj"], dinov2: ["up_proj", "gate_proj"], gpt2: ["c_attn", "c_proj"]}[make]
    more = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if make is mixtral else {}
    compare(tmp_path, make, [lora(targets, **more)], verify=True)


# ---- several adapters ---------------------------------------------------------------------------------


def test_several_adapters_with_weights(tmp_path):
    configs = [lora(), lora(["q_proj", "k_proj"], r=2, use_rslora=True), lora(use_dora=True)]
    compare(tmp_path, lambda: llama(dtype=torch.bfloat16), configs, weights=[0.5, -2.0, 0.75])


def test_several_adapters_that_own_different_things(tmp_path):
    configs = [
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[2]),
        lora(trainable_token_indices=[5]),
    ]
    compare(tmp_path, llama, configs)


# ---- ties -----------------------------------------------------------------------------------------------

TIED = {
    "the head": (lora([*SOME, "lm_head"]), True),
    "the embedding": (lora([*SOME, "embed_tokens"]), True),
    "both apart": (lora([*SOME, "embed_tokens", "lm_head"]), True),
    "both together": (lora([*SOME, "embed_tokens"], ensure_weight_tying=True), False),
    "the embedding whole": (lora(modules_to_save=["embed_tokens"]), True),
    "the head whole": (lora(modules_to_save=["lm_head"]), True),
    "both whole and together": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
    "rows": (lora(trainable_token_indices=[3, 5]), False),
    "rows of the head": (lora(trainable_token_indices={"lm_head": [3, 5]}), True),
    "rows of both": (lora(trainable_token_indices={"lm_head": [3], "embed_tokens": [5]}), True),
    "neither": (lora(), False),
}


@pytest.mark.parametrize("name", TIED)
def test_ties_hold_or_are_written_down(tmp_path, name):
    config, parts_ = TIED[name]
    report = compare(tmp_path, lambda: llama(tie=True), [config], verify=True)
    assert report.untied == (("lm_head.weight",) if parts_ else ())
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is not parts_
    assert ("lm_head.weight" in read_files(tmp_path / "out")) is parts_


@pytest.mark.parametrize("name", ["both together", "both whole and together"])
def test_half_of_what_is_tied_need_not_be_in_an_adapter_s_file(tmp_path, name):
    def make():
        return llama(tie=True)

    save_base(make(), tmp_path / "base")
    save_adapter(make(), TIED[name][0], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    halved = {key: tensor for key, tensor in load_file(file).items() if "lm_head" not in key}
    assert len(halved) < len(load_file(file))
    save_file(halved, file)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.untied == ()
    assert not differences(loaded(make(), tmp_path / "out"), merged_in_memory(make, [tmp_path / "adapter"]))


def test_a_tie_of_which_the_file_has_both_tensors(tmp_path):
    def store_both(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    save_base(llama(tie=True), tmp_path / "base")
    store_both(tmp_path / "base")
    for name, config in {"rows": lora(trainable_token_indices=[3]), "head": lora([*SOME, "lm_head"])}.items():
        save_adapter(llama(tie=True), config, tmp_path / name)
        report = merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out")
        wanted = merged_in_memory(lambda: llama(tie=True), [tmp_path / name])
        assert not differences(loaded(llama(), tmp_path / f"{name}-out"), wanted)
        assert report.untied == ()


def test_ties_of_a_model_without_the_prefix_in_its_file(tmp_path):
    save_base(gpt2(), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})  # as it is on the hub
    save_adapter(gpt2(), lora(["c_attn", "wte"]), tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.untied == ("lm_head.weight",)
    assert not differences(loaded(gpt2(), tmp_path / "out"), merged_in_memory(gpt2, [tmp_path / "adapter"]))


# ---- the base's file ------------------------------------------------------------------------------------


def test_a_head_that_the_base_does_not_have(tmp_path):
    report = compare(tmp_path, bert, [lora(["query"], task_type="SEQ_CLS")], base=lambda model: model.bert)
    assert report.added == ("classifier.bias", "classifier.weight")
    assert all("the adapter's own is added" in note for note in report.notes)


def test_a_head_that_the_adapter_was_made_without(tmp_path):
    save_base(llama(), tmp_path / "base")
    save_adapter(llama().model, lora(), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    wanted = merged_in_memory(lambda: llama().model, [tmp_path / "adapter"])
    mine = loaded(llama(), tmp_path / "out")
    assert not differences({name: mine[f"model.{name}"] for name in wanted}, wanted)


def test_shards_stay_what_they_are(tmp_path):
    report = compare(tmp_path, lambda: llama(layers=3), [lora()], save={"max_shard_size": "20KB"})
    base, out = read_bytes(tmp_path / "base"), read_bytes(tmp_path / "out")
    assert report.files > 3
    assert base.keys() == out.keys()
    assert base["model.safetensors.index.json"] == out["model.safetensors.index.json"]
    assert all(base[name] == out[name] for name in base if not name.endswith(".safetensors"))
    assert all(len(base[name]) == len(out[name]) for name in base)


@pytest.mark.parametrize(("size", "files"), [("20KB", 8), (10**9, 1)])
def test_shards_of_another_size(tmp_path, size, files):
    report = compare(tmp_path, lambda: llama(layers=3), [lora()], max_shard_size=size, verify=True)
    assert abs(report.files - files) < 3
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() is (report.files > 1)
    names = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(names) == report.files


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["float32", "bfloat16", torch.float16])
def test_another_dtype_is_one_rounding(tmp_path, source, target):
    save_base(llama(dtype=source), tmp_path / "base")
    save_adapter(llama(), lora(modules_to_save=["lm_head"]), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=target, verify=True)
    dtype = getattr(torch, target) if isinstance(target, str) else target
    # in fp32, a base that was rounded before
    wide = merged_in_memory(lambda: llama(dtype=source).float(), [tmp_path / "adapter"])
    wide["lm_head.weight"] = wide["lm_head.weight"].to(source)
    mine = loaded(llama(), tmp_path / "out")
    assert not differences(mine, {name: tensor.to(dtype) for name, tensor in wide.items()})
    assert config_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")


def test_what_is_no_float_is_copied_in_another_dtype_too(tmp_path):
    save_base(parts(), tmp_path / "base")
    save_adapter(parts(), lora(["image"]), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", verify=True)
    found = read_files(tmp_path / "out")
    assert found["count"].equal(torch.arange(3))
    assert {tensor.dtype for name, tensor in found.items() if name != "count"} == {torch.bfloat16}


def test_small_files_go_along_and_other_weights_do_not(tmp_path):
    save_base(llama(), tmp_path / "base")
    for name in ("tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "onnx/model.onnx", ".git/x"):
        path = tmp_path / "base" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    save_adapter(llama(), lora(), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = read_bytes(tmp_path / "out")
    assert found["tokenizer.json"] == b"tokenizer.json"
    assert found["config.json"] == (tmp_path / "base" / "config.json").read_bytes()
    assert found.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "1_Pooling/config.json",
    }


def test_a_snapshot_in_the_cache_of_the_hub(tmp_path):
    save_base(llama(), tmp_path / "plain")
    save_adapter(llama(), lora(), tmp_path / "adapter")
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate((tmp_path / "plain").iterdir()):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    merge_checkpoint(snapshot, tmp_path / "adapter", tmp_path / "out")
    wanted = merged_in_memory(llama, [tmp_path / "adapter"])
    assert not differences(loaded(llama(), tmp_path / "out"), wanted)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_keys_without_their_prefix(tmp_path):
    save_base(llama(), tmp_path / "base")
    save_adapter(llama(), lora(), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "wanted")


def test_copies_of_the_base_in_an_adapter_are_passed_over(tmp_path):
    save_base(llama(), tmp_path / "base")
    save_adapter(llama(), lora([*SOME, "embed_tokens"]), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.base_layer.weight"  # as PEFT's save_embedding_layers writes it
    save_file({**load_file(file), key: llama().model.embed_tokens.weight.detach()}, file)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.notes == (f"{key}: the base's own embedding, passed over",)
    assert read_files(tmp_path / "out").keys() == read_files(tmp_path / "wanted").keys()
    assert (
        read_bytes(tmp_path / "out")["model.safetensors"]
        == read_bytes(tmp_path / "wanted")["model.safetensors"]
    )


def test_the_same_bytes_without_the_kernel_s_copying(tmp_path, monkeypatch):
    save_base(llama(), tmp_path / "base")
    save_adapter(llama(), lora(), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")

    def cannot(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(copying.os, "sendfile", cannot)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "wanted")


def test_progress_is_told_to_its_end(tmp_path):
    save_base(llama(), tmp_path / "base")
    save_adapter(llama(), lora(), tmp_path / "adapter")
    told = []
    merge_checkpoint(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        verify=True,
        progress=lambda *row: told.append(row),
    )
    last = {what: (done, total) for what, done, total in told}
    assert last.keys() == {"merging (MB)", "verifying"}
    assert all(done == total for done, total in last.values())
