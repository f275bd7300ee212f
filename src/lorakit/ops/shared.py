"""Several layers over one input: their A's in one product, and one buffer for the input's gradient.

`shrink_together` multiplies x by all A's; `expand_one` then is `lora_linear` without that product, once for each layer.
The layers are chained: each is given x as the one before it handed it on, so that autograd passes the gradient of x from
the last to the first, and each adds its part into it by its own matrix product. Results and gradients are those of
`lora_linear`, up to rounding; what is kept for backward is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from lorakit.ops.fused import is_frozen_base
from lorakit.ops.reference import must_compose
from lorakit.ops.terms import in_autocast, product_dtype, shaped, without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.terms import Term


def may_share(x: Tensor, terms: Sequence[Term]) -> bool:
    """Whether layers that read x may do so together, as far as x and the terms of all of them say.

    Not where dropout acts, since each adapter drops other elements; not where products have another dtype than x. Not
    under hooks on saved tensors: checkpointing may run one of the layers again without the others. And not where x has no
    history of its own, for then each layer's output could be differentiated on its own, and freed.
    """
    return (
        torch.is_grad_enabled()
        and not must_compose(x, terms)
        and x.grad_fn is not None
        and not x.is_inference()
        and not any(term.dropout or term.A.device != x.device for term in terms)
        and not in_autocast(x.device.type)
        and product_dtype(x, x.dtype) == x.dtype
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # noqa: FBT003 - takes no keyword
    )


def shrink_together(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`A x` of several A's in one product.

    Args:
        x: (..., in), for which `may_share` holds.
        factors: the A's, (r_i, in), any floating dtype.

    Returns:
        x, to be given to the first layer, and of each A its (rows, r_i) in the dtype of x.
    """
    handed, *hidden = _Shrink.apply(x, *factors)  # type: ignore[no-untyped-call]
    return handed, tuple(hidden)


def expand_one(
    x: Tensor,
    hidden: Sequence[Tensor],
    W: Tensor,
    b: Tensor | None,
    terms: Sequence[Term],
    *,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer of those that read x together: `x W^T + b + sum_i s_i * (B_i h_i + bias_i)`.

    Args:
        x: (..., in), as `shrink_together` or the layer before handed it on.
        hidden: `h_i`, (rows, r_i), of each term, from `shrink_together`.
        W: (out, in), or (in, out) when `transposed`; frozen, in the dtype of x (`is_frozen_base`).
        b: (out,) or None.
        terms: the active adapters, without dropout.
        transposed: whether W is stored (in, out).

    Returns:
        (..., out), and x to be given to the next layer.

    Source: Hu et al., 2021, arXiv:2106.09685.
    """
    assert is_frozen_base(x, W, b), "asked for before"
    scalings = tuple([float(term.scaling) for term in terms])
    flat = [tensor for term, h in zip(terms, hidden, strict=True) for tensor in (h, term.B, term.bias)]
    y, handed = _Expand.apply(x, W, b, transposed, scalings, *flat)  # type: ignore[no-untyped-call]
    return y, handed


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([factor.to(dtype) for factor in factors])


class _Shrink(torch.autograd.Function):
    """The node of `shrink_together`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        hidden = linear(_rows(x), _stacked(factors, x.dtype))
        ctx.set_materialize_grads(False)
        ctx.device_type = x.device.type
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *factors)
        sizes = [factor.shape[0] for factor in factors]
        parts = torch.ops.aten.split_with_sizes_copy.default(hidden, sizes, 1)
        return x, *parts

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *dhs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(factors)
        there = [(place, dh) for place, dh in enumerate(dhs) if dh is not None]
        if not there:
            return dx, *grads
        with without_autocast(ctx.device_type):
            dh = torch.cat([each for _, each in there], dim=1)
            sizes = [each.shape[1] for _, each in there]
            wanted = [(k, place) for k, (place, _) in enumerate(there) if ctx.needs_input_grad[1 + place]]
            if wanted:
                parts = (dh.t() @ _rows(x)).split(sizes)
                for k, place in wanted:
                    grads[place] = parts[k].to(factors[place].dtype)
            assert dx is not None, "a layer that has a gradient hands one back to x"
            dx = _plus_product(dx, dh, _stacked([factors[place] for place, _ in there], dh.dtype))
        return dx, *grads


class _Expand(torch.autograd.Function):
    """The node of `expand_one`; its last tensors are (h, B, bias) of each term in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        transposed: bool,
        scalings: tuple[float, ...],
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weight = W.t() if transposed else W
        out = linear(_rows(x), weight, b)
        for k, scaling in enumerate(scalings):
            h, B, bias = flat[3 * k : 3 * k + 3]
            assert h is not None
            assert B is not None
            out.addmm_(h, B.to(x.dtype).t(), alpha=scaling)
            if bias is not None:
                out.add_(bias * scaling)
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.scalings, ctx.transposed, ctx.x_shape = (
            x.device.type,
            scalings,
            transposed,
            x.shape,
        )
        needs = ctx.needs_input_grad[5:]
        kept = [h if need else None for h, need in zip(flat[0::3], needs[1::3], strict=True)]
        ctx.save_for_backward(W, *kept, *flat[1::3], *flat[2::3])
        return shaped(out, (*x.shape[:-1], out.shape[-1])), x

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        W, *saved = ctx.saved_tensors
        count = len(ctx.scalings)
        if dy is None:
            return dx, *[None] * (4 + 3 * count)
        grads: list[Tensor | None] = []
        with without_autocast(ctx.device_type):
            rows = _rows(dy.contiguous())
            weight = W.t() if ctx.transposed else W
            dx = shaped(rows @ weight, ctx.x_shape) if dx is None else _plus_product(dx, rows, weight)
            for k, scaling in enumerate(ctx.scalings):
                h, B, bias = saved[k], saved[count + k], saved[2 * count + k]
                need_h, need_B, need_bias = ctx.needs_input_grad[5 + 3 * k : 8 + 3 * k]
                grads.append((rows @ B.to(rows.dtype)) * scaling if need_h else None)
                grads.append(((h.t() @ rows).t() * scaling).to(B.dtype) if need_B else None)
                grads.append(rows.sum(dim=0, dtype=bias.dtype) * scaling if need_bias else None)
        return dx, None, None, None, None, *grads


def _plus_product(dx: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`dx + left right`; into dx itself, which the chain alone holds, unless the backward is differentiated."""
    if torch.is_grad_enabled():
        return dx + (left @ right).view(dx.shape)
    _rows(dx).addmm_(left, right)
    return dx
