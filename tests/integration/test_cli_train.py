"""`lorakit train` from the command line: files, overrides, the demo's data, two processes, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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


LAUNCHERS = {  # without a GPU both take the CPU
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port",
    ],
}  # fmt: skip


def launched(launcher, *arguments):
    """`lorakit train ...` in two processes, as a person launches them; gives what was printed."""
    started = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), "-m", "lorakit", "train"]
    found = subprocess.run(
        [*started, *map(str, arguments)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def changes_in(folder):
    """B A of each layer: EVA's directions have no sign."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensors[key.replace("_A", "_B")] @ A for key, A in tensors.items() if "lora_A" in key}


def distance(one, two):
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_and_go_on(files, tmp_path, launcher):
    """Each takes half of a batch of eight, with plain SGD, so the sums of gradients are the same up to rounding."""
    shared = [
        "--config", files / "run.yaml", "--optimizer", "sgd", "--schedule", "constant", "--max-steps", 4, "--save-steps", 2,
        "--lr", 0.1, "--init", "eva", "--json",
    ]  # fmt: skip
    halves = [*shared, "-o", tmp_path / "two", "--batch", 4, "--init-batches", 2]
    told = json.loads(launched(launcher, *halves))  # one of the two prints, and nothing but the result
    assert told["steps"] == 4
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    outcome = call(*shared, "-o", tmp_path / "one", "--batch", 8, "--init-batches", 1)
    assert outcome.exit_code == 0, outcome.output
    one, two = changes_in(tmp_path / "one"), changes_in(tmp_path / "two")
    assert distance(one, two) < 1e-5
    assert max(change.abs().max().item() for change in one.values()) > 1e-3
    assert distance(changes_in(checkpoint), two) > 1e-4
    if launcher != "torchrun":
        return
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    told = json.loads(launched(launcher, *halves, "--resume"))
    assert (told["resumed_from"], told["steps"]) == (2, 4)
    assert distance(changes_in(tmp_path / "two"), two) == 0.0


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_says_what_is_saved_and_how_to_go_on(files, tmp_path, monkeypatch, after):
    def interrupted(self, args, state, control, **_):
        if state.global_step == after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.training.trainer.Told.on_step_end", interrupted)
    arguments = (
        "--config",
        files / "run.yaml",
        "-o",
        tmp_path / "out",
        "--epochs",
        3,
        "--save-steps",
        2,
        "--json",
    )
    outcome = call(*arguments)
    assert outcome.exit_code == 130
    assert outcome.stdout == ""
    if after == 0:
        assert "interrupted; nothing is saved: no checkpoint was finished" in outcome.stderr
        return
    assert (
        f"{tmp_path / 'out' / 'checkpoint-2'} is whole, and the same command with --resume" in outcome.stderr
    )
    monkeypatch.undo()
    outcome = call(*arguments, "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["resumed_from"] == 2


@pytest.mark.slow
def test_a_signal_ends_it_as_a_shell_expects(files, tmp_path):
    """SIGINT to the process itself, once a checkpoint is there."""
    arguments = [
        "--config",
        files / "run.yaml",
        "-o",
        tmp_path / "out",
        "--epochs",
        100_000,
        "--save-steps",
        5,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "train", *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        while process.poll() is None and not (tmp_path / "out" / "checkpoint-10" / "settings.json").exists():
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "is whole, and the same command with --resume goes on from there" in complained
    assert "Traceback" not in complained


def test_a_full_disk_is_told_in_one_line(files, tmp_path, monkeypatch):
    """torch hides what the disk says in an error of its own."""
    arguments = ("--config", files / "run.yaml", "-o", tmp_path / "out", "--epochs", 2, "--save-steps", 2)

    def full(self, *_):
        if self.state.global_step > 2:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", full)
    outcome = call(*arguments)
    assert outcome.exit_code == 1
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert "checkpoint-4: " in outcome.stderr
    assert "the checkpoints before it are whole" in outcome.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_launches_that_split_the_base_are_refused_by_name(files, tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    outcome = call("--config", files / "run.yaml", "-o", tmp_path / "out")
    assert outcome.exit_code == 1
    assert f"accelerate is set to {name}" in outcome.stderr
    assert "accelerate launch --multi_gpu" in outcome.stderr
    assert not (tmp_path / "out").exists()
