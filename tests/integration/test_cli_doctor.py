"""`lorakit doctor` on real folders."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

import lorakit
from lorakit.cli.app import app
from models import tiny_llama, with_adapter

FIELDS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor")
    base = tiny_llama()
    base.save_pretrained(path / "base")
    with_adapter(base, **FIELDS).save_pretrained(path / "adapter")
    return path


def call(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "120"})


def test_json_is_the_list_of_the_library(folders):
    adapter, base = folders / "adapter", folders / "base"
    outcome = call(adapter, "--base", base, "--json")
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert told["findings"] == [asdict(finding) for finding in lorakit.doctor(adapter, base)]
    assert {finding["check"] for finding in told["findings"]} == {
        "targets",
        "fits",
        "vllm-rank",
        "no-base-name",
    }


def test_a_person_sees_what_to_do(folders):
    outcome = call(folders / "adapter")
    assert outcome.exit_code == 0, outcome.output
    for part in ("rank 24", "--max-lora-rank 32", "0 errors, 0 warnings", "it loads; pass --base"):
        assert part in outcome.stdout
    assert "it loads onto this base" in call(folders / "adapter", "--base", folders / "base").stdout


def test_an_adapter_that_does_not_load_is_exit_code_1(folders, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    outcome = call(tmp_path)
    assert outcome.exit_code == 1
    assert "git lfs pull" in outcome.stdout
    assert "1 error, 0 warnings, 0 notes: it does not load as it is" in outcome.stdout
    outcome = call(tmp_path, "--json")
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["findings"][0]["check"] == "git-lfs-pointer"


def test_what_is_not_there_is_one_line(folders):
    for arguments in (("./nowhere",), (folders / "adapter", "--base", "./nowhere")):
        outcome = call(*arguments, "--json")
        assert outcome.exit_code == 1
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("lorakit: ")
        assert "no such folder" in outcome.stderr
