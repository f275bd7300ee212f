"""DoRA: what W + s B A is multiplied to a given magnitude, output by output (Liu et al., 2024, arXiv:2402.09353)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch

from lorakit.ops.dora import (
    Matrix,
    Rescale,
    row_norms,
    row_squares,
    scaled_rows,
    shifted,
    wide_dtype,
)
from lorakit.ops.reference import PLAIN, must_compose
from lorakit.ops.stamps import Stamp
from lorakit.ops.terms import Term
from lorakit.specs import PartName
from lorakit.variants.nothing import LeavesBase, NoPenalty
from lorakit.variants.variant import Effect, Held
from lorakit.weights.dense import FLOATS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.variants.variant import Call, Start


class _Squares(NamedTuple):
    """`||W||^2` of each row, and the weight that it is of."""

    weight: Tensor
    stamp: Stamp
    squares: Tensor

    def are_of(self, weight: Tensor) -> bool:
        return weight is self.weight and self.stamp.holds()


class _Gain(NamedTuple):
    """What one evaluation after another computes with, and what it follows from."""

    tensors: tuple[Tensor, ...]
    scaling: float | Tensor
    stamp: Stamp
    change: Tensor  # gain - 1, in the dtype of the output

    def is_of(self, tensors: tuple[Tensor, ...], scaling: float | Tensor) -> bool:
        same = all(now is then for now, then in zip(tensors, self.tensors, strict=True))
        scaled = scaling is self.scaling or (type(scaling) is float and scaling == self.scaling)
        return same and scaled and self.stamp.holds()


@final
@dataclass(frozen=True, slots=True)
class Dora(LeavesBase, NoPenalty):
    """`y = g (W x + s B A x) + bias` with `g = magnitude / ||W + s B A||`, the norm of each output's row.

    No gradient goes through the norm. The magnitude begins as that norm. Under dropout the base's product is that of
    the dropped input too, so that a training step has a second one.
    """

    name: ClassVar[str] = "DoRA"
    field: ClassVar[str] = "use_dora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding", "conv"})
    parts: ClassVar[Mapping[str, PartName]] = {
        "magnitude": PartName("lora_magnitude_vector", "lora_magnitude_vector", in_module=True)
    }
    frozen: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = True

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - the contract's
        """(out,), and of convolutions (1, out, 1, ...)."""
        space = len(layout.row) - 1
        return {"magnitude": (1, layout.out, *(1,) * space) if space else (layout.out,)}

    def why_not(self, path: str, layout: Layout, r: int) -> str:  # noqa: ARG002 - the contract's
        """Refuses grouped convolutions."""
        if layout.groups > 1:
            return (
                "DoRA on a grouped convolution: in PEFT's files its magnitudes belong to norms of another weight than "
                "the one that acts; use plain LoRA here, or leave it out with exclude_modules"
            )
        return ""

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """The magnitude is the norm at the beginning."""
        spec = start.spec
        held = Held(start.A, start.B, None, spec.scaling, {})
        norms = _norms_of(held, Matrix(start.read_weight(_wide(start.A))))
        shape = self.shapes(spec.path, spec.layout, spec.r)["magnitude"]
        return {"A": start.A, "B": start.B, "magnitude": norms.to(spec.dtype).view(shape)}

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """See `Variant.forward`."""
        if y is call.base_y and not call.rate:
            return self.finish(call.add(y, call.x, call.held), call)
        x, base_y = (call.dropped(), None) if call.rate else (call.x, call.base_y)
        base_y = call.base(x) if base_y is None else base_y
        gain = _gain(call)
        y = shifted(y, base_y, call.bias, gain - 1, call.held.B.ndim - 2)
        return call.add(y, x, replace(call.held, B=scaled_rows(gain, call.held.B)))

    def finish(self, y: Tensor, call: Call) -> Tensor:
        """`g (y - bias) + bias` for y = W x + bias + s B A x, which is not written to."""
        space = call.held.B.ndim - 2
        if _must_compose(call):
            return shifted(y, y, call.bias, _magnitude(call.held) / _norms(call) - 1, space)
        if not torch.is_grad_enabled():
            return shifted(y, y, call.bias, _change(call, y.dtype), space)
        rescaled: Tensor = Rescale.apply(y, call.bias, _magnitude(call.held), _norms(call), space)  # type: ignore[no-untyped-call]
        return rescaled

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """`W -> g (W + s B A)`."""
        wide = _wide(held.A)
        gain = _magnitude(held) / _norms_of(held, Matrix(weight(wide)))
        return Effect(held.A.to(wide), scaled_rows(gain, held.B.to(wide)), gain)


def from_config(config: LoraConfig) -> Dora | None:
    """DoRA where the config asks for it."""
    return Dora() if config.use_dora else None


def _gain(call: Call) -> Tensor:
    """Magnitude over norm: (out,)."""
    if torch.is_grad_enabled() or _must_compose(call):
        return _magnitude(call.held) / _norms(call)
    return _change(call, _wide(call.held.A)) + 1


def _change(call: Call, dtype: torch.dtype) -> Tensor:
    """Magnitude over norm, less 1: (out,), kept while nobody trains or changes what it follows from."""
    held = call.held
    tensors = (call.stored, held.A, held.B, held.parts["magnitude"])
    kept: Any = call.kept.get("gain")
    if kept is not None and kept.change.dtype == dtype and kept.is_of(tensors, held.scaling):
        found: Tensor = kept.change
        return found
    stamp = Stamp.of((*tensors, held.scaling) if isinstance(held.scaling, torch.Tensor) else tensors)
    change = (_magnitude(held) / _norms(call) - 1).to(dtype)
    call.kept["gain"] = _Gain(tensors, held.scaling, stamp, change)
    return change


def _norms(call: Call) -> Tensor:
    """The norms, of which what W alone contributes is kept while W is the same."""
    W, stored, kept = _matrix(call), call.stored, call.kept
    if torch.is_grad_enabled():
        # an optimiser's step may be a write that no version counts (a fused one, or one through `.data`)
        kept.pop("gain", None)
    if _must_compose(call):
        return _norms_of(call.held, W)
    squares: Any = kept.get("squares")
    if squares is None or not squares.are_of(stored):
        with torch.no_grad():
            squares = _Squares(stored, Stamp.of([stored]), row_squares(W))
        if not stored.requires_grad:  # one that is trained changes unseen, as above
            kept["squares"] = squares
    return _norms_of(call.held, W, squares.squares)


def _must_compose(call: Call) -> bool:
    """Whether everything must be plain torch calls, and nothing be kept."""
    held = call.held
    if type(call.base_y) not in PLAIN or type(held.parts["magnitude"]) not in PLAIN:
        return True
    return must_compose(call.x, [Term(held.A, held.B, None, held.scaling, 0.0)])


def _norms_of(held: Held, W: Matrix, squares: Tensor | None = None) -> Tensor:
    """The norms of the rows of W + s B A, (out,), outside of autocast and of autograd."""
    scaling = held.scaling.detach() if isinstance(held.scaling, torch.Tensor) else held.scaling
    A, B = held.A.detach().flatten(1), held.B.detach().flatten(1)
    device = W.values.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return row_norms(W, row_squares(W) if squares is None else squares, A, B, scaling)
    return row_norms(W, row_squares(W) if squares is None else squares, A, B, scaling)


def _matrix(call: Call) -> Matrix:
    """The unmerged weight: as it lies where it is a plain array, else decoded."""
    stored, layout = call.stored, call.layout
    if type(stored) in PLAIN and stored.dtype in FLOATS and stored.numel() == math.prod(layout.shape):
        return Matrix(stored.detach().flatten(1), layout.transposed)
    return Matrix(call.weight(wide_dtype(stored.dtype)))


def _magnitude(held: Held) -> Tensor:
    return held.parts["magnitude"].flatten()


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
