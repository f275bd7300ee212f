"""Kill -9 at random moments of a save, and two writers with a reader: old or new, never lost, torn or mixed.

Children are forked from a process that has one thread, and leave by `os._exit`.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings

import pytest
import torch

from lorakit.checkpoint import atomic, writing
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import AdapterError

KILLS = 1000 if os.environ.get("LORAKIT_NIGHTLY") == "1" else 60
SECONDS = 3.0
NAMES = [f"base_model.model.layers.{i}.lora_A.weight" for i in range(4)]
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*a save was cut.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(folder, version, size):
    tensors = {name: torch.full((size,), float(version)) for name in NAMES}
    write_adapter(folder, {"r": 8, "version": version}, tensors)


def check(folder):
    """The version in the folder, after checking that every part is of that version."""
    adapter = open_adapter(folder)
    loaded = adapter.load()
    assert list(loaded) == sorted(NAMES)
    assert {float(value) for tensor in loaded.values() for value in (tensor.min(), tensor.max())} == {
        float(adapter.config["version"])
    }
    return adapter.config["version"]


def forked(work):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def test_killed_saves(tmp_path):
    size = 100_000
    chance = random.Random(0)
    save(tmp_path, 1, size)
    start = time.monotonic()
    for _ in range(5):
        save(tmp_path, 1, size)
    usual = (time.monotonic() - start) / 5
    seen = {1: 0, 2: 0}
    for _ in range(KILLS):
        save(tmp_path, 1, size)
        assert check(tmp_path) == 1
        assert len(list(tmp_path.iterdir())) == 2  # leftovers of the last kill are gone
        child = forked(lambda: save(tmp_path, 2, size))
        time.sleep(chance.uniform(0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen[check(tmp_path)] += 1
    assert seen[1] + seen[2] == KILLS
    assert seen[1] > 0


def test_killed_at_each_step(tmp_path):
    """The random kills seldom hit the moment between two renames; this one always does."""
    repaired = []
    for step in range(1, 100):
        save(tmp_path, 1, 10)
        child = forked(lambda step=step: save_and_die(tmp_path, step))
        survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert check(tmp_path) in (1, 2)
        if open_adapter(tmp_path).repaired:
            repaired.append(step)
            assert check(tmp_path) == 2
        save(tmp_path, 3, 10)
        assert check(tmp_path) == 3
        assert len(list(tmp_path.iterdir())) == 2
        if survived:
            break
    assert step > 12
    assert len(repaired) == 1  # exactly one gap, between the two renames


def save_and_die(folder, step):
    """Save version 2, and die in place of the given system call."""
    calls = [0]

    class Deadly:
        def __getattr__(self, name):
            real = getattr(os, name)
            if name not in ("open", "write", "fsync", "replace"):
                return real

            def call(*args):
                calls[0] += 1
                if calls[0] == step:
                    os._exit(9)
                return real(*args)

            return call

    atomic.os = writing.os = Deadly()
    save(folder, 2, 10)


def test_two_writers_and_a_reader(tmp_path):
    size = 5_000
    save(tmp_path, 1, size)
    deadline = time.monotonic() + SECONDS

    def write(versions):
        while time.monotonic() < deadline:
            for version in versions:
                save(tmp_path, version, size)

    children = [forked(lambda: write((2, 3))), forked(lambda: write((4, 5)))]
    seen, replaced = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*a save was cut.*")
        while time.monotonic() < deadline:
            try:
                seen.append(check(tmp_path))
            except AdapterError as error:  # noqa: PERF203
                if "changed since it was opened" not in str(error):
                    raise
                replaced += 1
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert len(set(seen)) > 1
    assert replaced < 50 * len(seen)
    assert check(tmp_path) in (2, 3, 4, 5)
    assert len(list(tmp_path.iterdir())) == 2
