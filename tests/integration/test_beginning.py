"""`lorakit.train` with adapters that begin from rows, or from what four bits took: what they see, and that they begin once."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lorakit
from lorakit.errors import ConfigError, PlanError
from lorakit.training import beginning
from lorakit.training.encoding import IGNORED, Collator
from lorakit.training.rows import PAIRS as PAIR_KIND
from words import save_bert, save_llama, tokenizer

torch.set_num_threads(1)
PAIRS = [{"prompt": f"a {word}", "completion": f"{word} yes"} for word in "bcdef"] * 4
CLASSES = [{"text": f"{word} {word}", "label": "yes" if word in "abc" else "no"} for word in "abcdef"] * 4
FROM_ROWS = ("eva", "corda", "lora_ga")
STARTERS = (
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
)
pytestmark = pytest.mark.filterwarnings("ignore:.*enable_input_require_grads.*")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    save_llama(folder / "llama", width=64)
    save_bert(folder / "bert")
    return folder


def settings(base, output, **changes):
    fields = {"batch": 4, "learning_rate": 1e-2, "epochs": 4, "r": 4, "init_batches": 2}
    return lorakit.TrainConfig(model=str(base), output=str(output), **fields | changes)


def loss_of(model, rows):
    """Of pairs, as the run takes it: a mean over the tokens of all completions."""
    from lorakit.training.encoding import encode_rows

    encoded = encode_rows(rows, PAIR_KIND, tokenizer(), 64, (), lambda *_: None).rows
    with torch.no_grad():
        return model(**Collator(0, PAIR_KIND, 64)(encoded)).loss.item()


@pytest.mark.parametrize("init", FROM_ROWS)
def test_what_is_saved_is_for_the_untouched_base(bases, tmp_path, init):
    reports = []
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", init=init),
        rows=PAIRS,
        eval_rows=PAIRS[:4],
        progress=lambda *report: reports.append(report),
    )
    assert found.losses[-1][1] < 0.8 * found.losses[0][1]
    looked = [report for report in reports if report[0] == "look at rows to begin from"]
    assert looked[-1] == ("look at rows to begin from", 8, 8)
    assert reports.index(looked[-1]) < next(
        place for place, report in enumerate(reports) if report[0] == "train"
    )
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    model = lorakit.PeftModel.from_pretrained(base, tmp_path / "out")
    assert loss_of(model, PAIRS[:4]) == pytest.approx(found.evaluations[-1][1], rel=1e-4)


@pytest.mark.parametrize("init", FROM_ROWS)
def test_classifiers_begin_so_too(bases, tmp_path, init):
    found = lorakit.train(
        settings(bases / "bert", tmp_path / "out", init=init, epochs=20, learning_rate=2e-2),
        rows=CLASSES,
        eval_rows=CLASSES[:6],
    )
    assert found.losses[-1][1] < 0.8 * found.losses[0][1]
    base = AutoModelForSequenceClassification.from_pretrained(bases / "bert", num_labels=2)
    lorakit.PeftModel.from_pretrained(base, tmp_path / "out")


def begun(bases, output, init, **changes):
    """The first factors by file key: those of a checkpoint after one step at a rate that changes nothing."""
    lorakit.train(
        settings(
            bases / "llama", output, init=init, max_steps=1, optimizer="sgd", learning_rate=1e-30, **changes
        ),
        rows=PAIRS,
    )
    raw = output / "checkpoint-1" / "trainer_adapter.safetensors"
    return load_file(raw if raw.exists() else output / "checkpoint-1" / "adapter_model.safetensors")


@pytest.mark.parametrize("init", FROM_ROWS)
def test_the_rows_and_their_number_say_where_it_begins(bases, tmp_path, init):
    one = begun(bases, tmp_path / "a", init)
    same = begun(bases, tmp_path / "b", init)
    more = begun(bases, tmp_path / "c", init, init_batches=5)
    assert one.keys() == same.keys()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(key not in more or not torch.equal(one[key], more[key]) for key in one)


def test_eva_begins_along_what_the_layers_are_given(bases, tmp_path):
    """A's rows are orthonormal, B is zero: what `initialize_lora_eva_weights` promises of an adapter's start."""
    first = begun(bases, tmp_path / "out", "eva")
    for key, tensor in first.items():
        if "lora_A" in key:
            assert torch.allclose(tensor @ tensor.mT, torch.eye(len(tensor)), atol=1e-4), key
        else:
            assert not tensor.any(), key
    assert lorakit.LoraConfig.from_pretrained(tmp_path / "out").init_lora_weights == "eva"


def test_loftq_makes_up_for_what_four_bits_took(bases, tmp_path):
    reports = []
    lorakit.train(
        settings(
            bases / "llama", tmp_path / "out", init="loftq", load_in_4bit=True, max_steps=1, optimizer="sgd",
            learning_rate=1e-30,
        ),
        rows=PAIRS,
        progress=lambda *report: reports.append(report),
    )  # fmt: skip
    assert ("fit what 4 bits took", 14, 14) in reports
    plain = AutoModelForCausalLM.from_pretrained(bases / "llama")
    four = lorakit.PeftModel.from_pretrained(in_four_bits(bases / "llama"), tmp_path / "out")
    layers = {
        name: part
        for name, part in four.get_base_model().named_modules()
        if isinstance(part, lorakit.LoraLayer)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        error = plain.get_submodule(name).weight - layer.read_weight(torch.float32)
        best = torch.linalg.svdvals(error)[4:].norm().item()
        assert (error - layer.get_delta_weight("default")).norm().item() == pytest.approx(best, rel=1e-3), (
            name
        )


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora", "mica", "eva"])
def test_a_base_in_four_bits_goes_with_these(bases, tmp_path, init):
    found = lorakit.train(
        settings(bases / "llama", tmp_path / "out", init=init, load_in_4bit=True, epochs=6),
        rows=PAIRS,
        eval_rows=PAIRS[:4],
    )
    assert found.losses[-1][1] < 0.9 * found.losses[0][1]
    base = lorakit.prepare_model_for_kbit_training(
        in_four_bits(bases / "llama"), use_gradient_checkpointing=False
    )
    model = lorakit.PeftModel.from_pretrained(base, tmp_path / "out")
    assert loss_of(model, PAIRS[:4]) == pytest.approx(found.evaluations[-1][1], rel=1e-3)


def in_four_bits(folder):
    from transformers import BitsAndBytesConfig

    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=scheme, device_map="cpu")


def test_loftq_speaks_through_progress_alone(bases, tmp_path, capfd):
    lorakit.train(
        settings(bases / "llama", tmp_path / "out", init="loftq", load_in_4bit=True, max_steps=1), rows=PAIRS
    )
    told = capfd.readouterr()
    assert "LoftQ" not in told.out + told.err
    assert "error" not in told.out


@pytest.mark.parametrize("init", [*FROM_ROWS, "loftq", "pissa"])
def test_a_run_that_goes_on_does_not_begin_again(bases, tmp_path, init, monkeypatch):
    chosen = {"init": init, "save_steps": 5, "keep": 10, "dropout": 0.1, "load_in_4bit": init == "loftq"}
    lorakit.train(settings(bases / "llama", tmp_path / "whole", **chosen), rows=PAIRS)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", cut / "checkpoint-10")

    def never(*_args, **_kwargs):
        raise AssertionError("it began again")

    for name in STARTERS:
        monkeypatch.setattr(beginning, name, never)
    monkeypatch.setattr("lorakit.init.registry.INITIALISERS", {"default": lorakit.init.registry.kaiming})
    found = lorakit.train(settings(bases / "llama", cut, **chosen), rows=PAIRS, resume=True)
    assert (found.resumed_from, found.steps) == (10, 20)
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", cut))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_adapter_is_not_resumed(bases, tmp_path):
    lorakit.train(settings(bases / "llama", tmp_path / "out", max_steps=2), rows=PAIRS)
    with pytest.raises(ConfigError, match=r"resuming keeps the adapter(?s:.*)r: got 8, the run began with 4"):
        lorakit.train(settings(bases / "llama", tmp_path / "out", r=8), rows=PAIRS, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": "lora_ga", "r": 33}, PlanError, "LoRA-GA takes 2 r = 66"),
        ({"init": "corda", "r": 65}, PlanError, "CorDA begins from the weight, which has rank 64"),
        ({"init": "corda", "dora": True}, PlanError, "takes something off the base"),
        ({"init": "loftq", "load_in_4bit": True, "dora": True}, lorakit.UnsupportedError, "use plain LoRA"),
    ],
)
def test_what_cannot_begin_so_is_refused_before_anything_is_written(bases, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        lorakit.train(settings(bases / "llama", tmp_path / "out", **changes), rows=PAIRS)
    assert not (tmp_path / "out").exists()


def test_samples_are_looked_at_without_their_padding():
    rows = [{"input_ids": [1] * count, "labels": [IGNORED] * count} for count in (3, 5, 9)]
    look = beginning.Look(
        rows, Collator(0, PAIR_KIND, 64), torch.device("cpu"), settings("m", "o", batch=2), lambda *_: None
    )
    assert sorted(sample["input_ids"].shape[1] for sample in look.samples()) == [3, 5, 9]
    assert [len(batch["labels"]) for batch in look.batches()] == [2, 1]
