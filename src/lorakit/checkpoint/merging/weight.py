"""A weight of a model, as ranges of the tensors of a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.digest import raw_bytes
from lorakit.checkpoint.merging.scratch import Scratch, fresh

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.checkpoint.merging.scratch import Memory
    from lorakit.checkpoint.shards import ModelShards, ShardReader


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of one tensor of a checkpoint: its name, the first of them, and how many."""

    tensor: str
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of a model: its elements one after another are those of the pieces.

    Attributes:
        name: in the model.
        shape: in the model.
        dtype: of the pieces.
        pieces: one, as a rule; several where a model stacks or fuses what the checkpoint holds apart.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


class WeightReader:
    """Reads elements of weights."""

    def __init__(self, shards: ModelShards, reader: ShardReader) -> None:
        self._shards = shards
        self._reader = reader

    def elements(self, weight: Weight, begin: int, count: int, memory: Memory = fresh) -> Tensor:
        """(count,) elements from `begin` on, in the dtype of the checkpoint; in fresh memory unless other is given."""
        found = memory("read", count, weight.dtype)
        data, size = raw_bytes(found), weight.dtype.itemsize
        passed = done = 0
        for piece in weight.pieces:
            start, stop = max(begin, passed), min(begin + count, passed + piece.count)
            if start < stop:
                place = self._shards.places[piece.tensor]
                offset = place.begin + (piece.begin + start - passed) * size
                part = data[done * size : (done + stop - start) * size]
                self._reader.read_into(part, place.file, offset)
                done += stop - start
            passed += piece.count
        assert done == count, f"{weight.name}: elements {begin}.. +{count} of {passed}"
        return found

    def whole(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """The weight in its shape and another dtype, with no second copy of it at any time."""
        found = torch.empty(weight.count, dtype=dtype)
        memory = Scratch()
        for begin in range(0, weight.count, _AT_ONCE):
            part = self.elements(weight, begin, min(_AT_ONCE, weight.count - begin), memory)
            found[begin : begin + len(part)] = part
        return found.view(weight.shape)


_AT_ONCE = 1 << 22
