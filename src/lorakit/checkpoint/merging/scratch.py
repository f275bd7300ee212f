"""Memory for numbers that are soon done with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Memory = Callable[[str, int, torch.dtype], Tensor]
    """Gives (count,) numbers of a dtype, not set to anything, for a use that has a name."""


def fresh(_use: str, count: int, dtype: torch.dtype) -> Tensor:
    """Memory of their own, as long as somebody holds it."""
    return torch.empty(count, dtype=dtype)


class Scratch:
    """The same memory for every request of one use, which ends with the next request.

    Fresh memory of a tile's size comes from the kernel, page by page: half of the kernel's time in a merge.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, use: str, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) numbers of a dtype, not set to anything."""
        size = count * dtype.itemsize
        held = self._held.get(use)
        if held is None or len(held) < size:
            held = self._held[use] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype)
