"""Dense floating-point weights: `nn.Linear`, transformers' `Conv1D`, `nn.Embedding`, `nn.Conv1d/2d/3d`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lorakit.layouts import Layout, matrix_layout
from lorakit.ops import MergeInPlace, merge_delta
from lorakit.weights.codec import WeightState
from lorakit.weights.follow import follow
from lorakit.weights.owned import is_owned_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lorakit.types import Factors

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def conv1d_class() -> type[nn.Module] | None:
    """Transformers' `Conv1D`, where transformers has been imported: an object of it implies that it has."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return None if utils is None else utils.Conv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`."""
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


def is_dense(weight: object) -> bool:
    """Whether a weight is a plain parameter of floating-point numbers."""
    return type(weight) is nn.Parameter and weight.dtype in FLOATS


class DenseCodec:
    """A weight that is one floating-point array in a plain parameter."""

    name = "dense"
    names = ("weight", "bias")
    can_read = can_write = True
    on_grid = False

    def owns(self, base: nn.Module) -> bool:
        """A module of one of the known types, with a plain floating-point weight."""
        known = isinstance(base, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_conv1d(base)
        return known and is_dense(getattr(base, "weight", None))

    def layout(self, base: nn.Module) -> Layout:
        """From the weight itself; Conv1D and embeddings store (in, out)."""
        weight = self._weight(base)
        if type(base) is nn.Linear:
            return matrix_layout(*weight.shape)
        if isinstance(base, CONVOLUTIONS):
            out, _, *kernel = weight.shape
            return Layout(out, (base.in_channels, *kernel), groups=base.groups)
        rows, columns = weight.shape
        if is_conv1d(base) or isinstance(base, nn.Embedding):
            return matrix_layout(columns, rows, transposed=True)
        return matrix_layout(rows, columns)

    def dtype(self, base: nn.Module) -> torch.dtype:
        """Of the array."""
        return self._weight(base).dtype

    def gives_fresh(self, base: nn.Module) -> bool:
        """Torch's own linear layer does, and transformers' `Conv1D`; a subclass may do anything."""
        return type(base) is nn.Linear or type(base) is conv1d_class()

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def read(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """A fresh (out, in) copy."""
        return self._matrix(base, state).to(dtype, copy=True)

    def peek(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> Tensor:
        """The array itself where it has this dtype."""
        return self._matrix(base, state).to(dtype)

    def state(self, base: nn.Module) -> WeightState:
        """The weight, the bias, and a convolution's groups."""
        groups = base.groups if isinstance(base, CONVOLUTIONS) else None
        return WeightState(self._weight(base), self._bias(base), groups)

    def encode(self, base: nn.Module, W: Tensor) -> WeightState:
        """`W` in the dtype, layout and shape of the base weight."""
        old = self.state(base)
        stored = (W.T if self.layout(base).transposed else W).to(old.weight, copy=True).contiguous()
        new = nn.Parameter(stored.view_as(old.weight), requires_grad=old.weight.requires_grad)
        return old._replace(weight=new)

    def merged(
        self,
        base: nn.Module,
        state: WeightState,
        adapters: Sequence[Sequence[Factors]],
        rows: Tensor | None = None,
    ) -> WeightState:
        """W + sum of the deltas; the bias takes the biases of the factors; a grouped weight becomes ungrouped."""
        layout = self.layout(base)
        if state.groups is not None:  # the base may hold an ungrouped weight now
            layout = Layout(layout.out, layout.row, groups=state.groups)
        new = add_to(layout, state, adapters, rows)
        return new._replace(bias=add_biases(state.bias, adapters), groups=1 if state.groups else None)

    def swap(self, base: nn.Module, state: WeightState) -> WeightState:
        """Exchange the parameter objects."""
        old = self.state(base)
        base.weight = state.weight
        if state.bias is not None:
            base.bias = state.bias
        if state.groups is not None:
            base.groups = state.groups  # type: ignore[assignment]  # an attribute of convolutions
        return old

    def moved(self, base: nn.Module, state: WeightState) -> WeightState:
        """The same parameters, on the device and in the dtype of `base`."""
        acting = self.state(base)
        follow(state.weight, acting.weight)
        if state.bias is not None and acting.bias is not None:
            follow(state.bias, acting.bias)
        return state

    def _matrix(self, base: nn.Module, state: WeightState | None) -> Tensor:
        """What is held, (out, in)."""
        held = self._weight(base) if state is None else state.weight
        weight = held.detach().flatten(start_dim=1)
        return weight.T if self.layout(base).transposed else weight

    @staticmethod
    def _weight(base: nn.Module) -> nn.Parameter:
        held = base._parameters.get("weight")  # as an attribute it costs four times as much
        weight = base.weight if held is None else held
        assert isinstance(weight, torch.Tensor)  # no parameter inside of `torch.func.functional_call`
        return cast("nn.Parameter", weight)

    @staticmethod
    def _bias(base: nn.Module) -> nn.Parameter | None:
        held = base._parameters
        bias = held["bias"] if "bias" in held else getattr(base, "bias", None)  # an embedding has none
        assert bias is None or isinstance(bias, torch.Tensor)
        return cast("nn.Parameter | None", bias)


def add_to(
    layout: Layout,
    state: WeightState,
    adapters: Sequence[Sequence[Factors]],
    rows: Tensor | None = None,
) -> WeightState:
    """`add_blocks` to the weight of a state; of a spent one where it lies, if in order and in memory of its own."""
    weight = state.weight
    in_place = state.spent and layout.groups == 1 and weight.is_contiguous() and is_owned_alone(weight)
    if not in_place:
        return state._replace(weight=add_blocks(layout, weight, adapters, rows), spent=False)
    own = weight.detach()
    parts = [
        (part, blocks, gains)
        for part, gains, *blocks in zip(layout.regions(own), _gains(layout, rows), *adapters, strict=True)
    ]
    return state._replace(spent=False, pending=MergeInPlace(own, parts, transposed=layout.transposed))


@torch.no_grad()
def add_blocks(
    layout: Layout,
    weight: nn.Parameter,
    adapters: Sequence[Sequence[Factors]],
    rows: Tensor | None = None,
) -> nn.Parameter:
    """A new parameter of `weight` plus every adapter's delta, each block in its own part of the weight.

    `rows` (out,), where given, multiplies the rows of `weight` first.
    """
    dense = layout.make_dense(weight.detach())
    flat = dense.contiguous()
    new = torch.empty_like(flat)
    regions = layout.regions(flat), layout.regions(new)
    for source, target, gains, *blocks in zip(*regions, _gains(layout, rows), *adapters, strict=True):
        merge_delta(source, blocks, transposed=layout.transposed, out=target, rows=gains)
    if flat is not dense:  # channels_last, or a transposed view: the strides stay what they were
        new = torch.empty_like(dense).copy_(new)
    return nn.Parameter(new, requires_grad=weight.requires_grad)


def _gains(layout: Layout, rows: Tensor | None) -> Sequence[Tensor | None]:
    """The factors on the outputs of each block; experts share theirs."""
    return [rows] * layout.blocks if rows is None or layout.experts else rows.chunk(layout.blocks)


@torch.no_grad()
def add_biases(bias: nn.Parameter | None, adapters: Sequence[Sequence[Factors]]) -> nn.Parameter | None:
    """A new parameter of `bias` plus every adapter's scaled bias, summed in fp64; `bias` itself if there are none."""
    parts = []
    for blocks in adapters:
        own = [block.bias.double() * block.scaling for block in blocks if block.bias is not None]
        parts += [torch.cat(own)] if own else []
    if bias is None or not parts:
        return bias
    total = (bias.double() + torch.stack(parts).sum(dim=0)).to(bias.dtype)
    return nn.Parameter(total, requires_grad=bias.requires_grad)
