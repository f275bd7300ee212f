"""GGUF files: written, and read strictly. Sizes are compared with the file's before anything is allocated.

Layout (version 2 and 3, little-endian): "GGUF"; u32 version; u64 tensors; u64 fields; the fields, each a text, a
u32 type and a value; the tensors, each a text, u32 dimensions, that many u64 sizes (the fastest first), a u32 type
and a u64 offset; zeros up to the alignment; the data.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.checkpoint.atomic import write_all
from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.files import open_regular
from lorakit.errors import AdapterFormatError, UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from io import BufferedReader
    from pathlib import Path

    from torch import Tensor

MAGIC = b"GGUF"
_VERSIONS = {2, 3}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_ALIGNMENT = 32
_LARGEST = 1 << 40
_MOST_FIELDS, _MOST_TENSORS, _MOST_DIMENSIONS = 10_000, 200_000, 4


class _Place(NamedTuple):
    begin: int
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class GgufFile:
    """The fields and the tensors of a file; shapes are torch's, the slowest dimension first."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> GgufFile:
    """Read a file.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is damaged, or no GGUF file.
        UnsupportedError: it is of another byte order or version, or its tensors are quantised.
    """
    with (
        open_regular(path.parent, path.name) as (descriptor, status),
        os.fdopen(os.dup(descriptor), "rb") as file,
    ):
        reader = _Reader(file, status.st_size, str(path))
        fields, places = _header(reader)
        data = _data_begin(reader, fields)
        kinds = [f"{name}: type {place.kind}" for name, place in places.items() if place.kind not in _DTYPES]
        if kinds:
            raise UnsupportedError(
                bullet_list(
                    f"{path}: only tensors of f32, f16, bf16 and f64 are read, no quantised ones",
                    kinds[:10],
                    "Convert the original adapter.",
                )
            )
        _check_places(places, status.st_size - data, str(path))
        tensors = {name: _tensor(reader, data, place) for name, place in places.items()}
    return GgufFile(fields, tensors)


def gguf_file(
    fields: Mapping[str, str | float | list[int]], tensors: Mapping[str, Tensor]
) -> Callable[[int], None]:
    """What writes a file of version 3 into a descriptor.

    Args:
        fields: texts, floats (as f32) and lists of whole numbers (as u32).
        tensors: of f32, f16 or bf16, on the CPU; they keep their order.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    head += [_packed_text(key) + _packed(value) for key, value in fields.items()]
    reached = 0
    for name, tensor in tensors.items():
        sizes = tuple(reversed(tensor.shape))
        head.append(
            _packed_text(name)
            + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kinds[tensor.dtype], reached)
        )
        reached += tensor.nbytes + -tensor.nbytes % _ALIGNMENT

    def fill(descriptor: int) -> None:
        written = b"".join(head)
        write_all(descriptor, written + bytes(-len(written) % _ALIGNMENT))
        for tensor in tensors.values():
            write_all(descriptor, raw_bytes(tensor.contiguous()))
            write_all(descriptor, bytes(-tensor.nbytes % _ALIGNMENT))

    return fill


def _packed(value: str | float | list[int]) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _packed_text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack(f"<IIQ{len(value)}I", _ARRAY, 4, len(value), *value)


def _packed_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


class _Reader:
    """Takes numbers and texts from a file, never more than it holds."""

    def __init__(self, file: BufferedReader, size: int, where: str) -> None:
        self.file, self.where = file, where
        self.left = size

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise AdapterFormatError(f"{self.where}: cut off, or not a GGUF file; copy or download it again")
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise AdapterFormatError(f"{self.where}: a text in it is not UTF-8") from None

    def value(self, kind: int, *, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY or nested:
            raise AdapterFormatError(f"{self.where}: a field of type {kind}, which GGUF does not have")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = f"{count}{_SCALARS[inner]}"
            if count * struct.calcsize(_SCALARS[inner]) > self.left:
                raise AdapterFormatError(f"{self.where}: cut off; copy or download it again")
            return list(struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}"))))
        if count * 8 > self.left:  # a text takes eight bytes at least
            raise AdapterFormatError(f"{self.where}: cut off; copy or download it again")
        return [self.value(inner, nested=True) for _ in range(count)]

    @property
    def position(self) -> int:
        return self.file.tell()


def _header(reader: _Reader) -> tuple[dict[str, Any], dict[str, _Place]]:
    if reader.bytes(4) != MAGIC:
        raise AdapterFormatError(f"{reader.where}: does not begin with GGUF; not a GGUF file")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"{reader.where}: version {version}, or numbers in big-endian order; only little-endian versions 2 and 3 are read"
        )
    tensors, fields = reader.number("Q"), reader.number("Q")
    if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
        raise AdapterFormatError(
            f"{reader.where}: claims {tensors:,} tensors and {fields:,} fields; not an adapter"
        )
    found: dict[str, Any] = {}
    for _ in range(fields):
        key = reader.text()
        if key in found:
            raise AdapterFormatError(f"{reader.where}: the field {key[:200]!r} occurs twice")
        found[key] = reader.value(reader.number("I"))
    places: dict[str, _Place] = {}
    for _ in range(tensors):
        name, dimensions = reader.text(), reader.number("I")
        if name in places or dimensions > _MOST_DIMENSIONS:
            raise AdapterFormatError(
                f"{reader.where}: the tensor {name[:200]!r} occurs twice or has {dimensions} dimensions"
            )
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        if any(size > _LARGEST for size in shape):
            raise AdapterFormatError(f"{reader.where}: the tensor {name[:200]!r} claims to be of {shape}")
        kind = reader.number("I")
        places[name] = _Place(reader.number("Q"), shape, kind)
    return found, places


def _data_begin(reader: _Reader, fields: dict[str, Any]) -> int:
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise AdapterFormatError(f"{reader.where}: general.alignment: {alignment!r}, wanted a power of two")
    return -(-reader.position // alignment) * alignment


def _check_places(places: dict[str, _Place], size: int, where: str) -> None:
    """Each tensor lies within the data, and none in another."""
    reached = 0
    for name, place in sorted(places.items(), key=lambda row: row[1].begin):
        end = place.begin + math.prod(place.shape) * _DTYPES[place.kind].itemsize
        if place.begin < reached or end > size:
            raise AdapterFormatError(
                f"{where}: {name[:200]!r} of {place.shape} is at bytes {place.begin:,} to {end:,} of {size:,}, over another "
                "or beyond the end; cut off or damaged"
            )
        reached = end


def _tensor(reader: _Reader, data: int, place: _Place) -> Tensor:
    tensor = torch.empty(place.shape, dtype=_DTYPES[place.kind])
    memory = raw_bytes(tensor)
    reader.file.seek(data + place.begin)
    if memory and reader.file.readinto(memory) != len(memory):
        raise AdapterFormatError(f"{reader.where}: cut while it was read; try again")
    return tensor
