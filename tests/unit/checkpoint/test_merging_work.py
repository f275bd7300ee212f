"""An output of a merge appears whole or not at all, and what a failed run finished is used by the next."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat

import pytest
import torch
import transformers

from lorakit import LoraConfig, merge_checkpoint
from lorakit.checkpoint.merging import merge, streaming, work
from lorakit.checkpoint.merging.scratch import Scratch
from lorakit.errors import AdapterFormatError, ConfigError, NonFiniteError
from merging import read_bytes, save_adapter, save_base
from models import tiny_llama

CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def root(tmp_path):
    transformers.utils.logging.disable_progress_bar()
    save_base(tiny_llama(), tmp_path / "base", max_shard_size="4KB")
    for name, seed in (("adapter", 3), ("other", 4)):
        save_adapter(tiny_llama(), CONFIG, tmp_path / name, seed=seed)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    return tmp_path


def run(root, adapter="adapter", **options):
    return merge_checkpoint(root / "base", root / adapter, root / "out", **options)


def hidden(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def fail_at(monkeypatch, number, error):
    """Let writing the file of that number (from 0) fail after its header."""
    write, count = streaming.Streamer.write, iter(range(1000))

    def failing(self, file, descriptor):
        if next(count) == number:
            os.write(descriptor, file.header)
            raise error
        write(self, file, descriptor)

    monkeypatch.setattr(streaming.Streamer, "write", failing)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), MemoryError()])
def test_a_run_that_failed_is_gone_on_with(root, monkeypatch, error):
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail_at(patch, 3, error)
        run(root)
    assert not (root / "out").exists()
    assert hidden(root) == [".out.lorakit-merging"]
    report = run(root, verify=True)
    assert report.resumed == 3
    assert read_bytes(root / "out") == read_bytes(root / "wanted")
    assert hidden(root) == []


def test_nothing_is_left_where_nothing_was_finished(root, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at(patch, 0, FULL)
        run(root)
    assert hidden(root) == []
    assert not (root / "out").exists()


def test_nothing_is_left_after_an_error_of_ours(root, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(NonFiniteError):
        fail_at(patch, 3, NonFiniteError("x"))
        run(root)
    assert hidden(root) == []


OTHERS = {
    "other factors": {"adapter": "other"},
    "another weight": {"weights": [0.5]},
    "another dtype": {"dtype": "bfloat16"},
    "other shards": {"max_shard_size": "9KB"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_taken_over_from_another_merge(root, monkeypatch, name):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at(patch, 3, FULL)
        run(root)
    assert run(root, verify=True, **OTHERS[name]).resumed == 0
    shutil.rmtree(root / "out")
    run(root)
    assert read_bytes(root / "out") == read_bytes(root / "wanted")


@pytest.mark.parametrize("damage", ["base", "file", "journal", "stranger"])
def test_nothing_is_taken_over_that_does_not_fit(root, monkeypatch, damage):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at(patch, 3, FULL)
        run(root)
    grown = root / ".out.lorakit-merging"
    if damage == "base":
        path = next((root / "base").glob("*.safetensors"))
        os.utime(path, ns=(1, 1))
    elif damage == "file":
        path = min(grown.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "journal":
        (grown / ".lorakit-journal.json").write_text("{")
    else:
        (grown / "stranger").mkdir()
        (grown / "stranger" / "x").write_text("x")
    assert run(root).resumed == {"base": 0, "file": 2, "journal": 0, "stranger": 3}[damage]
    assert read_bytes(root / "out") == read_bytes(root / "wanted")


# ---- an output that is there ------------------------------------------------------------------------------


def test_overwriting(root):
    run(root, "other")
    before = read_bytes(root / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        run(root)
    assert read_bytes(root / "out") == before
    run(root, overwrite=True)
    assert read_bytes(root / "out") == read_bytes(root / "wanted")
    assert hidden(root) == []


def test_an_empty_folder_is_taken(root):
    (root / "out").mkdir()
    run(root)
    assert read_bytes(root / "out") == read_bytes(root / "wanted")


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), NonFiniteError("x")])
def test_the_former_output_outlives_a_failure(root, monkeypatch, error):
    run(root, "other")
    before = read_bytes(root / "out")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail_at(patch, 3, error)
        run(root, overwrite=True)
    assert read_bytes(root / "out") == before


def test_the_former_output_outlives_a_failed_rename(root, monkeypatch):
    run(root, "other")
    before = read_bytes(root / "out")
    replace = os.replace

    def failing(source, target):
        if str(source).endswith("lorakit-merging"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(work.os, "replace", failing)
        run(root, overwrite=True)
    assert read_bytes(root / "out") == before
    run(root, overwrite=True)
    assert read_bytes(root / "out") == read_bytes(root / "wanted")
    assert hidden(root) == []


def test_a_kill_between_the_two_renames_is_mended(root):
    run(root, "other")
    before = read_bytes(root / "out")
    (root / "out").rename(root / ".out.lorakit-former")
    with pytest.raises(ConfigError, match="is not empty"):
        run(root)
    assert read_bytes(root / "out") == before
    shutil.copytree(root / "out", root / ".out.lorakit-former")  # a kill after both
    run(root, overwrite=True)
    assert hidden(root) == []


# ---- the disk -----------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (root / "out").exists()
    run(root)
    assert read_bytes(root / "out") == read_bytes(root / "wanted")


def test_a_disk_without_room_is_told_before_writing(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=1000)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"no room: .* bytes are needed and 1,000 are free") as caught:
        run(root)
    assert caught.value.errno == errno.ENOSPC
    assert hidden(root) == []


def test_a_base_that_changes_meanwhile(root):
    last = max((root / "base").glob("*.safetensors"))

    def touch(*_):
        os.utime(last, ns=(1, 1))

    with pytest.raises(AdapterFormatError, match="changed since it was opened"):
        run(root, progress=touch)
    assert not (root / "out").exists()


def test_files_have_the_mode_that_the_umask_leaves(root):
    before = os.umask(0o027)
    try:
        run(root)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (root / "out").iterdir()}
    assert modes == {0o640}


# ---- memory ---------------------------------------------------------------------------------------------


def test_tiles_lie_where_the_tiles_before_them_lay(root, monkeypatch):
    monkeypatch.setattr("lorakit.ops.merge.TILE_ELEMENTS", 16)
    rounded, tiles = streaming.rounded, []

    def seen(tile, dtype, name, memory):
        found = rounded(tile, dtype, name, memory)
        tiles.append((tile, found))  # held, so that no allocator can give the same place twice
        return found

    monkeypatch.setattr(streaming, "rounded", seen)
    run(root, dtype="float16")
    assert len(tiles) > 50
    for made in zip(*tiles, strict=True):
        assert len({each.untyped_storage().data_ptr() for each in made}) < 5


def test_scratch_memory_is_one_for_each_use():
    memory = Scratch()
    first, other = memory("a", 6, torch.float32).fill_(1), memory("b", 6, torch.float32).fill_(2)
    assert first.tolist() == [1] * 6
    assert memory("a", 12, torch.bfloat16).data_ptr() == first.data_ptr()
    assert memory("a", 7, torch.float32).shape == (7,)
    assert other.tolist() == [2] * 6


# ---- reading back ---------------------------------------------------------------------------------------


def test_verifying_sees_a_merged_number_that_is_wrong(root, monkeypatch):
    rounded = streaming.rounded

    def wrong(tile, dtype, name, memory):
        return rounded(tile, dtype, name, memory) * (1.001 if "layers.1.mlp.down" in name else 1)

    monkeypatch.setattr(streaming, "rounded", wrong)
    with pytest.raises(AdapterFormatError, match=r"down_proj\.weight: read back with an error"):
        run(root, verify=True)
    assert not (root / "out").exists()
    assert hidden(root) == []


def test_verifying_sees_a_copy_that_is_wrong(root, monkeypatch):
    monkeypatch.setattr(streaming, "copy_bytes", lambda _, __, count, target: os.write(target, bytes(count)))
    with pytest.raises(AdapterFormatError, match="was read back with other bytes"):
        run(root, verify=True)
    assert not (root / "out").exists()


def test_the_error_that_is_told_is_that_of_one_rounding(root):
    for path in (root / "base").iterdir():
        path.unlink()
    save_base(tiny_llama().bfloat16(), root / "base")
    report = run(root, verify=True)
    assert report.checked == 21
    assert 2**-12 < report.relative_error < 2**-8
    assert torch.finfo(torch.bfloat16).eps == 2**-7
