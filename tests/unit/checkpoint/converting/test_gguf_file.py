"""GGUF files against the `gguf` package both ways, and files that are damaged or hostile."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
import torch

from lorakit.checkpoint.converting.gguf import ARCHITECTURES
from lorakit.checkpoint.converting.gguf_file import gguf_file, read_gguf
from lorakit.checkpoint.converting.output import write_file
from lorakit.errors import AdapterFormatError, UnsupportedError

GOLDEN = Path(__file__).parents[3] / "golden" / "convert" / "llama.gguf"
FIELDS = {"general.architecture": "llama", "adapter.lora.alpha": 1.5, "tokens": [1, 2, 3], "é": "\n"}
TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7, 1).half(),
    "c": torch.randn(2, 3).bfloat16(),
    "empty": torch.zeros(0, 4),
}


def test_the_gguf_package_reads_what_is_written(tmp_path):
    write_file(tmp_path / "x.gguf", gguf_file(FIELDS, TENSORS), overwrite=False)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.get_field(key).contents() for key in FIELDS} == FIELDS
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for tensor, (name, wanted) in zip(reader.tensors, TENSORS.items(), strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (name, kinds[wanted.dtype])
        assert tensor.shape.tolist() == list(reversed(wanted.shape))
        assert tensor.data.tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()


def test_what_is_written_is_read(tmp_path):
    write_file(tmp_path / "x.gguf", gguf_file(FIELDS, TENSORS), overwrite=False)
    found = read_gguf(tmp_path / "x.gguf")
    assert found.fields == {**FIELDS}
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(kind):
    architecture = ARCHITECTURES[kind]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(arch, 40)
    names = architecture.names()
    paths = [path for number in (0, 39) for path in names.paths_like(f"x.{number}.x")]
    assert len(paths) >= 8
    for path in paths:
        assert known.get_name(path) == names.name(path), path
        assert names.path(names.name(path)) == path


def test_every_cut_is_refused(tmp_path):
    whole = GOLDEN.read_bytes()
    end = len(whole) - 16  # the last tensor has that much padding
    for size in range(0, end, 3):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        with pytest.raises(AdapterFormatError):
            read_gguf(tmp_path / "x.gguf")


def test_no_changed_byte_does_worse_than_an_error(tmp_path):
    """Any one byte of the header set to 0 or 255."""
    whole = GOLDEN.read_bytes()
    for place in range(whole.index(b"\x00" * 20)):
        for value in (0, 255):
            (tmp_path / "x.gguf").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with suppress(AdapterFormatError, UnsupportedError):
                read_gguf(tmp_path / "x.gguf")


def header(tensors=0, fields=b"", count=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


HOSTILE = {
    "numbers without end": header(count=1, fields=text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    "texts without end": header(count=1, fields=text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)),
    "lists of lists": header(count=1, fields=text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
    "a long text": header(count=1, fields=struct.pack("<Q", 1 << 62)),
    "no text": header(count=1, fields=struct.pack("<Q", 1) + b"\xff" + bytes(40)),
    "a field of no type": header(count=1, fields=text("k") + struct.pack("<I", 13) + bytes(40)),
    "a field twice": header(count=2, fields=(text("k") + struct.pack("<IB", 0, 1)) * 2),
    "many fields": header(count=1 << 40),
    "many tensors": header(tensors=1 << 40),
    "many dimensions": header(tensors=1, fields=text("t") + struct.pack("<I", 1 << 30)),
    "a large tensor": header(
        tensors=1, fields=text("t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0) + bytes(64)
    ),
    "tensors over each other": header(
        tensors=2,
        fields=b"".join(text(name) + struct.pack("<IQIQ", 1, 4, 0, 0) for name in "tu") + bytes(99),
    ),
    "a size beyond all": header(
        tensors=1, fields=text("t") + struct.pack("<IQQIQ", 2, (1 << 64) - 1, 0, 0, 0) + bytes(64)
    ),
    "an odd alignment": header(count=1, fields=text("general.alignment") + struct.pack("<II", 4, 3)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    (tmp_path / "x.gguf").write_bytes(HOSTILE[case])
    with pytest.raises(AdapterFormatError, match=r"x\.gguf"):
        read_gguf(tmp_path / "x.gguf")


def test_quantised_and_foreign_files(tmp_path):
    quantised = header(tensors=1, fields=text("t") + struct.pack("<IQIQ", 1, 32, 8, 0) + bytes(64))
    big_endian = b"GGUF" + struct.pack(">I", 3) + bytes(16)
    for data, words in ((quantised, "no quantised"), (big_endian, "big-endian")):
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(UnsupportedError, match=words):
            read_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(AdapterFormatError, match="not a GGUF file"):
        read_gguf(tmp_path / "x.gguf")
