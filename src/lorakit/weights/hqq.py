"""Weights of HQQ (Badri and Shaji, 2023, half-quadratic quantisation): packed integers with scales and zeros in groups."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.weights.quantised import QuantisedCodec, Stored, imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


def is_hqq(module: nn.Module) -> bool:
    """Whether a module is an `HQQLinear`, which is no `nn.Linear`."""
    kind = imported("hqq.core.quantize", "HQQLinear")
    return kind is not None and isinstance(module, kind)


class HqqCodec(QuantisedCodec):
    """`hqq.core.quantize.HQQLinear`; its bias may be a plain tensor."""

    name = "hqq"
    names = ("W_q", "bias")

    def owns(self, base: nn.Module) -> bool:
        """A layer that has been quantised or loaded."""
        return is_hqq(base) and bool(base.ready)

    def dtype(self, base: nn.Module) -> torch.dtype:
        """What it computes in."""
        return base.compute_dtype  # type: ignore[return-value]

    def gives_fresh(self, base: nn.Module) -> bool:
        """Its own forward does; a subclass may do anything."""
        return type(base).__module__.startswith("hqq.")

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """Of the weight that was quantised."""
        meta: Any = base.meta
        rows, columns = meta["shape"]
        return rows, columns

    def held(self, base: nn.Module) -> Stored:
        """The packed integers, and the scales and settings."""
        return Stored(base.W_q, base.meta)  # type: ignore[arg-type]

    def hold(self, base: nn.Module, stored: Stored) -> None:
        """Both go together."""
        base.W_q, base.meta = stored

    def dequantised(self, stored: Stored) -> Tensor:
        """In the dtype that the base computes in, to which its forward rounds too."""
        dense: Tensor = _with(stored).dequantize()
        return dense.float()

    def quantised(self, base: nn.Module, W: Tensor) -> Stored:
        """With the settings that the base was made with, its optimiser of scales among them."""
        made = _empty(base.quant_config, base.compute_dtype, base.device)
        made.quantize(W, **made.quant_config)
        return Stored(made.W_q, made.meta)

    def at(self, stored: Stored, device: torch.device) -> Stored:
        """Every tensor of it."""
        weight = nn.Parameter(stored.weight.detach().to(device), requires_grad=False)
        return Stored(weight, _moved(stored.more, device))

    def bias_dtype(self, bias: Tensor) -> torch.dtype:
        """As it is: it is added to what the base computes."""
        return bias.dtype


def _empty(config: Any, dtype: Any, device: Any) -> Any:
    """An `HQQLinear` without a weight."""
    kind: Any = imported("hqq.core.quantize", "HQQLinear")
    config = {**copy.deepcopy(config or {}), "offload_meta": False}
    return kind(None, config, compute_dtype=dtype, device=device, initialize=False)


def _with(stored: Stored) -> Any:
    """An `HQQLinear` that does nothing but hold this weight."""
    found = _empty(None, stored.more["compute_dtype"], stored.weight.device)
    # dequantising notes on the settings what it found, and takes it off again
    found.W_q, found.meta, found.ready = stored.weight.detach(), dict(stored.more), True
    return found


def _moved(meta: dict[str, Any], device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in meta.items():
        if isinstance(value, torch.Tensor):
            found[key] = value.to(device)
        else:
            found[key] = _moved(value, device) if isinstance(value, dict) else value
    return found
