"""Weights of torchao: `nn.Linear` whose weight is a tensor subclass that knows how it is quantised."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.weights.quantised import QuantisedCodec, Stored, imported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


def _like_int8(old: Any, W: Tensor) -> Any:
    kind = type(old)
    new = kind.from_hp(W, _blocks(old), _mapping(old), reduce_range=old.reduce_range)
    return kind(
        new.qdata,
        new.scale,
        new.block_size,
        old.dtype,
        zero_point=new.zero_point if old.zero_point is not None else None,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )


def _like_intx(old: Any, W: Tensor) -> Any:
    new = type(old).from_hp(
        W,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )
    return new.to(old.dtype)


def _like_float8(old: Any, W: Tensor) -> Any:
    return type(old).from_hp(
        W.to(old.dtype),  # its dtype is that of what it is made from
        old.qdata.dtype,
        _blocks(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


REQUANTISERS: Mapping[str, Callable[[Any, Tensor], Any]] = {
    "Int8Tensor": _like_int8,
    "IntxUnpackedToInt8Tensor": _like_intx,
    "Float8Tensor": _like_float8,
}
"""How a weight is put on the grid of another one, by the class of that one. Another kind of weight is one more row."""


@dataclass(frozen=True)
class TorchaoCodec(QuantisedCodec):
    """A weight of one of the classes of `REQUANTISERS`, or one that can be read alone.

    Args:
        can_write: which of the two.
    """

    can_write: bool = True
    name = "torchao"
    names = ("weight", "bias")

    def owns(self, base: nn.Module) -> bool:
        """A linear layer with a weight that dequantises, and whose input is not scaled first (AWQ, SmoothQuant)."""
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Linear) or not is_torchao(weight) or not reads(weight):
            return False
        return self.can_write == (type(weight).__name__ in REQUANTISERS)

    def dtype(self, base: nn.Module) -> torch.dtype:
        """The one that the tensor claims, in which it dequantises."""
        return base.weight.dtype  # type: ignore[return-value]

    def gives_fresh(self, base: nn.Module) -> bool:  # noqa: ARG002
        """Not known: each class computes in its own way."""
        return False

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """Of the tensor."""
        rows, columns = self.held(base).weight.shape
        return rows, columns

    def held(self, base: nn.Module) -> Stored:
        """The tensor, which holds all."""
        return Stored(base.weight)  # type: ignore[arg-type]

    def hold(self, base: nn.Module, stored: Stored) -> None:
        """The tensor is all."""
        base.weight = stored.weight

    def dequantised(self, stored: Stored) -> Tensor:
        """In the dtype of the base, to which its forward rounds too."""
        dense: Tensor = stored.weight.detach().dequantize()
        return dense.float()

    def quantised(self, base: nn.Module, W: Tensor) -> Stored:
        """By the class of the weight."""
        old = self.held(base).weight
        return Stored(nn.Parameter(REQUANTISERS[type(old).__name__](old, W), requires_grad=False))

    def at(self, stored: Stored, device: torch.device) -> Stored:
        """By the class of the weight."""
        return Stored(nn.Parameter(stored.weight.detach().to(device), requires_grad=False))

    def bias_dtype(self, bias: Tensor) -> torch.dtype:
        """As it is: the weight is multiplied in its dtype."""
        return bias.dtype


def is_torchao(weight: object) -> bool:
    """Whether a weight is one of torchao's tensors."""
    kind = imported("torchao.utils", "TorchAOBaseTensor")
    return kind is not None and isinstance(weight, kind)


def reads(weight: Any) -> bool:
    """Whether one of torchao's tensors says what it stands for. One whose input is scaled first (AWQ) does not."""
    knows = "dequantize" in {name for kind in type(weight).__mro__[:-2] for name in vars(kind)}
    return knows and getattr(weight, "act_pre_scale", None) is None


def _blocks(old: Any) -> Any:
    """The granularity that gives the same blocks."""
    return sys.modules["torchao.quantization.granularity"].PerBlock(tuple(old.block_size))


def _mapping(old: Any) -> Any:
    kinds = sys.modules["torchao.quantization.quant_primitives"].MappingType
    off_centre = old.zero_point is not None and bool((old.zero_point != 0).any())
    return kinds.ASYMMETRIC if off_centre else kinds.SYMMETRIC
