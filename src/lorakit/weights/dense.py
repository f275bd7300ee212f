"""Dense floating-point weights: `nn.Linear` (out, in) and the `Conv1D` of transformers (in, out)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.ops import merge_delta
from lorakit.weights.codec import WeightState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.types import Factors


def conv1d_class() -> type[nn.Module] | None:
    """Transformers' `Conv1D`, where transformers has been imported: an object of it implies that it has."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return None if utils is None else utils.Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


class DenseCodec:
    """A weight that is one floating-point matrix in a plain parameter."""

    name = "dense"
    can_write = True

    def owns(self, base: nn.Module) -> bool:
        """A Linear or Conv1D whose weight is a plain floating-point matrix."""
        weight = getattr(base, "weight", None)
        return (
            (isinstance(base, nn.Linear) or is_conv1d(base))
            and type(weight) is nn.Parameter
            and weight.ndim == 2
            and weight.dtype in {torch.float64, torch.float32, torch.bfloat16, torch.float16}
        )

    def transposed(self, base: nn.Module) -> bool:
        """Conv1D stores (in, out)."""
        return is_conv1d(base)

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """(out, in), from the weight itself."""
        rows, columns = self._weight(base).shape
        return (columns, rows) if self.transposed(base) else (rows, columns)

    def read(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """A fresh (out, in) copy."""
        weight = self._weight(base).detach()
        return (weight.T if self.transposed(base) else weight).to(dtype, copy=True)

    def state(self, base: nn.Module) -> WeightState:
        """The weight and the bias."""
        return WeightState(self._weight(base), self._bias(base))

    def encode(self, base: nn.Module, W: Tensor) -> WeightState:
        """`W` in the dtype and layout of the base weight."""
        old = self._weight(base)
        new = (W.T if self.transposed(base) else W).to(old, copy=True).contiguous()
        return WeightState(nn.Parameter(new, requires_grad=old.requires_grad), self._bias(base))

    @torch.no_grad()
    def merged(self, base: nn.Module, state: WeightState, factors: Sequence[Factors]) -> WeightState:
        """W + sum of the deltas; the bias takes the biases of the factors."""
        weight, bias = state
        new = merge_delta(weight.detach(), factors, transposed=self.transposed(base))
        parts = [part.bias.double() * part.scaling for part in factors if part.bias is not None]
        if parts and bias is not None:
            total = (bias.double() + torch.stack(parts).sum(dim=0)).to(bias.dtype)
            bias = nn.Parameter(total, requires_grad=bias.requires_grad)
        return WeightState(nn.Parameter(new, requires_grad=weight.requires_grad), bias)

    def swap(self, base: nn.Module, state: WeightState) -> WeightState:
        """Exchange the parameter objects."""
        old = self.state(base)
        base.weight = state.weight
        if state.bias is not None:
            base.bias = state.bias
        return old

    @staticmethod
    def _weight(base: nn.Module) -> nn.Parameter:
        weight = base.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @staticmethod
    def _bias(base: nn.Module) -> nn.Parameter | None:
        bias = base.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias
