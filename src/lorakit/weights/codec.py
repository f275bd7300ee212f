"""The contract between an adapter and the weight it changes.

A codec knows one way of storing a weight. It takes the base module only, keeps no state, and never touches
the module except in `swap`, which replaces references: the tensors that were there are handed back
untouched, so that putting them back restores the very bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from lorakit.layouts import Layout
    from lorakit.ops import MergeInPlace
    from lorakit.types import Factors


class WeightState(NamedTuple):
    """What holds a base module's weight and bias, as `swap` takes and gives it."""

    weight: nn.Parameter
    bias: nn.Parameter | None = None
    groups: int | None = None
    """Of a convolution, whose merged weight may need to be ungrouped; None elsewhere."""
    more: Any = None
    """What else a quantised base keeps of its weight, as its codec alone knows it."""
    spent: bool = False
    """Nobody needs it any more: what is made of it may lie where it lies."""
    pending: MergeInPlace | None = None
    """What is still to be written into the weight, of a merged state that lies where a spent one lay."""
    error: float = 0.0
    """Of a merged state on a grid: what rounding to the grid took from the change, relative to the change."""


class WeightCodec(Protocol):
    """How one kind of base module stores its weight."""

    @property
    def name(self) -> str:
        """Short name, for messages and status reports."""

    @property
    def names(self) -> tuple[str, str]:
        """What the module calls its weight and its bias."""

    @property
    def can_read(self) -> bool:
        """Whether `read` works; otherwise the base serves training and inference of what need not know its weight."""

    @property
    def can_write(self) -> bool:
        """Whether `encode`, `merged` and `swap` work; otherwise the base serves training and inference only."""

    @property
    def on_grid(self) -> bool:
        """Whether the weight is quantised, so that what is written is rounded to a grid of its own.

        The state's `weight` is then no floating-point array that others could compute with.
        """

    def owns(self, base: nn.Module) -> bool:
        """Whether this codec is the one for `base`."""

    def layout(self, base: nn.Module) -> Layout:
        """The shapes of the weight and of factors for it, and whether it is stored (in, out)."""

    def dtype(self, base: nn.Module) -> torch.dtype:
        """The floating dtype of the numbers that the weight stands for."""

    def gives_fresh(self, base: nn.Module) -> bool:
        """Whether calling `base` returns a tensor that nobody keeps, neither `base` nor the gradient of the call."""

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:
        """Hang hooks on a base whose own forward rewrites its weight, so that it can be read and differentiated after.

        They stay while the base carries adapters; most bases need none.
        """

    def read(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """The weight as a fresh tensor of `dtype`: (out, in), of experts (experts, out, in).

        A convolution's kernel counts into `in`; a grouped one's has in / groups columns. The weight is what `base`
        holds now, or what it holds in another `state` of it.
        """

    def peek(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """As `read`, but not to be written into: where nothing need be computed it is the base's own memory."""

    def state(self, base: nn.Module) -> WeightState:
        """The parameters that `base` holds now, themselves, not copies."""

    def encode(self, base: nn.Module, W: Tensor) -> WeightState:
        """What `swap` needs to give `base` the weight `W`, shaped as `read` gives it."""

    def merged(
        self,
        base: nn.Module,
        state: WeightState,
        adapters: Sequence[Sequence[Factors]],
        rows: Tensor | None = None,
    ) -> WeightState:
        """`state` with the deltas of every adapter's blocks added, accumulated in fp32 and rounded once.

        Of a `spent` state it may be the same parameter, with the sum still to be written into it (`pending`).

        `base` itself is only asked how it stores a weight. `rows`, (out,), multiplies each output's row of the former
        weight (not of the deltas, and no bias) first: adapters that rescale the weight (DoRA) need it.
        """

    def swap(self, base: nn.Module, state: WeightState) -> WeightState:
        """Install `state` and return the one that was there."""

    def moved(self, base: nn.Module, state: WeightState) -> WeightState:
        """A state that was kept aside, brought to where `base` was moved meanwhile; itself where it was not."""
