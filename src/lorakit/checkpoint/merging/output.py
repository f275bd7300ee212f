"""The files that a merge writes: which tensors go into which, and their headers and index.

As a rule they are the base's own files, tensor by tensor in the same places, so that headers and index stay what they
were, byte for byte. They are laid out anew where tensors are added, or another dtype or shard size is asked for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.checkpoint.header import TensorInfo, build_header
from lorakit.checkpoint.merging.fitting import FLOATS
from lorakit.checkpoint.merging.weight import Piece, Weight
from lorakit.checkpoint.shards import SINGLE
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from lorakit.checkpoint.merging.changes import Change
    from lorakit.checkpoint.shards import ModelShards

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive elements of a tensor that a change gives: `count` from `begin` on are the change's from `offset` on."""

    begin: int
    count: int
    change: Change
    offset: int


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor to write.

    Attributes:
        name: in the file.
        info: what it will be.
        source: where the elements are that no segment gives.
        segments: in order, apart from each other.
    """

    name: str
    info: TensorInfo
    source: Weight
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class OutFile:
    """One file to write: a header, then the tensors one after another."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.header) + sum(tensor.info.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layouting:
    """What is asked of the files.

    Attributes:
        dtype: of all floating-point tensors; None keeps each its own.
        max_shard_size: bytes of tensors in a file; None keeps the base's files.
    """

    dtype: torch.dtype | None = None
    max_shard_size: int | None = None


def parse_size(size: int | str | None) -> int | None:
    """A number of bytes, also from texts such as "5GB" (10**9) and "5GiB" (2**30).

    Raises:
        ConfigError: it is none.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(size).upper())
        if isinstance(size, str)
        else None
    )
    count = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if count < 1:
        raise ConfigError(
            f"max_shard_size: got {size!r}, wanted a number of bytes such as 5_000_000_000 or '5GB'"
        )
    return count


def lay_out(
    shards: ModelShards,
    changes: Mapping[str, Change],
    new: Mapping[str, tuple[Weight, str]],
    wanted: Layouting,
) -> tuple[list[OutFile], bytes | None]:
    """The files, and the index; None for a single file.

    Args:
        shards: of the base.
        changes: by the name of the weight.
        new: weights that get a tensor of their own, with the tensor of the base beside which they belong, if any.
        wanted: of the files.
    """
    segments = _segments(changes, new)
    by_file: dict[str, list[OutTensor]] = {file: [] for file in shards.headers}
    for name, place in shards.places.items():
        count = math.prod(place.info.shape)
        source = Weight(name, place.info.shape, place.info.dtype, (Piece(name, 0, count),))
        info = _info(place.info.shape, place.info.dtype, wanted.dtype)
        by_file[place.file].append(
            OutTensor(name, info, source, tuple(sorted(segments.get(name, ()), key=lambda each: each.begin)))
        )
    for name, (weight, beside) in new.items():
        file = shards.places[beside].file if beside in shards.places else list(by_file)[-1]
        whole = (Segment(0, weight.count, changes[name], 0),) if name in changes else ()
        info = _info(weight.shape, weight.dtype, wanted.dtype)
        by_file[file].append(OutTensor(name, info, weight, whole))
    if wanted.max_shard_size is not None:
        return _resharded([each for file in by_file.values() for each in file], wanted.max_shard_size)
    files = [_kept(shards, file, tensors) for file, tensors in by_file.items()]
    return files, _index(shards, files)


def _segments(changes: Mapping[str, Change], new: Mapping[str, object]) -> dict[str, list[Segment]]:
    """By tensor of the base."""
    found: dict[str, list[Segment]] = {}
    for name, change in changes.items():
        offset = 0
        for piece in () if name in new else change.weight.pieces:
            found.setdefault(piece.tensor, []).append(Segment(piece.begin, piece.count, change, offset))
            offset += piece.count
    return found


def _info(shape: tuple[int, ...], dtype: torch.dtype, wanted: torch.dtype | None) -> TensorInfo:
    kept = wanted if wanted is not None and dtype in FLOATS else dtype
    return TensorInfo(kept, shape, math.prod(shape) * kept.itemsize)


def _kept(shards: ModelShards, file: str, tensors: Sequence[OutTensor]) -> OutFile:
    """A file of the base: with its own header where that still holds."""
    header = shards.headers[file]
    if {each.name: each.info for each in tensors} == header.tensors:
        return OutFile(file, shards.raw_header(file), tuple(tensors))
    return _file(file, tensors, header.metadata)


def _file(name: str, tensors: Sequence[OutTensor], metadata: Mapping[str, str]) -> OutFile:
    # the largest elements first, which keeps every tensor aligned
    ordered = sorted(tensors, key=lambda each: -each.info.dtype.itemsize)
    header = build_header({each.name: each.info for each in ordered}, {"format": "pt", **metadata})
    return OutFile(name, header, tuple(ordered))


def _resharded(tensors: Sequence[OutTensor], limit: int) -> tuple[list[OutFile], bytes | None]:
    groups: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.info.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.info.nbytes
    if len(groups) == 1:
        return [_file(SINGLE, groups[0], {})], None
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    files = [_file(name, group, {}) for name, group in zip(names, groups, strict=True)]
    return files, _index_of(files, {})


def _index(shards: ModelShards, files: Sequence[OutFile]) -> bytes | None:
    if shards.index is None:
        return None
    same = all(file.header == shards.raw_header(file.name) for file in files)
    return shards.index if same else _index_of(files, json.loads(shards.index))


def _index_of(files: Sequence[OutFile], former: Mapping[str, object]) -> bytes:
    """An index in the form of transformers, with what a former one says beside."""
    infos = {each.name: each.info for file in files for each in file.tensors}
    told = former.get("metadata")
    metadata = {
        **(told if isinstance(told, dict) else {}),
        "total_size": sum(info.nbytes for info in infos.values()),
    }
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(info.shape) for info in infos.values())
    weight_map = {each.name: file.name for file in files for each in file.tensors}
    content = {**former, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
