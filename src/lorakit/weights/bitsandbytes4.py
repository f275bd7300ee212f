"""4-bit weights of bitsandbytes: nf4 and fp4, with or without quantised scales (Dettmers et al., 2023, arXiv:2305.14314).

On a CPU with bf16 instructions `Linear4bit` packs its weight for them in place, at the first call in eval mode. The
packed form holds its scales rounded to bf16, gives no gradient, and is saved wrongly. `guard` therefore keeps the
scales (which packing lets go) and unpacks, bit for bit, before a call that trains and before a state dict.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.weights.quantised import QuantisedCodec, Stored, imported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class Scales(NamedTuple):
    """What a `QuantState` holds that packing overwrites."""

    absmax: Tensor
    offset: Tensor | None
    state2: Any
    nested: bool
    dtype: torch.dtype


class Bitsandbytes4Codec(QuantisedCodec):
    """`bitsandbytes.nn.Linear4bit`, once its weight is quantised."""

    name = "bitsandbytes 4-bit"
    names = ("weight", "bias")

    def owns(self, base: nn.Module) -> bool:
        """A `Linear4bit` that has been moved to a device, which quantises it."""
        kind = imported("bitsandbytes.nn", "Linear4bit")
        return kind is not None and isinstance(base, kind) and _quant_state(base) is not None

    def dtype(self, base: nn.Module) -> torch.dtype:
        """Of the weight that was quantised."""
        return _scales(_quant_state(base)).dtype

    def gives_fresh(self, base: nn.Module) -> bool:
        """Its own forward does; a subclass may do anything."""
        return type(base).__module__.startswith("bitsandbytes.")

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:
        """Two hooks on the CPU, none elsewhere."""
        if self.held(base).weight.device.type != "cpu" or not getattr(
            base, "support_avx512bf16_for_cpu", False
        ):
            return ()
        return base.register_forward_pre_hook(_before_call), base.register_state_dict_pre_hook(_before_saving)

    def shape(self, base: nn.Module) -> tuple[int, int]:
        """Of the weight that was quantised."""
        rows, columns = _quant_state(base).shape
        return rows, columns

    def held(self, base: nn.Module) -> Stored:
        """The parameter, which holds its scales."""
        weight: Any = base.weight
        if weight.quant_state is None:  # lost when the parameter was converted; the module has it too
            weight.quant_state = base.quant_state
        return Stored(weight)

    def hold(self, base: nn.Module, stored: Stored) -> None:
        """The module remembers the scales too."""
        base.weight = stored.weight
        base.quant_state = stored.weight.quant_state  # type: ignore[attr-defined]

    def dequantised(self, stored: Stored) -> Tensor:
        """In fp32."""
        data, state = _unpacked(stored.weight)
        state.dtype = torch.float32
        dense: Tensor = sys.modules["bitsandbytes.functional"].dequantize_4bit(data, state)
        return dense

    def quantised(self, base: nn.Module, W: Tensor) -> Stored:
        """The same type, block size and storage, and scales quantised or not as before."""
        old, state = self.held(base).weight, _quant_state(base)
        scales = _scales(state)
        settings: Any = {
            "blocksize": state.blocksize,
            "compress_statistics": scales.nested,
            "quant_type": state.quant_type,
            "quant_storage": old.quant_storage,  # type: ignore[attr-defined]
        }
        data, new = sys.modules["bitsandbytes.functional"].quantize_4bit(W, **settings)
        new.dtype = scales.dtype
        return Stored(type(old)(data, quant_state=new, bnb_quantized=True, **settings))  # type: ignore[call-arg]

    def at(self, stored: Stored, device: torch.device) -> Stored:
        """Unpacked; the packed form is the CPU's own."""
        _unpack(stored.weight)
        return Stored(stored.weight.to(device))  # type: ignore[arg-type]  # it stays a parameter

    def bias_dtype(self, bias: Tensor) -> torch.dtype:
        """The forward casts the bias in place to what it computes in, so its dtype says nothing."""
        return torch.promote_types(bias.dtype, torch.float32)


# ---- packing --------------------------------------------------------------------------------------------


def _quant_state(base: nn.Module) -> Any:
    own = getattr(base.weight, "quant_state", None)
    return own if own is not None else getattr(base, "quant_state", None)


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _scales(state: Any) -> Scales:
    """The scales as they were before packing; of a weight packed before anybody watched, what is left of them."""
    if not _is_packed(state):
        return Scales(
            state.absmax, state.offset, state.state2 if state.nested else None, state.nested, state.dtype
        )
    kept = state.__dict__.get("kept_scales")
    if kept is not None:
        assert isinstance(kept, Scales)
        return kept
    left = state.absmax.T.flatten().float()
    return Scales(left, offset=None, state2=None, nested=False, dtype=state.original_dtype)


def _unpacked(weight: nn.Parameter) -> tuple[Tensor, Any]:
    """The data of a weight as it was quantised, and a copy of its state to go with that."""
    state = copy.copy(weight.quant_state)  # type: ignore[attr-defined]
    if not _is_packed(state):
        return weight.detach(), state
    scales = _scales(state)
    state.original_nested = False  # the library would quantise rounded scales; the exact ones are at hand
    inverse = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    data, state = inverse(weight.detach().as_subclass(torch.Tensor), state)
    state.absmax, state.offset, state.state2, state.nested, state.dtype = scales
    return data, state


def _unpack(weight: nn.Parameter) -> None:
    """Undo packing in place."""
    if _is_packed(weight.quant_state):  # type: ignore[attr-defined]
        weight.data, state = _unpacked(weight)
        weight.quant_state.__dict__.update(state.__dict__)  # type: ignore[attr-defined]


def _before_call(base: nn.Module, args: tuple[Any, ...]) -> None:
    """Keep what the call may overwrite; unpack for a call that would not have packed."""
    weight: Any = base.weight
    state = _quant_state(base)
    if not _is_packed(state):
        state.kept_scales = _scales(state)
    elif base.training or any(getattr(arg, "requires_grad", False) for arg in args):
        _unpack(weight)


def _before_saving(base: nn.Module, *_: Any) -> None:
    _unpack(base.weight)  # type: ignore[arg-type]
