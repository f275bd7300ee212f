"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli import fill_disk
from lorakit import convert

GOLDEN = Path(__file__).parents[3] / "golden" / "convert"
CASES = {
    "gguf": ("llama-peft", "out.gguf", {"base": GOLDEN / "llama"}),
    "mlx": ("llama-peft", "out", {}),
    "torchtune": ("llama-peft", "out", {"base": GOLDEN / "llama"}),
    "kohya": ("sdxl-diffusers.safetensors", "out.safetensors", {}),
    "diffusers": ("sdxl-kohya.safetensors", "out.safetensors", {}),
    "peft": ("llama-mlx", "out", {"base": GOLDEN / "llama"}),
}


def picture(root):
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("to", CASES)
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
def test_a_full_disk(tmp_path, monkeypatch, to, there):
    source, name, options = CASES[to]
    if there:
        convert(GOLDEN / source, tmp_path / name, to=to, **options)
    before = picture(tmp_path)
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left") as caught:
        convert(GOLDEN / source, tmp_path / name, to=to, overwrite=there, **options)
    assert str(tmp_path / name) in str(caught.value)
    monkeypatch.undo()
    left = picture(tmp_path)
    left.pop(tmp_path / name, None) if to == "peft" and not there else None  # an empty folder
    assert left == before


@pytest.mark.parametrize("to", ["mlx", "torchtune"])
def test_a_folder_whose_exchange_fails(tmp_path, monkeypatch, to):
    """The old folder is back in its place."""
    source, name, options = CASES[to]
    convert(GOLDEN / source, tmp_path / name, to=to, **options)
    before = picture(tmp_path)
    rename, calls = os.rename, []

    def second_fails(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise PermissionError(13, "no")
        rename(*arguments, **keywords)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(PermissionError):
        convert(GOLDEN / source, tmp_path / name, to=to, overwrite=True, **options)
    assert len(calls) == 3
    assert picture(tmp_path) == before
