"""A merge of one layer that has been computed and is not yet installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from lorakit.errors import NonFiniteError, UnsupportedError
from lorakit.layers.factors import plain_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from lorakit.layers.merging import MergingLayer
    from lorakit.weights import WeightCodec, WeightState


class PreparedMerge(NamedTuple):
    """A merge of one layer, computed and checked but not yet installed."""

    layer: MergingLayer
    names: tuple[str, ...]
    state: WeightState
    plain: nn.Module | None = None
    """A layer in full precision that holds the state in the base's stead, or None."""

    @property
    def error(self) -> float | None:
        """What quantising again lost, relative to the change; None where nothing was quantised."""
        return self.state.error if self.layer.codec.on_grid and self.plain is None else None


class Aside(NamedTuple):
    """A base that another layer stands in for while adapters are merged into that one. Not registered as a child."""

    base: nn.Module
    plain: nn.Module


def standing_in(state: WeightState, *, training: bool) -> nn.Module:
    """A plain linear layer in full precision that holds a state, frozen."""
    plain = plain_linear(state.weight, state.bias)
    plain.requires_grad_(requires_grad=False)
    plain.training = training
    return plain


def refuse_writing(codec: WeightCodec, base: nn.Module) -> NoReturn:
    """The error of a merge into a weight that cannot be written, or not even be read."""
    codec.read(base, torch.float32)  # says so itself
    raise UnsupportedError(
        f"cannot quantise a {codec.name} weight again ({type(base).__name__}); merge with dequantize=True, "
        "which leaves the layer in full precision, or keep the adapter unmerged"
    )


def non_finite(names: Sequence[str], culprits: Sequence[str]) -> NonFiniteError:
    """The error of a merge of these adapters, some of which are to blame by themselves."""
    what = f"adapter {culprits} holds NaN or infinity" if culprits else "the sum overflows the base's dtype"
    return NonFiniteError(f"merging {list(names)} would give NaN or infinity: {what}; nothing was changed")


def as_tensor(value: float | Tensor) -> Tensor:
    """A scaling as a tensor, so that it can be checked with the tensors of its adapter."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)
