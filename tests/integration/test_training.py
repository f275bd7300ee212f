"""`lorakit.train` on models and tokenizers that transformers wrote: what it learns, what it saves, how it resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.checkpoint.reading import open_adapter
from lorakit.errors import AdapterNotFoundError, ConfigError, PlanError
from lorakit.training import checkpoints
from words import WORDS, save_bert, save_llama

torch.set_num_threads(1)
PAIRS = [{"prompt": f"a {word}", "completion": f"{word} yes"} for word in "bcdef"] * 4
CLASSES = [
    {"text": f"{word} {word} {word}", "label": "yes" if word in "abc" else "no"} for word in "abcdef"
] * 4
pytestmark = pytest.mark.filterwarnings("ignore:.*enable_input_require_grads.*")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    save_llama(folder / "llama", width=64)
    save_llama(folder / "tied", tie=True)
    save_bert(folder / "bert")
    return folder


def settings(base, output, **changes):
    fields = {"batch": 4, "learning_rate": 1e-2, "epochs": 4, "log_steps": 5, "r": 4}
    return lorakit.TrainConfig(model=str(base), output=str(output), **fields | changes)


def logits(model, *words):
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_it_learns_completions_and_saves_what_loads(bases, tmp_path):
    reports = []
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", epochs=12, eval_share=0.2),
        rows=PAIRS,
        progress=lambda *report: reports.append(report),
    )
    assert (found.rows, found.eval_rows, found.steps) == (16, 4, 48)
    assert found.losses[-1][1] < 0.5 * found.losses[0][1]
    assert len(found.evaluations) == 12
    assert reports[-1] == ("train", 48, 48)
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    model = lorakit.PeftModel.from_pretrained(base, tmp_path / "out")
    answer = logits(model, "<s>", "a", "e")[0, -1].argmax()
    assert WORDS[answer] == "e"
    assert model.get_nb_trainable_parameters()[1] - found.base_parameters == found.trainable_parameters
    told = json.loads((tmp_path / "out" / "training.json").read_text())
    assert told["settings"]["r"] == 4
    assert told["result"]["steps"] == 48
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns_classes_and_tells_the_accuracy(bases, tmp_path):
    found = lorakit.train(
        settings(bases / "bert", tmp_path / "out", epochs=15, learning_rate=3e-2),
        rows=CLASSES,
        eval_rows=CLASSES[:6],
    )
    assert found.task == "SEQ_CLS"
    assert found.labels == ("no", "yes")
    assert found.accuracies[-1][1] == 1.0
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def test_a_decoder_classifies_too(bases, tmp_path):
    """Its loss is a mean over a batch, and looks for the last token before the padding."""
    rows = [row | {"text": "a " * (place % 3) + row["text"]} for place, row in enumerate(CLASSES)]
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", epochs=10), rows=rows, eval_rows=CLASSES[:6]
    )
    assert found.accuracies[-1][1] == 1.0


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_accumulated_batches_are_one_large_one(bases, tmp_path, kind):
    """SGD at a constant rate shows a wrong scale of the gradient, which Adam hides."""
    rows = CLASSES[:8] if kind == "bert" else PAIRS[:8]
    fields = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "max_steps": 3, "max_grad_norm": 1e9}
    for name, batch, accumulation in (("one", 8, 1), ("two", 4, 2)):
        lorakit.train(
            settings(bases / kind, tmp_path / name, batch=batch, accumulation=accumulation, **fields),
            rows=rows,
        )
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    moved = max((one[key] - two[key]).abs().max().item() for key in one)
    assert moved < 1e-5
    assert any(one[key].abs().max() > 1e-4 for key in one if "lora_B" in key)


def test_checkpoints_hold_the_adapter_alone(bases, tmp_path):
    lorakit.train(settings(bases / "tied", tmp_path / "out", save_steps=5, keep=3), rows=PAIRS)
    halfway = tmp_path / "out" / "checkpoint-10"
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {
        f"checkpoint-{n}" for n in (10, 15, 20)
    }
    names = {path.name for path in halfway.iterdir()}
    assert "model.safetensors" not in names
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth"} <= names
    assert all(".lora_" in key for key in open_adapter(halfway).tensors)


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2}, {"init": "pissa"}, {"init": "olora", "dropout": 0.1}, {"dora": True}, {"init": "mica"},
     {"gradient_checkpointing": True, "dropout": 0.1}],
    ids=str,
)  # fmt: skip
def test_a_run_that_was_cut_goes_on_bit_for_bit(bases, tmp_path, changes):
    chosen = {"save_steps": 5, "keep": 10, "dropout": 0.0} | changes
    lorakit.train(settings(bases / "llama", tmp_path / "whole", **chosen), rows=PAIRS)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", cut / "checkpoint-10")
    (cut / "checkpoint-15").mkdir()  # one that a kill left unfinished
    found = lorakit.train(settings(bases / "llama", cut, **chosen), rows=PAIRS, resume=True)
    assert found.resumed_from == 10
    assert found.steps == 20
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", cut))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_same_seed_gives_the_same_bits_and_another_one_others(bases, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        lorakit.train(
            settings(bases / "llama", tmp_path / name, dropout=0.1, max_steps=4, seed=seed), rows=PAIRS
        )
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not all(torch.equal(found[0][key], found[2][key]) for key in found[0])


def test_a_base_in_four_bits_learns(bases, tmp_path):
    found = lorakit.train(
        settings(
            bases / "llama", tmp_path / "out", load_in_4bit=True, epochs=12, gradient_checkpointing=True
        ),
        rows=PAIRS,
    )
    assert found.losses[-1][1] < 0.6 * found.losses[0][1]
    checkpoint = tmp_path / "out" / "checkpoint-60"
    assert all(".lora_" in key for key in open_adapter(checkpoint).tensors)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adafactor"])
def test_other_optimizers_take_steps(bases, tmp_path, optimizer):
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", optimizer=optimizer, max_steps=5), rows=PAIRS
    )
    assert found.steps == 5


def test_settings_become_the_adapter(bases, tmp_path):
    chosen = {
        "targets": ["q_proj", "v_proj"], "alpha": 3.0, "rslora": True, "modules_to_save": ["lm_head"], "dtype": "bfloat16",
        "max_steps": 2, "schedule": "cosine",
    }  # fmt: skip
    lorakit.train(settings(bases / "llama", tmp_path / "out", **chosen), rows=PAIRS)
    told = lorakit.LoraConfig.from_pretrained(tmp_path / "out")
    assert told.target_modules == {"q_proj", "v_proj"}
    assert (told.r, told.lora_alpha, told.use_rslora, told.modules_to_save) == (4, 3.0, True, ["lm_head"])
    assert told.base_model_name_or_path == str(bases / "llama")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if "lora_" in key} == {torch.float32}


def test_an_output_in_use_is_left_alone(bases, tmp_path):
    chosen = settings(bases / "llama", tmp_path / "out", max_steps=2)
    lorakit.train(chosen, rows=PAIRS)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="an adapter of an earlier run there"):
        lorakit.train(chosen, rows=PAIRS)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="checkpoints of an earlier run there"):
        lorakit.train(chosen, rows=PAIRS)
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", max_steps=3), rows=PAIRS, overwrite=True
    )
    assert found.steps == 3
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_earlier_adapter_survives_a_run_that_fails(bases, tmp_path, monkeypatch):
    chosen = settings(bases / "llama", tmp_path / "out", max_steps=2)
    lorakit.train(chosen, rows=PAIRS)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("lorakit.checkpoint.atomic.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        lorakit.train(chosen, rows=PAIRS, overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "call", "error", "message"),
    [
        ({}, {"rows": None}, ConfigError, "data: wanted a file of rows, or rows"),
        ({}, {"rows": []}, ConfigError, "rows: there are none"),
        ({}, {"rows": [{"question": "a"}]}, ConfigError, "its first row has the fields"),
        ({}, {"resume": True}, ConfigError, "no checkpoint to resume from"),
        ({}, {"eval_rows": [{"label": "a"}]}, ConfigError, "wanted one of these kinds"),
        ({}, {"eval_rows": [{"text": "a"}]}, ConfigError, "rows of another kind"),
        ({"model": "./nowhere"}, {}, AdapterNotFoundError, "no such folder"),
        ({"data": "./none.jsonl"}, {"rows": None}, AdapterNotFoundError, "no such file"),
        ({"targets": ["qproj"]}, {}, PlanError, "did you mean 'q_proj'"),
        ({"task": "SEQ_CLS"}, {}, ConfigError, "wanted one of these kinds: text and label"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    bases, tmp_path, changes, call, error, message
):
    fields = {"model": str(bases / "llama")} | changes
    chosen = settings(fields.pop("model"), tmp_path / "out", **fields)
    with pytest.raises(error, match=message):
        lorakit.train(chosen, **{"rows": PAIRS} | call)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_go_are_refused(bases, tmp_path, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(bases / "llama", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AdapterNotFoundError, match="no tokenizer can be read"):
        lorakit.train(settings(folder, tmp_path / "out"), rows=PAIRS)
    shutil.copytree(bases / "llama", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError, match="the model cannot be read"):
        lorakit.train(settings(folder, tmp_path / "out"), rows=PAIRS)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(lorakit.UnsupportedError, match="load_in_4bit needs bitsandbytes"):
        lorakit.train(settings(bases / "llama", tmp_path / "out", load_in_4bit=True), rows=PAIRS)


def test_a_quantised_base_is_marked_only_while_the_trainer_is_made(bases):
    model = lorakit.get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases / "llama"), lorakit.LoraConfig(target_modules="all-linear")
    )
    base = model.get_base_model()
    with checkpoints._known_to_carry_adapters(model):
        assert not base._hf_peft_config_loaded
    base.is_quantized = True
    with checkpoints._known_to_carry_adapters(model):
        assert base._hf_peft_config_loaded
    assert not base._hf_peft_config_loaded
