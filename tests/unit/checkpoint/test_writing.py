"""A save is whole or it is not there: refusals, failures at every system call, modes, links, equal bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

from lorakit.checkpoint import atomic, writing
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import README_MARK, write_adapter
from lorakit.errors import AdapterFormatError, ConfigError, NonFiniteError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("bad_config", "bad_tensors", "error", "says"),
    [
        ({"r": float("nan")}, {}, ConfigError, "JSON"),
        ({"r": object()}, {}, ConfigError, "JSON"),
        ({"r": "x" * (1 << 20)}, {}, AdapterFormatError, "at most"),
        ({}, {"a": torch.zeros(2, dtype=torch.int8)}, AdapterFormatError, "torch.int8"),
        ({}, {"a": torch.zeros(2, dtype=torch.complex64)}, AdapterFormatError, "torch.complex64"),
        ({}, {"a": torch.zeros(2, device="meta")}, AdapterFormatError, "meta device"),
        ({}, {"a": torch.zeros(2).to_sparse()}, AdapterFormatError, "dense"),
        ({}, {"a": 3}, AdapterFormatError, "a int, wanted"),
        ({}, {"": torch.zeros(2)}, AdapterFormatError, "not a name"),
        ({}, {"\ud800": torch.zeros(2)}, AdapterFormatError, "not a name"),
        ({}, {"__metadata__": torch.zeros(2)}, AdapterFormatError, "not a name"),
        (
            {},
            {"a": torch.tensor([float("nan"), float("inf")])},
            NonFiniteError,
            "a: 1 NaN and 1 infinite of 2",
        ),
        ({}, {"a": torch.zeros(2), "b": 3, "c": 4}, AdapterFormatError, "'b'.*\n.*'c'"),
    ],
)
def test_refusals_touch_nothing(saved, bad_config, bad_tensors, error, says):
    before = contents(saved)
    for folder in (saved, saved.parent / "fresh"):
        with pytest.raises(error, match=says):
            write_adapter(folder, bad_config, bad_tensors)
    assert contents(saved) == before
    assert not (saved.parent / "fresh").exists()


def test_views_and_shared_storage(tmp_path):
    whole = torch.randn(8, 6)
    tensors = {
        "a": whole,
        "b": whole.t(),
        "c": whole[::2, 1],
        "d": torch.nn.Parameter(whole),
        "e": torch.tensor(3.0),
    }
    tensors["f"] = whole[0].expand(5, 6)
    write_adapter(tmp_path, {}, tensors)
    loaded = open_adapter(tmp_path).load()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_same_input_same_bytes(tmp_path, config, tensors):
    write_adapter(tmp_path / "a", config, tensors)
    write_adapter(tmp_path / "b", dict(reversed(config.items())), dict(reversed(tensors.items())))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    adapter = open_adapter(tmp_path / "a")
    write_adapter(tmp_path / "c", adapter.config, adapter.load())
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_same_bytes_for_every_hash_seed(tmp_path):
    code = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from lorakit.checkpoint.writing import write_adapter
        config = {"target_modules": {"q", "k", "v", "o", "gate", "up", "down"}, "r": 4}
        write_adapter(sys.argv[1], config, {f"k{i}": torch.full((3,), float(i)) for i in {"3", "1", "7", "4"}
                      for i in [int(i)]}, readme="x")
    """)
    digests = set()
    for seed in ("0", "1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=env, check=True)
        digests.add(hashlib.sha256(repr(sorted(contents(tmp_path / seed).items())).encode()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_of_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        paths = write_adapter(tmp_path, {}, {}, readme="x")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}


def test_mode_of_replaced_files_is_kept(saved, config, tensors):
    (saved / WEIGHTS).chmod(0o640)
    (saved / CONFIG).chmod(0o604)
    write_adapter(saved, config, tensors)
    assert stat.S_IMODE((saved / WEIGHTS).stat().st_mode) == 0o640
    assert stat.S_IMODE((saved / CONFIG).stat().st_mode) == 0o604


def test_links_are_replaced_never_followed(tmp_path, config, tensors):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG, "README.md"):
        (folder / name).symlink_to(victim)
    write_adapter(folder, config, tensors, readme="x")
    assert victim.read_text() == "precious"
    assert not (folder / WEIGHTS).is_symlink()
    assert not (folder / CONFIG).is_symlink()
    assert (folder / "README.md").is_symlink()  # not ours, left alone


def test_readme_is_ours_or_left_alone(saved, config, tensors):
    readme = saved / "README.md"
    assert write_adapter(saved, config, tensors, readme="# one")[-1] == readme
    assert readme.read_text() == f"# one\n\n{README_MARK}\n"
    write_adapter(saved, config, tensors, readme="# two")
    assert readme.read_text().startswith("# two")
    readme.write_text("# mine")
    assert readme not in write_adapter(saved, config, tensors, readme="# three")
    assert readme.read_text() == "# mine"


def test_only_our_leftovers_are_removed(saved, config, tensors):
    for name in (".lorakit-weights-1-2.tmp", ".lorakit-config-3.tmp", ".lorakit-notes", "x.tmp"):
        (saved / name).write_text("x")
    write_adapter(saved, config, tensors)
    assert sorted(contents(saved)) == [".lorakit-notes", CONFIG, WEIGHTS, "x.tmp"]


class FailingOs:
    """The `os` module, whose n-th call of a system call raises, before or after it is done."""

    NAMES = (
        "open",
        "write",
        "fsync",
        "replace",
        "lseek",
        "close",
        "unlink",
        "chmod",
        "listdir",
        "lstat",
        "getpid",
    )

    def __init__(self, at, error, *, after):
        self.calls = 0
        self.at, self.error, self.after = at, error, after

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.NAMES:
            return real

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                if self.after or name == "close":  # a close that fails has closed
                    real(*args, **kwargs)
                raise self.error
            return real(*args, **kwargs)

        return call


ERRORS = [
    OSError(errno.EIO, "I/O error"),
    OSError(errno.ENOSPC, "No space"),
    PermissionError(errno.EACCES, "denied"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [*ERRORS, KeyboardInterrupt(), MemoryError()], ids=lambda error: repr(error)[:22]
)
def test_failure_of_every_system_call(tmp_path, config, make_tensors, monkeypatch, error, after):
    folder = tmp_path / "adapter"
    old, new = make_tensors(1), make_tensors(2)
    old_config, new_config = {"r": 1}, {"r": 2}
    outcomes = []
    unnamed = 0
    for at in range(1, 200):
        write_adapter(folder, old_config, old, readme="old")
        shim = FailingOs(at, error, after=after)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", shim)
            patch.setattr(writing, "os", shim)
            try:
                write_adapter(folder, new_config, new, readme="new")
                if shim.calls < at:
                    break
            except type(error) as caught:
                unnamed += isinstance(caught, OSError) and caught.filename is None
        adapter = open_adapter(folder)
        expected = old if adapter.config == old_config else new
        assert adapter.config in (old_config, new_config)
        loaded = adapter.load()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        outcomes.append(adapter.config["r"])
        assert (
            not [name for name in contents(folder) if name.startswith(".lorakit-")]
            or after
            or adapter.repaired
        )
    else:
        pytest.fail("no clean run")
    assert unnamed == 0
    assert len(outcomes) > 20
    assert outcomes.count(1) > 12  # all before the commit keep the old one
    assert set(outcomes[-3:]) == {2}


def test_disk_full(saved, config, make_tensors):
    before = contents(saved)
    big = make_tensors(3) | {"big": torch.ones(1 << 20)}
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="adapter was not saved") as caught:
            write_adapter(saved, config, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert str(saved) in str(caught.value)
    assert contents(saved) == before


def test_without_locks(saved, config, make_tensors, monkeypatch):
    monkeypatch.setattr(atomic, "_FCNTL", None)
    write_adapter(saved, config, make_tensors(4))
    assert torch.equal(
        open_adapter(saved).load()["base_model.model.q.lora_A.weight"],
        make_tensors(4)["base_model.model.q.lora_A.weight"],
    )


def test_a_file_in_place_of_the_folder(tmp_path, config, tensors):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(OSError, match="x"):
        write_adapter(tmp_path / "x", config, tensors)
    assert (tmp_path / "x").read_text() == "precious"
