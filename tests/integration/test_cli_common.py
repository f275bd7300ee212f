"""What every verb has alike: help with an example, JSON alone on stdout, bars for terminals, warnings in a line, completion."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli import as_json, run, succeed
from lorakit import LoraConfig
from lorakit.cli.app import app
from merging import save_adapter, save_base
from models import tiny_llama

VERBS = sorted(typer.main.get_command(app).commands)
CALLS = {
    "merge": ["merge", "base", "a", "-o", "out", "--overwrite"],
    "combine": ["combine", "a", "b", "-o", "out", "--overwrite"],
    "extract": ["extract", "base", "tuned", "-o", "out", "-r", "2", "--overwrite"],
    "resize": ["resize", "a", "-o", "out", "-r", "2", "--overwrite"],
    "diff": ["diff", "a", "b"],
    "inspect": ["inspect", "a"],
    "doctor": ["doctor", "a", "--base", "base"],
    "estimate": ["estimate", "base", "--seq", "8"],
    "convert": ["convert", "a", "-o", "out", "--to", "mlx", "--overwrite"],
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for seed, name in enumerate("ab"):
        save_adapter(tiny_llama(), config, tmp_path / name, seed=seed)
    save_base(tiny_llama(), tmp_path / "base")
    tuned = tiny_llama()
    tuned.model.layers[0].mlp.up_proj.weight.data += 1.0
    save_base(tuned, tmp_path / "tuned")
    return tmp_path


def on_a_terminal(*arguments):
    """What a verb prints on a terminal, stdout and stderr together."""
    shown, ours = pty.openpty()
    program = "from lorakit.cli import main; main()"
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=ours, stderr=ours, env=environment
    )
    os.close(ours)
    found = b""
    try:
        while part := os.read(shown, 1 << 16):
            found += part
    except OSError:  # the other end is closed
        pass
    os.close(shown)
    assert child.wait() == 0, found.decode()
    return found.decode()


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_worked_example_of_options_that_exist(verb):
    text = " ".join(succeed(verb, "--help").split())
    example = re.search(rf"Example: lorakit {verb}\b([^│:]*)", text)
    assert example, text
    options = re.findall(r"(?<= )--?[a-z][a-z-]*", example[1].partition(" ╭")[0])
    known = {flag for each in typer.main.get_command(app).commands[verb].params for flag in each.opts}
    assert not set(options) - known


ROOT = Path(__file__).parents[2]
WRITTEN = sorted(
    {
        line.removeprefix("$ lorakit ")
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("$ lorakit ")
    }
)


@pytest.mark.parametrize("written", WRITTEN)
def test_calls_in_the_docs_are_calls(written):
    verb, *arguments = shlex.split(written)
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)  # raises a UsageError
    assert verb in VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_an_option_of_every_verb(verb):
    params = {flag for each in typer.main.get_command(app).commands[verb].params for flag in each.opts}
    assert "--json" in params


@pytest.mark.parametrize("verb", CALLS)
def test_json_is_alone_on_stdout_and_nothing_is_on_stderr(folders, verb):
    outcome = run(*CALLS[verb], "--json")
    assert outcome.exit_code == 0, outcome.output
    assert isinstance(json.loads(outcome.stdout), dict)
    assert outcome.stderr == ""


@pytest.mark.parametrize("verb", CALLS)
def test_without_a_terminal_there_is_no_bar(folders, verb):
    outcome = run(*CALLS[verb])
    assert outcome.exit_code == 0, outcome.output
    assert "━━" not in outcome.stderr
    assert outcome.stdout


def test_on_a_terminal_long_work_has_bars_and_json_has_none(folders):
    for verb, what in (("merge", "merging (MB)"), ("resize", "decomposing")):
        text = on_a_terminal(*CALLS[verb])
        assert what in text
        assert "━━" in text
    told = on_a_terminal(*CALLS["resize"], "--json")
    assert "━" not in told
    assert json.loads(told)["output"] == "out"


@pytest.mark.parametrize("verb", sorted(set(CALLS) - {"estimate", "doctor", "extract", "inspect"}))
def test_a_warning_is_one_line_on_stderr(folders, verb):
    path = folders / "a" / "adapter_config.json"
    path.write_text(
        path.read_text()
        .replace('"lora_alpha":8', '"lora_alpha":4')
        .replace('"lora_alpha": 8', '"lora_alpha": 4')
    )
    for more in ([], ["--json"]):
        outcome = run(*CALLS[verb], *more)
        assert outcome.exit_code == 0, outcome.output
        assert re.fullmatch(
            r"warning: a/adapter_config\.json: changed after the adapter was saved .*\n", outcome.stderr
        )
        assert "warning" not in outcome.stdout


def test_without_a_terminal_downloads_have_no_bar_either():
    program = """
from lorakit.cli import main
try:
    main()
except SystemExit:
    from huggingface_hub.utils import are_progress_bars_disabled
    print(are_progress_bars_disabled())
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    call = [sys.executable, "-c", program, "inspect", "org/nothing"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert "org/nothing: neither a local folder nor" in done.stderr


def test_a_reader_that_has_enough_is_no_error(folders):
    """`lorakit inspect ... | head -1`."""
    program = "from lorakit.cli import main; main()"
    call = [sys.executable, "-c", program, "inspect", "a", "--layers"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        told = child.stderr.read()
    assert b"lorakit: " not in told
    assert b"Traceback" not in told


def test_exit_codes(folders):
    assert run("inspect", "a").exit_code == 0
    assert run("inspect", "nowhere").exit_code == 1
    assert run("inspect").exit_code == 2
    assert run("no-such-verb").exit_code == 2
    assert run("diff", "a", "b", "--fail-over", "0.1").exit_code == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """The script that a shell takes, and what it is answered on `lorakit me<TAB>`."""
    program = "import sys; sys.argv[0] = 'lorakit'; from lorakit.cli import main; main()"
    for asked, wanted in (("source", "_LORAKIT_COMPLETE"), ("complete", "merge")):
        environment = os.environ | {
            "_LORAKIT_COMPLETE": f"{asked}_{shell}",
            "COMP_WORDS": "lorakit me",
            "COMP_CWORD": "1",
            "_TYPER_COMPLETE_ARGS": "lorakit me",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_TESTING": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert wanted in done.stdout, done
    assert "--install-completion" in succeed("--help")


def test_a_library_without_the_extra_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; from lorakit.cli import main; main()"  # as if it were not installed
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "lorakit: the command line needs typer: pip install 'lorakit[cli]'"


def test_gguf_needs_no_package(folders):
    """lorakit reads and writes such files itself: the package `gguf` is for the tests, which compare with it."""
    program = (
        "import sys; sys.modules['gguf'] = None; import lorakit; "
        "lorakit.convert('a', 'a.gguf', to='gguf', base='base'); lorakit.convert('a.gguf', 'c', to='peft', base='base')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folders)
    assert as_json("diff", "a", "c")["largest"] == 0.0
