"""Every verb on files against every fault: one message that says what to do, nothing lost, and no half of an output."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from cli import fill_disk, refused, run
from lorakit import LoraConfig
from merging import read_bytes, save_adapter, save_base
from models import tiny_llama


class Verb(NamedTuple):
    """A call of a verb, what of its inputs it reads, and what it writes."""

    arguments: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    output: str | None = None

    @property
    def call(self):
        return [
            *self.arguments,
            *(("-o", self.output) if self.output and "--html" not in self.arguments else ()),
        ]


VERBS = {
    "merge": Verb(("merge", "base", "a"), ("a",), ("base",), output="out"),
    "combine": Verb(("combine", "a", "b"), ("a", "b"), output="out"),
    "extract": Verb(
        ("extract", "base", "tuned", "-r", "2"), (), ("base", "tuned"), ("tuned",), output="out"
    ),
    "resize": Verb(("resize", "a", "-r", "2"), ("a",), output="out"),
    "diff": Verb(("diff", "a", "b"), ("a", "b")),
    "inspect": Verb(("inspect", "a", "--html", "out.html"), ("a",), output="out.html"),
    "doctor": Verb(("doctor", "a", "--base", "base"), ("a",), configs=("base",)),
    "estimate": Verb(("estimate", "base", "--seq", "8"), configs=("base",)),
    "convert": Verb(("convert", "a", "--to", "gguf", "--base", "base"), ("a",), configs=("base",), output="out.gguf"),
}  # fmt: skip
WRITING = [name for name, verb in VERBS.items() if verb.output]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A base in shards, a fine-tune of it, two adapters on it, and the adapter and the checkpoint of another model."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("whole")
    save_base(tiny_llama(), root / "base", max_shard_size="8KB")
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.add_(torch.randn(16, 16))
    save_base(tuned, root / "tuned", max_shard_size="8KB")
    fields = {"r": 4, "base_model_name_or_path": "user/llama"}
    for seed, name in enumerate("ab"):
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
        save_adapter(tiny_llama(), config, root / name, seed=seed)
    sizes = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    other = transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=24, **sizes))
    save_base(other, root / "other-base")
    fields["base_model_name_or_path"] = "user/bert"
    save_adapter(other, LoraConfig(target_modules=["query"], **fields), root / "other")
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    """The same to break, as the working directory."""
    folder = shutil.copytree(whole, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def told(arguments):
    """What a call says that fails and changes nothing: of doctor its findings, of others an error."""
    before, entries = read_bytes(Path()), sorted(Path().iterdir())
    if arguments[0] == "doctor":
        outcome = run(*arguments, columns=10_000)
        assert outcome.exit_code == 1
        assert "Traceback" not in outcome.output
        text = outcome.output
    else:
        text = refused(*arguments)
    assert read_bytes(Path()) == before
    assert sorted(Path().iterdir()) == entries
    return text


# ---- inputs ---------------------------------------------------------------------------------------------------


def weights_of(folder):
    return max(folder.glob("*.safetensors"))


def config_of(folder):
    return folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")


def cut(folder):
    weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-5])


def not_safetensors(folder):
    weights_of(folder).write_bytes(b"PK\3\4" + bytes(200))


def a_pointer(folder):
    weights_of(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")


def no_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def bad_json(folder):
    config_of(folder).write_text('{"r": ')


FOLDER = {
    "absent": (shutil.rmtree, ("no such",)),
    "a file": (a_file, ("a folder", "no config.json in it", "none of the formats", "Is it where")),
}
WEIGHTS = {
    "cut": (cut, ("copy or download it again", "Copy, download")),
    "no safetensors": (not_safetensors, ("copy or download it again", "Copy, download")),
    "a git-lfs pointer": (a_pointer, ("git lfs pull",)),
    "no weights": (no_weights, ("Download them again", "where the adapter was saved", "say which it should be")),
}  # fmt: skip
CONFIG = {"JSON that is cut": (bad_json, ("restore",))}


def faults():
    for name, verb in VERBS.items():
        read = {}
        for place in (*verb.adapters, *verb.checkpoints):
            read[place] = FOLDER | WEIGHTS | CONFIG
        for place in verb.configs:
            read[place] = read.get(place, {}) | FOLDER | CONFIG
        for place, kinds in read.items():
            for kind, (damage, words) in kinds.items():
                yield pytest.param(name, place, damage, words, id=f"{name}: {place} is {kind}")


@pytest.mark.parametrize(("verb", "place", "damage", "words"), [*faults()])
def test_an_input_that_cannot_be_read(root, verb, place, damage, words):
    damage(root / place)
    text = told(VERBS[verb].call)
    assert place in text
    assert any(word in text for word in words), text


UNRELATED = {
    "merge": (["merge", "base", "other", "-o", "out"], "do not fit the base"),
    "merge into another base": (["merge", "other-base", "a", "-o", "out"], "do not fit the base"),
    "combine": (["combine", "a", "other", "-o", "out"], "different bases"),
    "extract": (["extract", "other-base", "tuned", "-r", "2", "-o", "out"], "not of one model"),
    "doctor": (["doctor", "other", "--base", "base"], "Is this the base"),
    "convert": (["convert", "other", "--to", "gguf", "--base", "base", "-o", "out.gguf"], "llama"),
    "estimate": (["estimate", "other-base", "-t", "q_proj", "--seq", "8"], "q_proj"),
    "merge twice": (["merge", "base", "a", "./a", "-o", "out"], "is given twice; give it once"),
    "combine twice": (["combine", "a", "b", "../work/a", "-o", "out"], "is given twice; give it once"),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_inputs_that_do_not_go_together(root, name):
    call, words = UNRELATED[name]
    assert words in told(call)


def test_of_unrelated_adapters_diff_tells_that_they_are(root):
    outcome = run("diff", "a", "other", "--fail-over", "0.5", columns=10_000)
    assert outcome.exit_code == 3
    assert "only in b: bert.encoder.layer.1.attention.self.query" in outcome.stdout


# ---- outputs --------------------------------------------------------------------------------------------------


def no_permission(monkeypatch):
    """From now on nothing can be made, as for a user who may not write there (root may always)."""
    opened = os.open

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    def open_(path, flags, *rest, **options):
        return refuse(path) if flags & os.O_CREAT else opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "open", open_)


DISKS = {
    "full": (fill_disk, "No space left on device", "make room there"),
    "of somebody else": (no_permission, "Permission denied", "check who may read and write there"),
}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("verb", WRITING)
def test_a_disk_that_refuses(root, monkeypatch, verb, disk):
    spoil, what, fix = DISKS[disk]
    output = VERBS[verb].output
    call = VERBS[verb].call
    with monkeypatch.context() as patch:
        spoil(patch)
        text = told(call)
        assert f"{output}: {what}" in text
        assert fix in text
        assert ".lorakit" not in text
    assert run(*call).exit_code == 0
    with monkeypatch.context() as patch:  # what was written before outlives it
        spoil(patch)
        assert what in told([*call, "--overwrite"])


def in_a_file(output):
    Path("file").write_text("")
    return f"file/{output}", "choose an output that can be written"


def in_place_of_a_file(output):
    Path("taken").write_text("mine")
    Path("taken.html").mkdir()
    Path("taken.gguf").mkdir()
    return f"taken{Path(output).suffix}", ""


@pytest.mark.parametrize("place", [in_a_file, in_place_of_a_file])
@pytest.mark.parametrize("verb", WRITING)
def test_a_place_where_nothing_can_be_written(root, verb, place):
    before = VERBS[verb].call
    output, words = place(VERBS[verb].output)
    call = [output if each == VERBS[verb].output else each for each in before]
    assert words in told(call)
    assert words in told([*call, "--overwrite"])


@pytest.mark.parametrize("verb", WRITING)
def test_what_is_there_is_replaced_only_if_asked(root, verb):
    call = VERBS[verb].call
    assert run(*call).exit_code == 0
    wanted = read_bytes(Path())
    assert "(--overwrite)" in told(call)
    assert run(*call, "--overwrite").exit_code == 0
    assert read_bytes(Path()).keys() == wanted.keys()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk"
)
@pytest.mark.parametrize("verb", WRITING)
def test_a_small_disk_that_fills_up(root, verb):
    """The same with a disk that is really full: room for half of what is to be written, in whole pages."""
    call = VERBS[verb].call
    assert run(*call).exit_code == 0
    made = Path(VERBS[verb].output)
    size = sum(path.stat().st_size for path in (made.rglob("*") if made.is_dir() else [made]))
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "disk"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    Path("disk/full").write_bytes(bytes(2**20 - size // 8192 * 4096))
    try:
        text = told([f"disk/{each}" if each == VERBS[verb].output else each for each in call])
        assert f"disk/{made}" in text or "disk: no room" in text
        assert "room" in text
    finally:
        subprocess.run(["umount", "disk"], check=True)


# ---- what every verb has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_errors_go_to_stderr_under_json_too(root, verb):
    for place in (*VERBS[verb].adapters, *VERBS[verb].checkpoints, *VERBS[verb].configs):
        shutil.rmtree(place, ignore_errors=True)
    assert "no such" in refused(*VERBS[verb].call, "--json")
