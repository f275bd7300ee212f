"""A model's checkpoint on disk, read in place: `model.safetensors`, or shards with an index.

Opening reads the headers alone. Tensors are then read by rows, at the places that the headers say; no file is mapped
into memory, so that what has been read does not count as the process' own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.checkpoint.files import open_regular, present, read_small, read_up_to, stamp_of
from lorakit.checkpoint.header import ALL_DTYPES, Header, TensorInfo, parse_header
from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

    from lorakit.checkpoint.files import Stamp

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_MAX_INDEX = 64 << 20
_MAX_CONFIG = 16 << 20
_OTHER = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".onnx", ".onnx_data", ".gguf", ".tflite", ".ot", ".npz",
)  # fmt: skip
"""Of files that hold weights, in whatever format."""


class Place(NamedTuple):
    """Where a tensor is: its file, the byte where it begins, and what it is."""

    file: str
    begin: int
    info: TensorInfo


@dataclass(frozen=True)
class ModelShards:
    """A checkpoint whose headers have been read and checked.

    Attributes:
        folder: where it is.
        config: the model's `config.json`; empty where there is none.
        index: the index file as it is; None for a single file.
        headers: of each file, in the order of the shards.
        stamps: of the versions whose headers were read.
        places: of every tensor.
    """

    folder: Path
    config: dict[str, Any]
    index: bytes | None
    headers: dict[str, Header]
    stamps: dict[str, Stamp]
    places: dict[str, Place]

    def raw_header(self, file: str) -> bytes:
        """The bytes of a file before its data."""
        with open_regular(self.folder, file) as (descriptor, status):
            data = sum(info.nbytes for info in self.headers[file].tensors.values())
            return read_up_to(descriptor, status.st_size - data)


def open_shards(folder: str | os.PathLike[str]) -> ModelShards:
    """Read the headers of a local checkpoint folder.

    Raises:
        AdapterNotFoundError: there is no such folder, or a file is missing.
        AdapterFormatError: a file is damaged, or the index and the files do not agree.
        UnsupportedError: the weights are in another format.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise AdapterNotFoundError(f"{path}: not a folder; a checkpoint is a folder with {SINGLE} or {INDEX}")
    files, index = _files(path)
    headers: dict[str, Header] = {}
    stamps: dict[str, Stamp] = {}
    places: dict[str, Place] = {}
    twice: list[str] = []
    for file in files:
        headers[file], stamps[file] = _header(path, file)
        for name, begin in headers[file].places(stamps[file][2]).items():
            twice += [name] * (name in places)
            places[name] = Place(file, begin, headers[file].tensors[name])
    _check_index(path, index, places, twice)
    raw = read_small(path, CONFIG, _MAX_CONFIG) if present(path, CONFIG) else b"{}"
    config = strict_json.loads(raw, where=str(path / CONFIG), max_bytes=_MAX_CONFIG)
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path / CONFIG}: holds a {type(config).__name__}, wanted an object")
    return ModelShards(path, config, None if index is None else index.raw, headers, stamps, places)


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's files of weights as its index says, whether or not they are there.

    Raises:
        AdapterFormatError: the index is damaged.
    """
    return _read_index(folder).files if present(folder, INDEX) else [SINGLE]


class _Index(NamedTuple):
    raw: bytes
    weight_map: dict[str, str]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def _files(path: Path) -> tuple[list[str], _Index | None]:
    if present(path, SINGLE):
        return [SINGLE], None
    if present(path, INDEX):
        index = _read_index(path)
        files = index.files
        absent = [file for file in files if not present(path, file)]
        if absent:
            raise AdapterNotFoundError(
                bullet_list(
                    f"{path}: the index names files that are not there", absent, "Download them again."
                )
            )
        return files, index
    others = sorted(name for name in os.listdir(path) if name.endswith(_OTHER))  # noqa: PTH208 - names are enough
    if others:
        raise UnsupportedError(
            f"{path}: has {others[:3]} and no {SINGLE}; only safetensors can be read in place: load the model with "
            "transformers and save it with save_pretrained() first"
        )
    raise AdapterNotFoundError(f"{path}: has neither {SINGLE} nor {INDEX}; is it the folder of a model?")


def _read_index(path: Path) -> _Index:
    raw = read_small(path, INDEX, _MAX_INDEX)
    content = strict_json.loads(raw, where=str(path / INDEX), max_bytes=_MAX_INDEX, max_depth=8)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    plain = isinstance(weight_map, dict) and all(
        isinstance(name, str) and PurePath(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    )
    if not plain or not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFormatError(
            f"{path / INDEX}: wanted a weight_map from tensors to safetensors files beside it"
        )
    return _Index(raw, weight_map)


def _header(folder: Path, file: str) -> tuple[Header, Stamp]:
    with open_regular(folder, file) as (descriptor, status):
        read = partial(read_up_to, descriptor)
        return parse_header(read, status.st_size, str(folder / file), ALL_DTYPES), stamp_of(status)


def _check_index(path: Path, index: _Index | None, places: Mapping[str, Place], twice: list[str]) -> None:
    wanted = {} if index is None else index.weight_map
    wrong = [f"{name}: is in two files" for name in twice]
    wrong += [
        f"{name}: is not in {file}, where the index says it is"
        for name, file in wanted.items()
        if name not in places or places[name].file != file
    ]
    if wrong:
        raise AdapterFormatError(
            bullet_list(f"{path}: its files do not agree", wrong[:10], "Copy or download it again.")
        )


class ShardReader:
    """Reads bytes of a checkpoint's files; each file is opened once.

    Raises:
        AdapterFormatError: from any method, when a file is not the one whose header was read.
    """

    def __init__(self, shards: ModelShards) -> None:
        self._shards = shards
        self._open: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def descriptor(self, file: str) -> int:
        """An open descriptor of a file."""
        if file not in self._open:
            if len(self._open) >= 64:  # experts may be spread over many shards
                self.__exit__()
            folder = self._shards.folder
            descriptor, status = self._stack.enter_context(open_regular(folder, file))
            if stamp_of(status) != self._shards.stamps[file]:
                raise AdapterFormatError(f"{folder / file}: changed since it was opened; start again")
            self._open[file] = descriptor
        return self._open[file]

    def read_into(self, memory: memoryview, file: str, begin: int) -> None:
        """Fill memory with the bytes from `begin` on."""
        opened = FileIO(self.descriptor(file), closefd=False)
        opened.seek(begin)
        done = 0
        while done < len(memory):
            count = opened.readinto(memory[done:])
            if not count:
                raise AdapterFormatError(f"{self._shards.folder / file}: cut while it was read; start again")
            done += count
