"""What most variants have nothing to say to: one class for each such point of the contract, to take or to leave.

A variant that has something to say does not take the class: nothing here is overridden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec
    from lorakit.variants.variant import Held, Start


class FactorsAlone:
    """Has no tensors beside A and B, and begins as the initialiser says."""

    __slots__ = ()

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - the contract's
        """Nothing beside the factors."""
        return {}

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """The factors as initialised."""
        return {"A": start.A, "B": start.B}


class OnAnyWeight:
    """Can be on every weight of its kinds, with every rank."""

    __slots__ = ()

    def why_not(self, path: str, layout: Layout, r: int) -> str:  # noqa: ARG002 - the contract's
        """Any matrix will do."""
        return ""


class LeavesBase:
    """Takes nothing off the base."""

    __slots__ = ()

    def offset(self, spec: AdapterSpec, weight: Callable[[torch.dtype], Tensor]) -> None:
        """Nothing is taken off the base."""


class NoPenalty:
    """Adds nothing to a loss."""

    __slots__ = ()

    def penalty(self, held: Held, kept: Mapping[str, Any], count: int, *, training: bool) -> None:
        """Nothing is added to a loss."""
