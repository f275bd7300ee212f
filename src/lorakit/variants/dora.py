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
from lorakit.variants.variant import Effect, Held
from lorakit.weights.dense import FLOATS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec
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
    change: Tensor
    B: Tensor

    def is_of(self, tensors: tuple[Tensor, ...], scaling: float | Tensor) -> bool:
        same = all(now is then for now, then in zip(tensors, self.tensors, strict=True))
        scaled = scaling is self.scaling or (type(scaling) is float and scaling == self.scaling)
        return same and scaled and self.stamp.holds()


@final
@dataclass(frozen=True, slots=True)
class Dora:
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

    def offset(self, spec: AdapterSpec, weight: Callable[[torch.dtype], Tensor]) -> None:
        """Nothing."""

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """See `Variant.forward`."""
        x, base_y = (call.dropped(), None) if call.rate else (call.x, call.base_y)
        base_y = call.base(x) if base_y is None else base_y
        y, B = _rescaled(y, base_y, call)
        return call.add(y, x, replace(call.held, B=B))

    def penalty(self, held: Held, kept: Mapping[str, Any], count: int, *, training: bool) -> None:
        """Nothing is added to a loss."""

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """`W -> g (W + s B A)`."""
        wide = _wide(held.A)
        gain = _magnitude(held) / _norms_of(held, Matrix(weight(wide)))
        return Effect(held.A.to(wide), scaled_rows(gain, held.B.to(wide)), gain)


def from_config(config: LoraConfig) -> Dora | None:
    """DoRA where the config asks for it."""
    return Dora() if config.use_dora else None


def _rescaled(y: Tensor, base_y: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Y with the base's part of it rescaled, and the rescaled B."""
    held, kept, magnitude = call.held, call.kept, _magnitude(call.held)
    space = held.B.ndim - 2
    if _must_compose(base_y, magnitude, call):
        gain = magnitude / _norms_of(held, _matrix(call))
        return shifted(y, base_y, call.bias, gain - 1, space), scaled_rows(gain, held.B)
    if not torch.is_grad_enabled():
        found = _gain(call)
        return shifted(y, base_y, call.bias, found.change, space), found.B
    # an optimiser's step may be a write that no version counts (a fused one, or one through `.data`)
    kept.pop("gain", None)
    norms = _norms(call)
    if base_y is y:
        rescaled: tuple[Tensor, Tensor] = Rescale.apply(y, call.bias, magnitude, held.B, norms)  # type: ignore[no-untyped-call]
        return rescaled
    gain = magnitude / norms
    return shifted(y, base_y, call.bias, gain - 1, space), scaled_rows(gain, held.B)


def _must_compose(base_y: Tensor, magnitude: Tensor, call: Call) -> bool:
    held = call.held
    if type(base_y) not in PLAIN or type(magnitude) not in PLAIN:
        return True
    return must_compose(call.x, [Term(held.A, held.B, None, held.scaling, 0.0)])


def _gain(call: Call) -> _Gain:
    """What to rescale by, kept while nobody trains or changes what it follows from."""
    held = call.held
    tensors = (call.stored, held.A, held.B, held.parts["magnitude"])
    kept: Any = call.kept.get("gain")
    if kept is not None and kept.is_of(tensors, held.scaling):
        found: _Gain = kept
        return found
    stamped = (*tensors, held.scaling) if isinstance(held.scaling, torch.Tensor) else tensors
    stamp = Stamp.of(stamped)
    gain = _magnitude(held) / _norms(call)
    found = _Gain(tensors, held.scaling, stamp, gain - 1, scaled_rows(gain, held.B))
    call.kept["gain"] = found
    return found


def _norms(call: Call) -> Tensor:
    """The norms, of which what W alone contributes is kept while W is the same."""
    W = _matrix(call)
    stored = call.stored
    kept: Any = call.kept.get("squares")
    if kept is None or not kept.are_of(stored):
        with torch.no_grad():
            kept = _Squares(stored, Stamp.of([stored]), row_squares(W))
        if not stored.requires_grad:  # one that is trained changes unseen, as above
            call.kept["squares"] = kept
    return _norms_of(call.held, W, kept.squares)


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
