"""Reading a merged checkpoint back: a sample of it, computed again in fp64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.merging.tiles import Ready
from lorakit.checkpoint.merging.weight import WeightReader
from lorakit.checkpoint.shards import ShardReader, open_shards
from lorakit.errors import AdapterFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.merging.changes import Change
    from lorakit.checkpoint.merging.output import OutFile, OutTensor
    from lorakit.checkpoint.shards import ModelShards

_MERGED, _COPIED = 48, 48  # tensors that are looked at, spread over all
_ELEMENTS = 1 << 16  # of each, from the first, a middle and the last of its parts
_DRIFT = 2.0**-16  # of fp32 sums, relative to the largest number beside


class Checked(NamedTuple):
    """What was found.

    Attributes:
        tensors: how many were looked at.
        error: the largest distance of a merged number from the exact one, rounding and all.
        relative: the same relative to the largest number of its sample.
    """

    tensors: int
    error: float
    relative: float


def check_output(
    shards: ModelShards, folder: Path, files: Sequence[OutFile], progress: Callable[[str, int, int], None]
) -> Checked:
    """Compare a sample of merged tensors with W + sum of s B A in fp64, and of copied ones byte for byte.

    Raises:
        AdapterFormatError: a number is further off than rounding takes it, or a copy differs.
    """
    tensors = [tensor for file in files for tensor in file.tensors]
    merged = _spread([tensor for tensor in tensors if tensor.segments], _MERGED)
    copied = _spread([tensor for tensor in tensors if not tensor.segments and tensor.source.pieces], _COPIED)
    written = open_shards(folder)
    errors: list[tuple[float, float]] = [(0.0, 0.0)]
    with ShardReader(shards) as base_bytes, ShardReader(written) as bytes_:
        base = WeightReader(shards, base_bytes)
        judge = _Judge(base)
        for number, tensor in enumerate([*merged, *copied]):
            for begin, count in _samples(tensor):
                place = written.places[tensor.name]
                found = torch.empty(count, dtype=tensor.info.dtype)
                bytes_.read_into(raw_bytes(found), place.file, place.begin + begin * found.itemsize)
                if tensor.segments:
                    errors.append(judge.error(tensor, begin, found))
                elif not _is_same(found, base.elements(tensor.source, begin, count).to(tensor.info.dtype)):
                    raise AdapterFormatError(
                        f"{folder}: {tensor.name} was read back with other bytes; the disk is at fault"
                    )
            progress("verifying", number + 1, len(merged) + len(copied))
    return Checked(len(merged) + len(copied), max(e for e, _ in errors), max(r for _, r in errors))


def _spread(tensors: Sequence[OutTensor], most: int) -> Sequence[OutTensor]:
    step = max(1, len(tensors) / most)
    return [tensors[int(number * step)] for number in range(min(most, len(tensors)))]


def _samples(tensor: OutTensor) -> list[tuple[int, int]]:
    """Ranges of elements: of a merged tensor in the first, a middle and the last of its segments, else at both ends."""
    if not tensor.segments:
        count = min(_ELEMENTS, tensor.source.count)
        return [(0, count), (tensor.source.count - count, count)] if count else []
    chosen = dict.fromkeys((0, len(tensor.segments) // 2, len(tensor.segments) - 1))
    found = []
    for number in chosen:
        begin, length = tensor.segments[number].begin, tensor.segments[number].count
        count = min(_ELEMENTS, length)
        found += [(begin, count)] + [(begin + length - count, count)] * (length > count)
    return [each for each in found if each[1]]


class _Judge:
    """Computes merged numbers again, in fp64; what one change needs is read once."""

    def __init__(self, base: WeightReader) -> None:
        self._base = base
        self._change: Change | None = None
        self._ready: Ready | None = None

    def error(self, tensor: OutTensor, begin: int, found: Tensor) -> tuple[float, float]:
        """The largest error in a sample, and relative to the largest number in it."""
        segment = next(each for each in tensor.segments if each.begin <= begin < each.begin + each.count)
        if self._ready is None or self._change is not segment.change:
            self._ready = None
            self._ready, self._change = Ready(segment.change, self._base, twice=True), segment.change
        offset = segment.offset + begin - segment.begin
        exact = torch.cat([tile.values.double() for tile in self._ready.tiles(offset, len(found))])
        error = (found.double() - exact).abs()
        largest = float(exact.abs().max())
        allowed = exact.abs() * torch.finfo(found.dtype).eps + (
            _DRIFT * largest + torch.finfo(found.dtype).tiny
        )
        if not bool((error <= allowed).all()):
            raise AdapterFormatError(
                f"{tensor.name}: read back with an error of {float(error.max()):.3g} beside numbers up to {largest:.3g}, "
                "more than rounding; the disk or the memory is at fault"
            )
        worst = float(error.max())
        return worst, worst / largest if largest and math.isfinite(largest) else 0.0


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two contiguous tensors have the same bits, NaN and all."""
    return bool(found.view(torch.uint8).equal(wanted.contiguous().view(torch.uint8)))
