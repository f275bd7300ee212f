"""`lorakit merge` from end to end, on MiniLM and on tiny models of transformers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import write_adapter
from lorakit.cli.app import app
from lorakit.demo.model import model_folder
from merging import differences, read_bytes, read_files, save_adapter, save_base
from models import randomise, tiny_llama
from rss import megabytes_of

CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def root(tmp_path):
    transformers.utils.logging.disable_progress_bar()
    save_base(tiny_llama(), tmp_path / "base", max_shard_size="8KB")
    save_adapter(tiny_llama(), CONFIG, tmp_path / "adapter")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": "200"})


def test_minilm_with_a_trained_looking_adapter(tmp_path):
    encoder = transformers.AutoModel.from_pretrained(model_folder())
    peft = get_peft_model(
        encoder, LoraConfig(r=8, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    )
    randomise(peft, scale=0.02)
    peft.save_pretrained(tmp_path / "adapter")
    result = run(model_folder(), tmp_path / "adapter", "-o", tmp_path / "out", "--verify", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["files"], report["merged"]) == (1, 37)
    assert report["relative_error"] < 1e-6
    fresh = transformers.AutoModel.from_pretrained(model_folder())
    wanted = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    mine, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not differences(mine.state_dict(), wanted.state_dict())
    ids = torch.tensor([[101, 2023, 2003, 102]])
    with torch.no_grad():
        assert mine.eval()(ids).last_hidden_state.equal(wanted.eval()(ids).last_hidden_state)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("this is")["input_ids"] == ids[0].tolist()


def test_what_a_person_sees(root):
    result = run(root / "base", root / "adapter", "-o", root / "out", "--verify")
    assert result.exit_code == 0, result.output
    for text in (
        "files of weights",
        "tensors merged",
        "4",
        "tensors copied",
        "17",
        "largest error",
    ):
        assert text in result.stdout
    assert read_files(root / "out").keys() == read_files(root / "base").keys()


def test_what_a_program_sees(root):
    result = run(root / "base", root / "adapter", "-o", root / "out", "--json")
    report = json.loads(result.stdout)
    assert {
        name: report[name] for name in ("files", "merged", "copied", "resumed", "error", "untied", "notes")
    } == {
        "files": 3,
        "merged": 4,
        "copied": 17,
        "resumed": 0,
        "error": None,
        "untied": [],
        "notes": [],
    }
    assert report["bytes"] == sum(path.stat().st_size for path in (root / "out").glob("*.safetensors"))


def test_several_adapters_and_every_option(root):
    save_adapter(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"]), root / "second")
    arguments = [
        root / "base",
        root / "adapter",
        root / "second",
        "-o",
        root / "out",
        "-w",
        "1",
        "-w",
        "-0.5",
    ]
    options = ["--dtype", "bfloat16", "--max-shard-size", "6KB", "--no-strict", "--overwrite", "--json"]
    report = json.loads(run(*arguments, *options).stdout)
    assert report["merged"] == 6
    assert report["files"] > 1
    assert {tensor.dtype for tensor in read_files(root / "out").values()} == {torch.bfloat16}
    assert json.loads(run(*arguments, *options).stdout)["output"] == report["output"]


def test_notes_are_told(root):
    save_adapter(tiny_llama(tie=True), LoraConfig(r=4, target_modules=["lm_head"]), root / "adapter")
    save_base(tiny_llama(tie=True), root / "tied")
    result = run(root / "tied", root / "adapter", "-o", root / "out")
    assert "note: lm_head.weight: tied no more" in result.stdout


def test_a_head_that_the_base_lacks_says_how_many_labels_it_has(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(intermediate_size=24, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.bert.config.num_labels = 2  # what the config of an encoder alone says
    save_base(model.bert, tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    save_adapter(model, lora, tmp_path / "adapter")
    told = run(tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert (
        "classifier.weight: the base has none; the adapter's own is added; load the model with num_labels=3"
        in (" ".join(told.stdout.split()))
    )
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    own = open_adapter(tmp_path / "adapter").load()
    assert loaded.classifier.weight.equal(own["base_model.model.classifier.weight"])


def _cut(root):
    path = min((root / "base").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:3000])


ERRORS = {
    "a base that is not there": (
        lambda root: (root / "base").rename(root / "b"),
        "no such folder; wanted one",
    ),
    "an adapter that is not there": (lambda root: (root / "adapter").rename(root / "a"), "no such folder"),
    "another base": (
        lambda root: (
            save_base(
                transformers.LlamaForCausalLM(
                    tiny_llama().config.__class__(
                        vocab_size=11,
                        hidden_size=32,
                        intermediate_size=24,
                        num_hidden_layers=2,
                        num_attention_heads=2,
                    )
                ),
                root / "base2",
            )
            and [path.unlink() for path in (root / "base").iterdir()]
            and [path.rename(root / "base" / path.name) for path in (root / "base2").iterdir()]
        ),
        "needs",
    ),
    "a shard that is cut": (_cut, "cut off"),
    "an output that is there": (
        lambda root: (root / "out").mkdir() or (root / "out" / "x").write_text(""),
        "is not empty",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_inputs_are_one_message_and_nothing_is_lost(root, name):
    damage, text = ERRORS[name]
    damage(root)
    before = read_bytes(root)
    result = run(root / "base", root / "adapter", "-o", root / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("lorakit: ")
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert read_bytes(root) == before


def test_a_full_disk_is_one_message_and_the_run_is_gone_on_with(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
    try:
        result = run(root / "base", root / "adapter", "-o", root / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1
    assert "File too large" in result.stderr
    assert not (root / "out").exists()
    again = run(root / "base", root / "adapter", "-o", root / "out", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["files"] == 3


def test_wrong_usage_and_help():
    assert run().exit_code == 2
    assert run("base", "adapter").exit_code == 2
    shown = run("--help").stdout
    assert "lorakit merge Llama-3.2-1B my-adapter -o merged" in shown


def test_neither_transformers_nor_a_model_is_loaded(root):
    program = (
        "import sys; from lorakit import merge_checkpoint; "
        f"merge_checkpoint({str(root / 'base')!r}, {str(root / 'adapter')!r}, {str(root / 'out')!r}, verify=True); "
        "print([name for name in ('transformers', 'lorakit.layers', 'lorakit.surgery') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_tile_and_not_the_model(tmp_path):
    shape, names = (2048, 2048), [f"layers.{number}.q_proj" for number in range(14)]
    base = {f"{name}.weight": torch.randn(shape).bfloat16() for name in names}  # 117 MB
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, shape[1])
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape[0], 8)
    write_adapter(
        tmp_path / "adapter",
        {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]},
        factors,
    )
    call = f"merge_checkpoint({str(tmp_path / 'base')!r}, {str(tmp_path / 'adapter')!r}, {str(tmp_path / 'out')!r})"
    assert 8 < megabytes_of("from lorakit import merge_checkpoint", call) < 80  # 45 were seen
