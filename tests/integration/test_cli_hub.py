"""Verbs on repositories of the hub that lie in its cache, offline: what huggingface_hub itself gives, and no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from lorakit import LoraConfig
from merging import read_files, save_adapter, save_base
from models import tiny_llama

COMMIT = "0123456789" * 4
FIRST = f"cache/models--org--first/snapshots/{COMMIT}"
RUN = """
import json, sys
from typer.testing import CliRunner
from lorakit.cli.app import app
outcomes = [CliRunner().invoke(app, call) for call in json.load(sys.stdin)]
print(json.dumps([[outcome.exit_code, outcome.stdout, outcome.stderr] for outcome in outcomes]))
"""


def repository(cache, name):
    """The folder of a repository's only commit, as the cache lays it out."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


def as_links(folder):
    """Files become links to blobs, as the cache has them."""
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base in shards, a fine-tune of it, one without weights, and two adapters."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("hub")
    cache = root / "cache"
    save_base(tiny_llama(), repository(cache, "org/base"), max_shard_size="8KB")
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.add_(torch.randn(16, 16))
    save_base(tuned, repository(cache, "org/tuned"))
    tiny_llama().config.save_pretrained(repository(cache, "org/empty"))
    for seed, name in enumerate(("org/first", "org/second")):
        save_adapter(
            tiny_llama(),
            LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            repository(cache, name),
            seed=seed,
        )
    for folder in cache.glob("models--*/snapshots/*"):
        as_links(folder)
    return root


def run(root, *calls):
    """Exit code, stdout and stderr of each call."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(calls),
        env=os.environ | {"HF_HUB_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


CALLS = {
    "merge": ["org/base", "org/first", "-o", "merged"],
    "extract": ["org/base", "org/tuned", "-o", "extracted", "-r", "2"],
    "doctor": ["org/first", "--base", "org/base"],
    "estimate": ["org/base", "--seq", "8"],
    "convert": [FIRST, "-o", "a.gguf", "--to", "gguf", "--base", "org/base"],
    "inspect": ["org/first"],
    "resize": ["org/first", "-o", "resized", "-r", "2"],
    "combine": ["org/first", "org/second", "-o", "combined"],
    "diff": ["org/first", "org/second"],
}


def test_every_verb_takes_repositories(root):
    outcomes = run(root, *([verb, *rest, "--json"] for verb, rest in CALLS.items()))
    told = {}
    for verb, (code, stdout, stderr) in zip(CALLS, outcomes, strict=True):
        assert code == 0, (verb, stderr)
        told[verb] = json.loads(stdout)
    base, merged = (
        read_files(root / "cache/models--org--base/snapshots" / COMMIT),
        read_files(root / "merged"),
    )
    assert {name for name in base if not merged[name].equal(base[name])} == {
        f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)
    }
    assert not any(path.is_symlink() for path in (root / "merged").iterdir())
    assert [layer["path"] for layer in told["extract"]["layers"]] == ["model.layers.0.self_attn.q_proj"]
    config = json.loads((root / "extracted" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert "fits" in {finding["check"] for finding in told["doctor"]["findings"]}


def test_what_the_cache_does_not_have_is_one_message(root):
    calls = [
        ["merge", "org/nothing", "org/first", "-o", "out"],
        ["merge", "org/empty", "org/first", "-o", "out"],
        ["merge", "org/base", "org/nothing", "-o", "out"],
        ["extract", "org/base", "org/nothing", "-o", "out", "-r", "2"],
        ["extract", "org/base", "org/empty", "-o", "out", "-r", "2"],
        ["doctor", "org/first", "--base", "org/nothing"],
        ["estimate", "org/nothing"],
        ["convert", FIRST, "-o", "out", "--to", "gguf", "--base", "org/nothing"],
        ["inspect", "org/nothing"],
    ]
    for call, (code, stdout, stderr) in zip(calls, run(root, *calls), strict=True):
        assert (code, stdout) == (1, ""), call
        last = stderr.splitlines()[-1]  # other libraries may have logged before
        assert last.startswith("lorakit: "), (call, stderr)
        assert "org/nothing" in last or "has neither model.safetensors nor" in last, last
        assert "Traceback" not in stderr
    assert not (root / "out").exists()
