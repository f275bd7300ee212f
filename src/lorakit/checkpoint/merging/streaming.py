"""Writing one file of a merged checkpoint: a tile at a time, and untouched bytes by the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.checkpoint.atomic import write_all
from lorakit.checkpoint.copying import copy_bytes
from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.merging.fitting import FLOATS
from lorakit.checkpoint.merging.scratch import Scratch
from lorakit.checkpoint.merging.tiles import Ready, converted, rounded
from lorakit.errors import AdapterFormatError
from lorakit.ops import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorakit.checkpoint.merging.changes import Change
    from lorakit.checkpoint.merging.output import OutFile, OutTensor, Segment
    from lorakit.checkpoint.merging.scratch import Memory
    from lorakit.checkpoint.merging.weight import Weight, WeightReader
    from lorakit.checkpoint.shards import ModelShards, ShardReader

_AT_ONCE = 1 << 20  # elements that are converted at a time
_COPIED = 1 << 28  # bytes that are copied between two reports


class Streamer:
    """Writes files; the tensors of one change at a time are in memory.

    Args:
        shards: the base.
        reader: of its bytes.
        weights: of its weights.
        told: is called with the number of bytes that were written, again and again.
    """

    def __init__(
        self, shards: ModelShards, reader: ShardReader, weights: WeightReader, told: Callable[[int], None]
    ) -> None:
        self._shards, self._reader, self._weights, self._told = shards, reader, weights, told
        self._last: Ready | None = None
        self._change: Change | None = None
        self._memory = Scratch()

    def write(self, file: OutFile, descriptor: int) -> None:
        """Write a whole file to a descriptor.

        Raises:
            NonFiniteError, AdapterFormatError, OSError: the file is not whole.
        """
        write_all(descriptor, file.header)
        self._told(len(file.header))
        for tensor in file.tensors:
            done, total = 0, tensor.source.count
            for segment in tensor.segments:
                self._copy(tensor, done, segment.begin - done, descriptor)
                self._merge(tensor, segment, descriptor)
                done = segment.begin + segment.count
            self._copy(tensor, done, total - done, descriptor)

    def _put(self, tensor: torch.Tensor, descriptor: int) -> None:
        data = raw_bytes(tensor)  # which lives no longer than the tensor
        write_all(descriptor, data)
        self._told(len(data))

    def _merge(self, tensor: OutTensor, segment: Segment, descriptor: int) -> None:
        for tile in self._ready(segment.change).tiles(segment.offset, segment.count):
            values = rounded(tile.values, tensor.info.dtype, tensor.name, self._memory)
            self._put(values.contiguous(), descriptor)

    def _ready(self, change: Change) -> Ready:
        # experts that lie in several tensors share one change
        if self._last is None or self._change is not change:
            self._last = None  # before the next one is read
            self._last, self._change = Ready(change, self._weights, memory=self._memory), change
        return self._last

    def _copy(self, tensor: OutTensor, begin: int, count: int, descriptor: int) -> None:
        if tensor.info.dtype == tensor.source.dtype:
            self._copy_bytes(tensor.source, begin, count, descriptor)
            return
        assert tensor.source.dtype in FLOATS
        for start in range(begin, begin + count, _AT_ONCE):
            here = min(_AT_ONCE, begin + count - start)
            part = self._weights.elements(tensor.source, start, here, self._memory)
            self._put(_in_dtype(part, tensor, self._memory), descriptor)

    def _copy_bytes(self, source: Weight, begin: int, count: int, descriptor: int) -> None:
        size, passed = source.dtype.itemsize, 0
        for piece in source.pieces:
            low, high = max(begin, passed), min(begin + count, passed + piece.count)
            place = self._shards.places[piece.tensor]
            first = place.begin + (piece.begin + low - passed) * size
            last = first + (high - low) * size
            for start in range(first, last, _COPIED):
                length = min(_COPIED, last - start)
                try:
                    copy_bytes(self._reader.descriptor(place.file), start, length, descriptor)
                except EOFError:
                    where = self._shards.folder / place.file
                    raise AdapterFormatError(f"{where}: cut while it was read; start again") from None
                self._told(length)
            passed += piece.count


def _in_dtype(part: torch.Tensor, tensor: OutTensor, memory: Memory) -> torch.Tensor:
    """Untouched numbers in another dtype; those that are finite must stay so."""
    if is_finite(part):
        return rounded(part, tensor.info.dtype, tensor.name, memory)
    return converted(part, tensor.info.dtype, memory)
