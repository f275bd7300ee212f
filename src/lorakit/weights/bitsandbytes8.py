"""8-bit weights of bitsandbytes: int8 rows with one fp32 scale each (Dettmers et al., 2022, arXiv:2208.07339)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lorakit.weights.quantised import QuantisedCodec, Stored, imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

LEVELS = 127


class Bitsandbytes8Codec(QuantisedCodec):
    """`bitsandbytes.nn.Linear8bitLt` with an int8 weight (`has_fp16_weights=False`).

    The scales are on the parameter until the first call, and on the module's matmul state from then on. That state
    therefore goes with the weight (`Stored.more`).
    """

    name = "bitsandbytes 8-bit"
    names = ("weight", "bias")

    def owns(self, base: nn.Module) -> bool:
        """A `Linear8bitLt` that has been moved to a device, which quantises it."""
        kind = imported("bitsandbytes.nn", "Linear8bitLt")
        return kind is not None and isinstance(base, kind) and base.weight.dtype == torch.int8

    def dtype(self, base: nn.Module) -> torch.dtype:
        """Of the bias, which follows what the layer is called with; fp16, which the library computes in, without one."""
        return torch.float16 if base.bias is None else base.bias.dtype  # type: ignore[return-value]

    def gives_fresh(self, base: nn.Module) -> bool:
        """Its own forward does; a subclass may do anything."""
        return type(base).__module__.startswith("bitsandbytes.")

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """Of the int8 array."""
        rows, columns = self.held(base).weight.shape
        return rows, columns

    def held(self, base: nn.Module) -> Stored:
        """The parameter and the matmul state."""
        return Stored(base.weight, base.state)  # type: ignore[arg-type]

    def hold(self, base: nn.Module, stored: Stored) -> None:
        """Both go together."""
        base.weight, base.state = stored

    def dequantised(self, stored: Stored) -> Tensor:
        """In fp32."""
        return stored.weight.detach().float() * (_scales(stored)[:, None] / LEVELS)

    def quantised(self, base: nn.Module, W: Tensor) -> Stored:
        """The library's own rounding, but of fp32 numbers: it would round them to fp16 first."""
        old, state = self.held(base)
        scales = W.abs().amax(dim=1)
        data = (
            (W * (LEVELS / scales.clamp(min=torch.finfo(torch.float32).tiny))[:, None])
            .round_()
            .to(torch.int8)
        )
        return _made(type(old), data, scales, state)

    def at(self, stored: Stored, device: torch.device) -> Stored:
        """The scales go back onto the parameter."""
        data, scales = stored.weight.detach().to(device), _scales(stored).to(device)
        return _made(type(stored.weight), data, scales, stored.more)

    def bias_dtype(self, bias: Tensor) -> torch.dtype:
        """The forward casts the bias in place to the dtype of its input, so its dtype says nothing."""
        return torch.promote_types(bias.dtype, torch.float32)


def _scales(stored: Stored) -> Tensor:
    own = stored.weight.SCB  # type: ignore[attr-defined]
    found: Tensor = stored.more.SCB if own is None else own
    return found


def _made(kind: Any, data: Tensor, scales: Tensor, like: Any) -> Stored:
    """A weight as it is before the first call, and a matmul state of the same settings."""
    state = copy.copy(like)
    state.reset_grads()
    state.CB = state.SCB = state.idx = state.subB = None
    plain = data.as_subclass(torch.Tensor)
    return Stored(kind(plain, requires_grad=False, CB=plain, SCB=scales), state)
