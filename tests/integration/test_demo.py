"""The demo from end to end on a small task, and what its command prints."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

import lorakit
from lorakit.cli import demo as command
from lorakit.cli.app import app
from lorakit.demo import model as minilm
from lorakit.demo.run import DemoResult, run_demo
from lorakit.demo.task import build_task
from lorakit.errors import UnsupportedError

torch.set_num_threads(1)
PNG = b"\x89PNG\r\n\x1a\n"

RESULT = DemoResult(
    labels=("equality", "identity", "membership", "order"),
    train_texts=3600,
    test_texts=1000,
    example=("if group [MASK] None:", "identity"),
    base_parameters=22_000_000,
    trainable_parameters=1_200_000,
    head_parameters=1540,
    head_accuracy=0.625,
    lora_accuracy=0.875,
    losses=(1.4, 1.1, 0.9),
    accuracies=((0, 0.625), (3, 0.875)),
    base_bytes=90_000_000,
    adapter_bytes=4_500_000,
    load_difference=0.0,
    merge_difference=2e-6,
    bits_restored=True,
    seconds={"train": 3.0, "prepare": 1.0},
)


@pytest.fixture(scope="module")
def task():
    """Built once: most of the time goes into parsing the standard library."""
    return build_task(train_per_label=24, test_per_label=8)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, task):
    """One small run: its result, its folder and its progress reports."""
    folder = tmp_path_factory.mktemp("demo")
    reports = []
    result = run_demo(folder, epochs=1, task=task, progress=lambda *report: reports.append(report))
    return result, folder, reports


def test_the_result_is_coherent(demo_run):
    result, folder, reports = demo_run
    assert (result.train_texts, result.test_texts, len(result.labels)) == (4 * 24, 4 * 8, 4)
    assert len(result.losses) == 3  # 96 texts in batches of 32
    assert all(0 < loss < 10 for loss in result.losses)
    assert [step for step, _ in result.accuracies] == sorted({step for step, _ in result.accuracies})
    assert result.accuracies[0] == (0, result.head_accuracy)
    assert result.accuracies[-1] == (3, result.lora_accuracy)
    assert all(0 <= accuracy <= 1 for _, accuracy in result.accuracies)
    assert 0 < result.head_parameters < result.trainable_parameters < result.base_parameters
    assert result.load_difference < 1e-5
    assert result.merge_difference < 1e-4
    assert result.bits_restored
    assert 0 < result.adapter_bytes < result.base_bytes
    assert result.adapter_bytes == sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    assert result.example[1] in result.labels
    assert reports[-1] == ("train the adapter", 3, 3)


def test_the_adapter_loads_in_a_fresh_base(demo_run, task):
    result, folder, _ = demo_run
    model = lorakit.PeftModel.from_pretrained(minilm.load_classifier(len(result.labels)), folder / "adapter")
    logits = minilm.predict(model, minilm.encode(minilm.load_tokenizer(), task.test.texts))
    assert minilm.accuracy(logits, task.test.labels) == result.lora_accuracy
    assert model.get_nb_trainable_parameters()[0] == 0
    changed = sum(
        parameter.abs().sum().item() for name, parameter in model.named_parameters() if "lora_B" in name
    )
    assert changed > 0


def call(monkeypatch, result, *arguments):
    """The command with `run_demo` replaced: by a result, or by an error to raise. Returns outcome and calls."""
    calls = []

    def fake(output, **options):
        calls.append((output, options))
        if isinstance(result, Exception):
            raise result
        output.mkdir(parents=True, exist_ok=True)
        options["progress"]("train the adapter", 1, 1)
        return result

    monkeypatch.setattr(command, "run_demo", fake)
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "160"}), calls


def test_the_command_prints_the_table_and_draws_the_picture(monkeypatch, tmp_path):
    outcome, calls = call(monkeypatch, RESULT, "--output", str(tmp_path), "--seed", "7", "--epochs", "3")
    assert outcome.exit_code == 0, outcome.output
    output, options = calls[0]
    assert (output, options["seed"], options["epochs"]) == (tmp_path, 7, 3)
    for wanted in ("if group [MASK] None:", "0.625", "0.875", "1,200,000", "90.0 MB", "4.5 MB (5.0 %)", "2.0e-06", "yes", "4 s in all"):  # fmt: skip
        assert wanted in outcome.stdout, wanted
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


def test_bits_that_are_not_restored_are_told(monkeypatch, tmp_path):
    result = DemoResult(**{**asdict(RESULT), "bits_restored": False})
    outcome, _ = call(monkeypatch, result, "--output", str(tmp_path))
    assert outcome.exit_code == 0
    assert "NO" in outcome.stdout


def test_json_is_all_that_stdout_holds(monkeypatch, tmp_path):
    outcome, _ = call(monkeypatch, RESULT, "--json", "--output", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout) == json.loads(json.dumps(asdict(RESULT)))
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "error", [UnsupportedError("no model here: pip install 'it[all]'"), PermissionError("the disk refused")]
)
def test_an_error_is_one_line_and_exit_code_1(monkeypatch, tmp_path, error):
    outcome, _ = call(monkeypatch, error, "--json", "--output", str(tmp_path))
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    told = [line for line in outcome.stderr.splitlines() if line.startswith("lorakit: ")]
    assert told == [f"lorakit: {error}"]
    assert "Traceback" not in outcome.output


def test_a_wrong_call_is_exit_code_2(monkeypatch):
    outcome, calls = call(monkeypatch, RESULT, "--epochs", "0")
    assert outcome.exit_code == 2
    assert not calls
