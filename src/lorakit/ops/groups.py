"""Who gets which adapter in a mixed batch: read once for a forward, shared by every layer.

What a kernel needs beyond the ids (an order by adapter, masks, indices) is made when first asked for and kept, so a
model of many layers makes each of them once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import AdapterNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class Blocks(NamedTuple):
    """The samples of a batch dealt out into blocks of equally many samples that share an adapter.

    A block that is not full repeats its first sample. With `take` None the batch is such a sequence of blocks as it is.
    """

    owners: tuple[int, ...]
    """The adapter of each block; `count` for base alone."""
    owner: Tensor
    """The same, (blocks,) int64 on the device."""
    size: int
    """Samples in a block."""
    take: Tensor | None
    """Which sample stands at each place, (blocks * size,) int64."""
    back: Tensor | None
    """The place of each adapted sample, int64, in the order of `active`."""
    active: Tensor | None
    """The adapted samples in ascending order, int64; None when all are."""
    real: Tensor | None
    """Whether a place holds its sample and not a repetition, (blocks * size,) bool; None when all do."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Which adapter each sample of a batch goes through.

    Attributes:
        ids: (N,) int64 on the device: the adapter of each sample, -1 for the base alone.
        samples: the same numbers on the host.
        count: how many adapters there are to choose from.
    """

    ids: Tensor
    samples: tuple[int, ...]
    count: int
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def make(ids: Sequence[int], count: int, device: torch.device | str) -> Groups:
        """Groups of `len(ids)` samples over `count` adapters.

        Args:
            ids: one number for each sample: 0 to `count - 1`, or -1 for the base alone.
            count: the number of adapters in the bank.
            device: where the inputs of the layers live.

        Raises:
            AdapterNameError: an id is none of these.
        """
        samples = tuple(ids)
        wrong = sorted({i for i in samples if not -1 <= i < count})
        if wrong:
            raise AdapterNameError(
                f"mixed batch: adapter ids {wrong}; there are {count} adapters, -1 is the base"
            )
        return Groups(torch.tensor(samples, dtype=torch.int64, device=device), samples, count)

    def on(self, device: torch.device) -> Groups:
        """The same groups for inputs on `device`; made once for each device."""
        if self.ids.device == device:
            return self
        moved: Groups = self.once(device, lambda: Groups(self.ids.to(device), self.samples, self.count))
        return moved

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when this key was first asked for."""
        made = self._made
        if key not in made:
            made[key] = make()
        return made[key]

    @property
    def counts(self) -> dict[int, int]:
        """How many samples each adapter in use has, by ascending adapter."""
        counts: dict[int, int] = self.once("counts", self._count)
        return counts

    def _count(self) -> dict[int, int]:
        found = Counter(self.samples)
        return {i: found[i] for i in sorted(found) if i >= 0}

    @property
    def used(self) -> tuple[int, ...]:
        """The adapters that some sample goes through, ascending."""
        used: tuple[int, ...] = self.once("used", lambda: tuple(self.counts))
        return used

    @property
    def has_base_only(self) -> bool:
        """Whether some sample goes through no adapter."""
        some: bool = self.once("base only", lambda: -1 in self.samples)
        return some

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbours with the same adapter: (first sample, sample after the last, adapter), base alone left out."""
        runs: tuple[tuple[int, int, int], ...] = self.once("runs", self._runs)
        return runs

    def _runs(self) -> tuple[tuple[int, int, int], ...]:
        found, start = [], 0
        for adapter, members in groupby(self.samples):
            stop = start + sum(1 for _ in members)
            if adapter >= 0:
                found.append((start, stop, adapter))
            start = stop
        return tuple(found)

    @property
    def slots(self) -> Tensor:
        """(N,) int64: the ids with `count` in the place of -1, an index into tables whose last row is zero."""
        slots: Tensor = self.once("slots", lambda: torch.where(self.ids < 0, self.count, self.ids))
        return slots

    @property
    def order(self) -> Tensor:
        """(N,) int64: the samples sorted by adapter, base alone first; samples of one adapter keep their order."""
        order: Tensor = self.once("order", lambda: self._index(self._order()))
        return order

    def _order(self) -> list[int]:
        return sorted(range(len(self.samples)), key=self.samples.__getitem__)

    def blocks(self, size: int) -> Blocks:
        """The samples in blocks of `size`; size 1 takes the batch as it is, base-only samples included."""
        blocks: Blocks = self.once(
            ("blocks", size), lambda: self._single() if size == 1 else self._dealt(size)
        )
        return blocks

    def _single(self) -> Blocks:
        owners = tuple(self.count if i < 0 else i for i in self.samples)
        return Blocks(owners, self.slots, 1, None, None, None, None)

    def in_place(self, size: int) -> bool:
        """Whether the batch is blocks of `size` as it is: equally many neighbours of each adapter, and no others."""
        return not self.has_base_only and all(stop - start == size for start, stop, _ in self.runs)

    def _dealt(self, size: int) -> Blocks:
        if self.in_place(size):
            adapters = [adapter for _, _, adapter in self.runs]
            return Blocks(tuple(adapters), self._index(adapters), size, None, None, None, None)
        members: dict[int, list[int]] = {i: [] for i in self.used}
        for sample, adapter in enumerate(self.samples):
            if adapter >= 0:
                members[adapter].append(sample)
        owners, take, real = [], [], []
        for adapter, own in members.items():
            for start in range(0, len(own), size):
                part = own[start : start + size]
                spare = size - len(part)
                owners.append(adapter)
                take += part + part[:1] * spare
                real += [True] * len(part) + [False] * spare
        total = len(self.samples)
        place = {sample: at for at, sample in enumerate(take) if real[at]}
        active = sorted(place)
        return Blocks(
            tuple(owners),
            self._index(owners),
            size,
            self._index(take),
            self._index([place[sample] for sample in active]),
            self._index(active) if len(active) < total else None,
            None if all(real) else torch.tensor(real, device=self.ids.device),
        )

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.ids.device)
