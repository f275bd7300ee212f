"""Kill -9 at random moments of a merge, and two merges into one place: whole or nothing, and equal bytes in the end.

Children are forked from a process that has one thread, and leave by `os._exit`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
import torch
import transformers

from lorakit import LoraConfig, merge_checkpoint
from lorakit.errors import ConfigError
from merging import read_bytes, save_adapter, save_base
from models import tiny_llama

KILLS = 400 if os.environ.get("LORAKIT_NIGHTLY") == "1" else 30
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


@pytest.fixture
def root(tmp_path):
    transformers.utils.logging.disable_progress_bar()
    save_base(tiny_llama(), tmp_path / "base", max_shard_size="2KB")
    for name, seed in (("adapter", 3), ("other", 4)):
        save_adapter(
            tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), tmp_path / name, seed=seed
        )
        merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out")
    return tmp_path


def forked(work):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        status = work()
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(root, adapter="adapter", **options):
    return merge_checkpoint(root / "base", root / adapter, root / "out", **options)


def seconds_of_a_run(root):
    start = time.perf_counter()
    run(root)
    shutil.rmtree(root / "out")
    return time.perf_counter() - start


def steps_of_a_run(root):
    steps = []
    run(root, progress=lambda *step: steps.append(step))
    shutil.rmtree(root / "out")
    return len(steps)


def killed_after(root, steps, delay):
    """A merge that is killed so many seconds after it told of its n-th step, or after it has ended."""
    told, tell = os.pipe()
    child = forked(lambda: run(root, progress=lambda *_: os.write(tell, b".")).files and 0)
    os.close(tell)
    for _ in range(steps):
        os.read(told, 1)  # at once and empty when the child has ended
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    ended(child)
    os.close(told)


@pytest.mark.slow
def test_a_merge_killed_at_any_moment_is_gone_on_with(root):
    # by steps and not by the clock alone: on a busy machine a child may not have begun yet, or have ended long ago
    draw, longest, steps = random.Random(1), seconds_of_a_run(root), steps_of_a_run(root)
    wanted = read_bytes(root / "adapter-out")
    resumed = []
    for _ in range(KILLS):
        killed_after(root, draw.randrange(steps + 1), draw.uniform(0, longest / steps))
        if (root / "out").exists():  # it had appeared, so it is whole
            assert read_bytes(root / "out") == wanted
        else:
            resumed.append(run(root).resumed)
            assert read_bytes(root / "out") == wanted
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        shutil.rmtree(root / "out")
    assert sum(count > 0 for count in resumed) >= KILLS // 10, resumed
    assert len(set(resumed)) > 2, resumed


@pytest.mark.slow
def test_an_output_that_is_overwritten_is_the_old_or_the_new(root):
    draw, longest = random.Random(2), seconds_of_a_run(root)
    outputs = [read_bytes(root / f"{name}-out") for name in ("adapter", "other")]
    run(root)
    for number in range(KILLS):
        name = ("other", "adapter")[number % 2]
        child = forked(lambda name=name: run(root, name, overwrite=True).files and 0)
        time.sleep(draw.uniform(0, 1.2 * longest))
        os.kill(child, signal.SIGKILL)
        ended(child)
        with pytest.raises(ConfigError, match="is not empty"):
            run(root)  # any call mends what a kill between the two renames left
        assert read_bytes(root / "out") in outputs


def test_two_merges_into_one_place(root):
    children = [forked(lambda: _tried(root)) for _ in range(2)]
    assert sorted(ended(child) for child in children) == [0, 7]
    assert read_bytes(root / "out") == read_bytes(root / "adapter-out")
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def _tried(root):
    try:
        run(root)
    except ConfigError:
        return 7
    return 0
