"""What layers share for batches whose samples go through different adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.ops import Bank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorakit.layers.chosen import Chosen
    from lorakit.ops import Term


class BankKeeper:
    """Keeps the stacked factors of the last mixed batch, while nobody trains or changes them."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[str, ...], Bank] | None = None

    def bank(self, names: tuple[str, ...], terms: Sequence[Term]) -> Bank:
        """The factors of these adapters, stacked."""
        if torch.is_grad_enabled():
            return Bank.stack(terms)
        kept = self._kept
        if kept is not None and kept[0] == names and kept[1].is_current(terms):
            return kept[1]
        made = Bank.stack(terms)
        self._kept = (names, made)
        return made

    def clear(self) -> None:
        """Let the kept factors go."""
        self._kept = None

    def __reduce__(self) -> tuple[type[BankKeeper], tuple[()]]:
        return BankKeeper, ()  # copies and pickles of a layer begin without any


def rows_by_sample(
    y: Tensor,
    chosen: Chosen,
    names: tuple[str, ...],
    x: Tensor,
    replace: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """Y with the token rows of each sample's own adapter in place.

    Args:
        y: (samples, ..., out), what the base gave.
        chosen: who goes through what.
        names: the chosen adapters that the layer has.
        x: (samples, ...), the layer's input.
        replace: y with the rows of one adapter in place, for all samples.
    """
    groups = chosen.groups(names, x.shape[0], x.device)
    for number, name in enumerate(names):
        mine = (groups.ids == number).view(-1, *(1,) * (y.ndim - 1))
        y = torch.where(mine, replace(y, name), y)
    return y
