"""A bare floating-point parameter of a module that is no layer by itself, such as a stack of expert matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lorakit.layouts import Layout, matrix_layout
from lorakit.weights.codec import WeightState
from lorakit.weights.dense import add_to, is_dense
from lorakit.weights.follow import follow

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lorakit.types import Factors


@dataclass(frozen=True)
class ParameterCodec:
    """The parameter of a given name: (out, in), or (experts, out, in), or (experts, in, out).

    Which of the last two it is, a module says by an attribute `is_transposed`, as those of transformers do; without
    one the parameter counts as (experts, out, in). For an adapter the difference is a name: its delta has the shape of
    the parameter either way.

    Args:
        attribute: the parameter's name in its module.
    """

    attribute: str
    name = "dense"
    can_read = can_write = True
    on_grid = False

    @property
    def names(self) -> tuple[str, str]:
        """The parameter's name; it has no bias."""
        return self.attribute, ""

    def owns(self, base: nn.Module) -> bool:
        """A module with a plain floating-point parameter of this name and two or three dimensions."""
        weight = base._parameters.get(self.attribute)
        return weight is not None and is_dense(weight) and weight.ndim in {2, 3}

    def layout(self, base: nn.Module) -> Layout:
        """From the parameter's dimensions and the module's `is_transposed`."""
        shape = self._weight(base).shape
        if len(shape) == 2:
            return matrix_layout(*shape)
        experts, rows, columns = shape
        if getattr(base, "is_transposed", False):
            return Layout(columns, (rows,), experts=experts, transposed=True)
        return Layout(rows, (columns,), experts=experts)

    def dtype(self, base: nn.Module) -> torch.dtype:
        """Of the parameter."""
        return self._weight(base).dtype

    def gives_fresh(self, base: nn.Module) -> bool:  # noqa: ARG002
        """Not known: the module computes as it likes."""
        return False

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def read(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """A fresh copy, (out, in) or (experts, out, in)."""
        return self._matrices(base, state).to(dtype, copy=True)

    def peek(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """The parameter's own memory where it has this dtype."""
        return self._matrices(base, state).to(dtype)

    def state(self, base: nn.Module) -> WeightState:
        """The parameter."""
        return WeightState(self._weight(base))

    def encode(self, base: nn.Module, W: Tensor) -> WeightState:
        """`W` in the dtype and layout of the parameter."""
        old = self._weight(base)
        stored = (W.mT if self.layout(base).transposed else W).to(old, copy=True).contiguous()
        return WeightState(nn.Parameter(stored, requires_grad=old.requires_grad))

    def merged(
        self,
        base: nn.Module,
        state: WeightState,
        adapters: Sequence[Sequence[Factors]],
        rows: Tensor | None = None,
    ) -> WeightState:
        """W + sum of the deltas, expert by expert."""
        return add_to(self.layout(base), state, adapters, rows)

    def swap(self, base: nn.Module, state: WeightState) -> WeightState:
        """Exchange the parameter objects."""
        old = self.state(base)
        setattr(base, self.attribute, state.weight)
        return old

    def moved(self, base: nn.Module, state: WeightState) -> WeightState:
        """The same parameter, on the device and in the dtype of the one in its place."""
        follow(state.weight, self._weight(base))
        return state

    def _matrices(self, base: nn.Module, state: WeightState | None) -> Tensor:
        """What is held, (out, in) or (experts, out, in)."""
        weight = (self._weight(base) if state is None else state.weight).detach()
        return weight.mT if self.layout(base).transposed else weight

    def _weight(self, base: nn.Module) -> nn.Parameter:
        weight = base._parameters[self.attribute]
        assert weight is not None
        return weight
