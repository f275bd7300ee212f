"""Where the tensors of an opened adapter come from: a safetensors file, or a pickle that the caller allowed.

Both check that the file is still the one that was opened, and give tensors that own their memory: what happens to
the file afterwards changes nothing.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.files import PICKLE_NAME, WEIGHTS_NAME, Stamp, open_regular, stamp_of
from lorakit.checkpoint.header import DTYPE_CODES, TensorInfo
from lorakit.errors import AdapterFormatError, UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import FileIO
    from pathlib import Path

    from torch import Tensor

_AT_ONCE = (
    1 << 20
)  # bytes that are read at once and then taken apart; what is larger is read where it is to be
_ALIGNMENT = 64  # bytes, as of memory that torch allocates
_SAFE_UNPICKLER = (2, 10)  # older releases have known holes in weights_only


class Run(NamedTuple):
    """Tensors that were read at once, all of one dtype.

    Attributes:
        tensors: by name. Each has a storage of its own, so that it can be saved, copied and shared by itself; small ones
            lie in common memory, of a mebibyte at most, which lives as long as any of them.
        values: all their numbers as one tensor: the very same memory.
    """

    tensors: dict[str, Tensor]
    values: Tensor


class Source(Protocol):
    """Gives tensors by name, one after another, contiguous, on the CPU."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    def runs(self, names: Iterable[str]) -> Iterator[Run]:
        """The named tensors, in the given order, as many at once as can be."""
        ...


@dataclass(frozen=True, slots=True)
class SafetensorsSource:
    """The tensors of a safetensors file, whose header has been checked.

    Attributes:
        folder: where the file is.
        stamp: of the version whose header was read.
        tensors: what the header says, in the order of the data.
        places: where in the file each of them begins.
        name: of the file.
    """

    folder: Path
    stamp: Stamp
    tensors: dict[str, TensorInfo]
    places: dict[str, int]
    name: str = WEIGHTS_NAME

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, in the given order; `AdapterFormatError` if the file is no longer the same."""
        for run in self.runs(names):
            yield from run.tensors.items()

    def runs(self, names: Iterable[str]) -> Iterator[Run]:
        """As `read`, several at once."""
        with (
            open_regular(self.folder, self.name) as (descriptor, status),
            os.fdopen(os.dup(descriptor), "rb", buffering=0) as file,
        ):
            self._check(status)
            for together in self._together(names):
                yield self._read_run(file, together)
            self._check(os.fstat(descriptor))
        _check_unchanged(self.folder, self.name, self.stamp)

    def _together(self, names: Iterable[str]) -> Iterator[list[str]]:
        """The names in groups that are read at once: small tensors of one dtype that follow each other in the file."""
        run: list[str] = []
        end, dtype, size = -1, None, 0
        for name in names:
            info, place = self.tensors[name], self.places[name]
            if run and (place != end or info.dtype != dtype or size + info.nbytes > _AT_ONCE):
                yield run
                run, size = [], 0
            run.append(name)
            end, dtype, size = place + info.nbytes, info.dtype, size + info.nbytes
        if run:
            yield run

    def _read_run(self, file: FileIO, names: list[str]) -> Run:
        infos = [self.tensors[name] for name in names]
        dtype, nbytes = infos[0].dtype, sum(info.nbytes for info in infos)
        file.seek(self.places[names[0]])
        if len(names) == 1 or not nbytes:
            tensors = [torch.empty(info.shape, dtype=dtype) for info in infos]
            memory, values = raw_bytes(tensors[0]), tensors[0].view(-1)
        else:
            memory = _aligned(nbytes)
            values = torch.frombuffer(memory, dtype=dtype)
            tensors = _taken_apart(memory, infos)
        if not _fill(file, memory):
            raise AdapterFormatError(f"{self.path}: cut while it was read; open the adapter again")
        return Run(dict(zip(names, tensors, strict=True)), values)

    def _check(self, status: os.stat_result) -> None:
        if stamp_of(status) != self.stamp:
            raise AdapterFormatError(f"{self.path}: changed since it was opened; open the adapter again")


@dataclass(frozen=True, slots=True)
class PickleSource:
    """The tensors of a pickle, through the restricted unpickler only."""

    folder: Path
    stamp: Stamp
    name: str = PICKLE_NAME

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.name

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, in the given order; `AdapterFormatError` if the file is no longer the same."""
        _check_unchanged(self.folder, self.name, self.stamp)
        tensors = _unpickled(self.folder, self.name, "cpu")
        for name in names:
            yield name, tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def runs(self, names: Iterable[str]) -> Iterator[Run]:
        """As `read`; each tensor by itself."""
        for name, tensor in self.read(names):
            yield Run({name: tensor}, tensor.view(-1))


def open_pickle(folder: Path, name: str = PICKLE_NAME) -> tuple[PickleSource, dict[str, TensorInfo]]:
    """List the tensors of a pickle, by default `adapter_model.bin`, without allocating them.

    Raises:
        UnsupportedError: this torch has known holes in its restricted unpickler.
        AdapterFormatError: the file is not a pickled dict of f64, f32, f16 and bf16 tensors and nothing else.
    """
    path = folder / name
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < _SAFE_UNPICKLER:
        raise UnsupportedError(
            f"{path}: reading a pickle needs torch 2.10 or later, this is {torch.__version__}"
        )
    with open_regular(folder, name) as (_, status):
        stamp = stamp_of(status)
    tensors = _unpickled(folder, name, "meta")
    infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    if sum(info.nbytes for info in infos.values()) > status.st_size:
        raise AdapterFormatError(f"{path}: its tensors claim more bytes than the file has; not an adapter")
    return PickleSource(folder, stamp, name), infos


def _aligned(nbytes: int) -> memoryview:
    """Fresh memory, which lives as long as any tensor that is made of it."""
    memory = bytearray(nbytes + _ALIGNMENT)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _ALIGNMENT
    return memoryview(memory)[begin : begin + nbytes]


def _taken_apart(memory: memoryview, infos: list[TensorInfo]) -> list[Tensor]:
    """Tensors that lie in memory one after another, each with a storage of its own: it holds that memory, or none."""
    found, offset = [], 0
    for dtype, shape, nbytes in infos:
        if nbytes:
            count = nbytes // dtype.itemsize
            tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        found.append(tensor)
        offset += nbytes
    return found


def _fill(file: FileIO, memory: memoryview) -> bool:
    """Read until the memory is full; False at the end of the file."""
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            return False
        done += count
    return True


def _check_unchanged(folder: Path, name: str, stamp: Stamp) -> None:
    with open_regular(folder, name) as (_, status):
        if stamp_of(status) != stamp:
            raise AdapterFormatError(f"{folder / name}: changed since it was opened; open the adapter again")


def _unpickled(folder: Path, name: str, device: str) -> dict[str, Tensor]:
    path = folder / name
    try:
        with (
            open_regular(folder, name) as (descriptor, _),
            os.fdopen(os.dup(descriptor), "rb") as file,
        ):
            found: Any = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        raise AdapterFormatError(
            f"{path}: not a pickled dict of tensors ({type(error).__name__}); "
            "ask its author for a safetensors file"
        ) from None
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{path}: holds a {type(found).__name__}, wanted a dict of tensors")
    problems = [
        f"{str(name)[:200]!r}: {_described(value)}"
        for name, value in found.items()
        if not _plain(name, value)
    ]
    if problems:
        raise AdapterFormatError(bullet_list(f"{path}: not all entries are tensors of floats", problems[:10]))
    return found


def _plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dtype in DTYPE_CODES
    )


def _described(value: object) -> str:
    return f"{value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
