"""`A x` that keeps, for the gradient of A, no x but its projection on one vector for each group of its features.

The product itself, and the gradient of x, are those of a linear layer; the gradient of A is that of the projected x.
With d features in a group, 1 / d of x is kept.

Source: Miles et al., 2024, arXiv:2405.17991.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from lorakit.ops.dropout import draw_dropped, zero_, zeroed
from lorakit.ops.terms import product_dtype, result_dtype, without_autocast

if TYPE_CHECKING:
    from torch import Tensor


class Projection(NamedTuple):
    """How x is projected.

    Attributes:
        groups: into how many groups of equal size the features of x go, the last one filled with zeros.
        scale: factor on what the gradient of A takes for x.
        dropout: probability of zeroing an element of x.
        seed: of that dropout.
    """

    groups: int
    scale: float
    dropout: float = 0.0
    seed: int = 0


def group_size(features: int, groups: int) -> int:
    """How many features are in a group."""
    return -(-features // groups)


@torch.no_grad()
def mean_direction(x: Tensor, groups: int) -> Tensor:
    """The mean of all groups of all rows of x, (..., in), of length 1: (group_size,) in fp32 at least.

    A mean of zero gives the same number everywhere.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return normalised(_grouped(x.reshape(-1, x.shape[-1]).mean(dim=0, dtype=wide), groups).mean(dim=0))


def normalised(direction: Tensor) -> Tensor:
    """A vector of length 1 in fp32 at least, with the same number everywhere for a zero one."""
    direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
    length = torch.linalg.vector_norm(direction)
    even = torch.full_like(direction, direction.numel() ** -0.5)
    return torch.where(length > 0, direction / length.clamp(min=torch.finfo(direction.dtype).tiny), even)


def projected_linear(x: Tensor, A: Tensor, direction: Tensor, projection: Projection) -> Tensor:
    """`A drop(x)`, (..., r), in the dtype that `torch.nn.functional.linear` would give; no graph holds it.

    Args:
        x: (..., in), any dtype.
        A: (r, in), any dtype.
        direction: (group_size(in, groups),), of length 1; it gets no gradient.
        projection: see `Projection`.
    """
    h: Tensor = _ProjectedLinear.apply(x, A, direction, projection)[0]  # type: ignore[no-untyped-call]
    return h


def projected_reference(x: Tensor, A: Tensor, direction: Tensor, projection: Projection) -> Tensor:
    """The specification of `projected_linear` without dropout, in plain torch calls; it keeps more.

    Args:
        x: (..., in).
        A: (r, in), any dtype.
        direction: (group_size(in, groups),).
        projection: see `Projection`; without dropout.
    """
    along = _grouped(x.detach(), projection.groups) @ direction.to(x.dtype)
    rows = (along.unsqueeze(-1) * direction.to(x.dtype) * projection.scale).flatten(-2)[..., : x.shape[-1]]
    seen = linear(rows, A.to(x.dtype))
    return linear(x, A.detach().to(x.dtype)) + (seen - seen.detach())


def _grouped(x: Tensor, groups: int) -> Tensor:
    """X (..., in) -> (..., groups, group_size)."""
    size = group_size(x.shape[-1], groups)
    missing = groups * size - x.shape[-1]
    whole = pad(x, (0, missing)) if missing else x
    return whole.view(*x.shape[:-1], groups, size)


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, A: Tensor, direction: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
        result = result_dtype(x)
        products = product_dtype(x, result)
        with without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])
            if projection.dropout:
                dropped = _dropped(projection, rows)
                rows = zeroed(rows, dropped) / (1 - projection.dropout)
            rows = rows.to(products)
            h = linear(rows, A.to(products)).to(result)
            kept = (_grouped(rows, projection.groups) @ direction.to(products)).to(result)
        return h.view(*x.shape[:-1], -1), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, A, direction, projection = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(A, direction, output[1])
        ctx.projection, ctx.shape, ctx.dtype, ctx.device = projection, x.shape, x.dtype, x.device

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        A, direction, kept = ctx.saved_tensors
        projection: Projection = ctx.projection
        products = product_dtype(dh, dh.dtype)
        dx = dA = None
        with without_autocast(dh.device.type):
            rows = dh.reshape(-1, dh.shape[-1]).to(products)
            if ctx.needs_input_grad[0]:
                dx = rows @ A.to(products)
                if projection.dropout:
                    dx = zero_(dx, _dropped(projection, dx)) / (1 - projection.dropout)
                dx = dx.to(ctx.dtype).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                # the projected x is the outer product of `kept` and the direction: it is never built
                by_group = (rows.mT @ kept.to(products)).to(torch.promote_types(A.dtype, torch.float32))
                dA = (by_group.unsqueeze(-1) * direction * projection.scale).flatten(1)
                dA = dA[:, : ctx.shape[-1]].to(A.dtype)
        return dx, dA, None, None


def _dropped(projection: Projection, rows: Tensor) -> Tensor:
    return draw_dropped(rows.numel(), projection.dropout, projection.seed, rows.device)
