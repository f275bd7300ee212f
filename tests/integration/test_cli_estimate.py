"""`lorakit estimate` on the folder of a model that transformers wrote."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

import lorakit
from lorakit.cli.app import app
from models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    return path


def call(*arguments):
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], env={"COLUMNS": "120"})


def test_json_is_the_result_of_the_library(folder):
    options = (
        "--r",
        4,
        "--alpha",
        4,
        "-t",
        "q_proj",
        "-t",
        "v_proj",
        "--batch",
        2,
        "--seq",
        16,
        "--dtype",
        "float32",
    )
    outcome = call(folder, *options, "--json")
    assert outcome.exit_code == 0, outcome.output
    config = lorakit.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    wanted = lorakit.estimate(folder, config, batch=2, seq=16, dtype="float32")
    assert json.loads(outcome.stdout) == json.loads(json.dumps(asdict(wanted)))
    assert wanted.trainable_parameters == 2 * 2 * 4 * (16 + 16)


def test_a_person_sees_the_parts(folder):
    outcome = call(
        folder, "--seq", 16, "--gradient-checkpointing", "--quantization", "nf4", "--optimizer", "lion"
    )
    assert outcome.exit_code == 0, outcome.output
    for line in (
        "LlamaForCausalLM",
        "linear layers in nf4",
        "optimizer (lion)",
        "activations, computed again",
        "in all",
    ):
        assert line in outcome.stdout
    sizes = lorakit.estimate(
        folder,
        lorakit.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        seq=16,
        gradient_checkpointing=True,
        quantization="nf4",
        optimizer="lion",
    )
    assert f"{sizes.total / 1024:,.1f} KiB" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("./nowhere",), 1, "no such folder"),
        (("{folder}", "--dtype", "int8"), 1, "dtype: got 'int8'"),
        (("{folder}", "--task", "PAINTING"), 1, "task_type: got 'PAINTING'"),
        (("{folder}", "-t", "qproj"), 1, "did you mean 'q_proj'"),
        (("{folder}", "--batch", "0"), 2, "--batch"),
        ((), 2, "Missing argument"),
    ],
)
def test_errors_are_told_without_a_traceback(folder, arguments, code, message):
    outcome = call(*(argument.format(folder=folder) for argument in arguments), "--json")
    assert outcome.exit_code == code
    assert message in outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
