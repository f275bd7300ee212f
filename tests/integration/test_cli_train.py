"""`lorakit train` from the command line: files, overrides, the demo's data, two processes, errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorakit
from lorakit.cli import train as command
from lorakit.cli.app import app
from lorakit.cli.setting_options import _PANELS
from lorakit.demo.task import build_task
from words import save_llama

torch.set_num_threads(1)
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    save_llama(folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"a {word}"},
                {"role": "assistant", "content": f"{word} " * times},
            ]
        }
        for word in "bcdef"
        for times in (1, 2, 4)
    ] + [{"messages": TALK}]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(
        f"model: {folder / 'base'}\ndata: {folder / 'chats.jsonl'}\nbatch: 4\nr: 2\nlearning_rate: 1e-2\nlog_steps: 1\n"
    )
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "120"})


def test_every_setting_has_its_option():
    assert {name for options in _PANELS.values() for name in options} == {
        field.name for field in fields(lorakit.TrainConfig)
    }


def test_a_file_of_settings_and_an_option_that_wins(files, tmp_path):
    outcome = call("--config", files / "run.yaml", "--output", tmp_path / "out", "--r", 3, "--dora", "--json")
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert (told["rows"], told["steps"], told["kind"]) == (16, 4, "messages")
    written = lorakit.LoraConfig.from_pretrained(tmp_path / "out")
    assert (written.r, written.lora_alpha, written.use_dora) == (3, 6, True)
    assert told == json.loads((tmp_path / "out" / "training.json").read_text())["result"]


def test_a_person_sees_how_it_went(files, tmp_path):
    arguments = (
        "--model",
        files / "base",
        "--data",
        files / "chats.jsonl",
        "-o",
        tmp_path / "out",
        "--epochs",
        2,
    )
    outcome = call(*arguments, "--eval-share", 0.25, "--batch", 3, "-t", "q_proj", "-t", "v_proj")
    assert outcome.exit_code == 0, outcome.output
    for part in ("12 of messages, 4 held out", "steps", "loss, held out", "loss.png"):
        assert part in outcome.stdout
    outcome = call(*arguments)
    assert outcome.exit_code == 1
    assert "go on with resume=True (--resume)" in outcome.stderr
    outcome = call(
        *arguments,
        "--resume",
        "--epochs",
        3,
        "--eval-share",
        0.25,
        "--batch",
        3,
        "-t",
        "q_proj",
        "-t",
        "v_proj",
    )
    assert outcome.exit_code == 0, outcome.output
    assert "resumed from step 8" in outcome.stdout


def test_with_nothing_given_it_trains_on_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "build_task", lambda: build_task(train_per_label=16, test_per_label=4))
    outcome = call("--output", tmp_path / "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert told["labels"] == ["equality", "identity", "membership", "order"]
    assert (told["rows"], told["eval_rows"], told["steps"]) == (64, 16, 2)
    assert told["base_parameters"] > 20_000_000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--config", "./none.yaml"), 1, "no such file"),
        (("--model", "./nowhere", "--data", "{folder}/chats.jsonl", "-o", "{out}"), 1, "no such folder"),
        (("--config", "{folder}/run.yaml", "--data", "./none.jsonl", "-o", "{out}"), 1, "no such file"),
        (("--config", "{folder}/run.yaml", "-o", "{out}", "--init", "evva"), 1, "init: got 'evva'"),
        (("--config", "{folder}/run.yaml", "-o", "{out}", "-t", "qproj"), 1, "did you mean 'q_proj'"),
        (("--config", "{folder}/run.yaml", "-o", "{out}", "--resume"), 1, "no checkpoint to resume from"),
        (("--config", "{folder}/run.yaml"), 2, "wanted --output"),
        (("--model", "x"), 2, "wanted --output and --data"),
        (("--config", "{folder}/run.yaml", "-o", "{out}", "--r", "many"), 2, "--r"),
    ],
)
def test_errors_are_told_without_a_traceback(files, tmp_path, arguments, code, message):
    outcome = call(*(part.format(folder=files, out=tmp_path / "out") for part in arguments), "--json")
    assert outcome.exit_code == code
    assert message in outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "out").exists()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launched(count, *arguments):
    """`python -m lorakit train ...` as torchrun starts it, in `count` processes; their outputs and codes."""
    port = str(free_port())
    processes = []
    for rank in range(count):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "lorakit", "train", *map(str, arguments)],
                env=os.environ | places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return [(*process.communicate(timeout=240), process.returncode) for process in processes]


@pytest.mark.slow
def test_two_processes_train_as_one(files, tmp_path):
    """Each takes half of a batch of eight, with plain SGD, so the sums of gradients are the same up to rounding."""
    shared = (
        "--config",
        files / "run.yaml",
        "--optimizer",
        "sgd",
        "--schedule",
        "constant",
        "--max-steps",
        3,
        "--json",
    )
    (told, complained, code), (silent, _, other) = launched(2, *shared, "-o", tmp_path / "two", "--batch", 4)
    assert (code, other) == (0, 0), complained
    assert silent == ""
    assert json.loads(told)["steps"] == 3
    outcome = call(*shared, "-o", tmp_path / "one", "--batch", 8)
    assert outcome.exit_code == 0, outcome.output
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    assert any(one[key].abs().max() > 1e-4 for key in one if "lora_B" in key)
