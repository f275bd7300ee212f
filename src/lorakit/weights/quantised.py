"""What all quantised weights have in common: they are read in fp32, changed there, and rounded to their grid again.

The error of a merge is measured on what the base will compute with: `|quantised(W + delta) - (W + delta)| / |delta|`
in the Frobenius norm. It is 0 where nothing was lost, and 1 where the adapters might as well not have been merged. It is
never more: a weight that quantising again would take further away than that is left as it was.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from lorakit.layouts import Layout, matrix_layout
from lorakit.ops import is_finite
from lorakit.weights.codec import WeightState
from lorakit.weights.dense import add_biases, add_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lorakit.types import Factors
    from lorakit.weights.codec import WeightCodec


class Stored(NamedTuple):
    """A quantised weight: its parameter, and what else belongs to it."""

    weight: nn.Parameter
    more: Any = None


class QuantisedCodec(ABC):
    """A matrix on a grid that its library can be asked for, and that can be put on that grid again."""

    can_read = can_write = True
    on_grid = True

    # ---- what a final subclass supplies -------------------------------------------------------------

    @property
    @abstractmethod
    def name(self) -> str:
        """As `WeightCodec.name`."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, str]:
        """As `WeightCodec.names`."""

    @abstractmethod
    def owns(self, base: nn.Module) -> bool:
        """As `WeightCodec.owns`."""

    @abstractmethod
    def dtype(self, base: nn.Module) -> torch.dtype:
        """As `WeightCodec.dtype`."""

    @abstractmethod
    def gives_fresh(self, base: nn.Module) -> bool:
        """As `WeightCodec.gives_fresh`."""

    @abstractmethod
    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:
        """As `WeightCodec.guard`."""

    @abstractmethod
    def shape(self, base: nn.Module) -> tuple[int, int]:
        """(out, in) of the weight."""

    @abstractmethod
    def held(self, base: nn.Module) -> Stored:
        """The weight that `base` holds now, itself, not a copy."""

    @abstractmethod
    def hold(self, base: nn.Module, stored: Stored) -> None:
        """Let `base` hold this one."""

    @abstractmethod
    def dequantised(self, stored: Stored) -> Tensor:
        """The numbers that it stands for, (out, in), in fp32 unless the base rounds them to less before it uses them."""

    @abstractmethod
    def quantised(self, base: nn.Module, W: Tensor) -> Stored:
        """W (out, in), fp32, on the grid of `base`: the same settings, new scales."""

    @abstractmethod
    def at(self, stored: Stored, device: torch.device) -> Stored:
        """The same on another device."""

    @abstractmethod
    def bias_dtype(self, bias: Tensor) -> torch.dtype:
        """What a merged bias is kept in."""

    # ---- the contract -------------------------------------------------------------------------------

    def layout(self, base: nn.Module) -> Layout:
        """Of a plain matrix."""
        return matrix_layout(*self.shape(base))

    @torch.no_grad()
    def read(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """The dequantised numbers, fresh."""
        stored = self.held(base) if state is None else Stored(state.weight, state.more)
        return self.dequantised(stored).to(dtype)

    def peek(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """The same: the numbers are nowhere else."""
        return self.read(base, dtype, state)

    def state(self, base: nn.Module) -> WeightState:
        """What is held, and the bias, which need not be a parameter."""
        weight, more = self.held(base)
        return WeightState(weight, cast("nn.Parameter | None", getattr(base, self.names[1])), more=more)

    @torch.no_grad()
    def encode(self, base: nn.Module, W: Tensor) -> WeightState:
        """`W` rounded to the grid."""
        old = self.state(base)
        weight, more = self.quantised(base, W.to(old.weight.device, torch.float32).contiguous())
        return old._replace(weight=weight, more=more)

    @torch.no_grad()
    def merged(
        self,
        base: nn.Module,
        state: WeightState,
        adapters: Sequence[Sequence[Factors]],
        rows: Tensor | None = None,
    ) -> WeightState:
        """W + sum of the deltas in fp32, rounded to the grid; a weight that does not change keeps its very bits.

        So does one that would come out no nearer to the sum than it was. The error is NaN, and nothing is quantised,
        where the sum is not finite.
        """
        before = self.read(base, torch.float32, state)
        wanted = add_blocks(self.layout(base), nn.Parameter(before), adapters, rows).detach()
        change = (wanted - before).norm().item()
        bias = state.bias
        if bias is not None and any(block.bias is not None for blocks in adapters for block in blocks):
            bias = _like(bias, add_biases(nn.Parameter(bias.to(self.bias_dtype(bias))), adapters))
        if change == 0.0:
            return state._replace(bias=bias, error=0.0)
        if not is_finite(wanted):
            return state._replace(error=float("nan"))
        weight, more = self.quantised(base, wanted)
        error = (self.dequantised(Stored(weight, more)) - wanted).norm().item() / change
        if error >= 1.0:
            return state._replace(bias=bias, error=1.0)
        return WeightState(weight, bias, more=more, error=error)

    def swap(self, base: nn.Module, state: WeightState) -> WeightState:
        """Exchange the references."""
        old = self.state(base)
        self.hold(base, Stored(state.weight, state.more))
        setattr(base, self.names[1], state.bias)
        return old

    def moved(self, base: nn.Module, state: WeightState) -> WeightState:
        """On the device where `base` is; a quantised weight has no dtype to follow."""
        device = self.held(base).weight.device
        if state.weight.device == device or device.type == "meta":
            return state
        weight, more = self.at(Stored(state.weight, state.more), device)
        bias = None if state.bias is None else _like(state.bias, state.bias.to(device))
        return state._replace(weight=weight, bias=bias, more=more)


@dataclass(frozen=True)
class InFull:
    """Merges a quantised weight into a floating-point one of the same shape, rounded once.

    Args:
        codec: reads the quantised weight.
        dtype: of the result.
    """

    codec: WeightCodec
    dtype: torch.dtype

    @torch.no_grad()
    def merged(
        self,
        base: nn.Module,
        state: WeightState,
        adapters: Sequence[Sequence[Factors]],
        rows: Tensor | None = None,
    ) -> WeightState:
        """As `WeightCodec.merged`; what it gives does not fit into `base`."""
        before = nn.Parameter(self.codec.read(base, torch.float32, state), requires_grad=False)
        weight = add_blocks(self.codec.layout(base), before, adapters, rows).to(self.dtype)
        bias = None
        if state.bias is not None:
            wide = add_biases(nn.Parameter(state.bias.float(), requires_grad=False), adapters)
            assert wide is not None
            bias = nn.Parameter(wide.to(self.dtype), requires_grad=state.bias.requires_grad)
        return WeightState(nn.Parameter(weight, requires_grad=False), bias)


def imported(module: str, name: str) -> type[Any] | None:
    """A class of a package, where that package has been imported: an object of it implies that it has."""
    return getattr(sys.modules.get(module), name, None)


def _like(bias: Tensor, new: Tensor | None) -> nn.Parameter:
    """A new bias as a parameter, or as a plain tensor where the former one is such."""
    assert new is not None
    if isinstance(bias, nn.Parameter):
        return nn.Parameter(new.detach(), requires_grad=bias.requires_grad)
    return cast("nn.Parameter", new.detach())
