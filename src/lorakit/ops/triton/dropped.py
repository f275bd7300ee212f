"""One adapter with dropout on a GPU: no mask and no dropped copy of x, in the forward or for the backward.

Under `TRITON_INTERPRET=1` the same kernels run on CPU tensors, which is how they are tested without a GPU. Block sizes
are those that the shapes suggest; none has been tuned, or timed, on a GPU yet. What is added into y stays the matrix
product's own accumulation (`addmm_`), which reads and writes y once as a kernel would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from lorakit.ops.triton.dropped_kernels import (
    add_kept_kernel,
    down_gradient_kernel,
    keep_kernel,
    read_dy_kernel,
    shrink_dropped_kernel,
)
from lorakit.ops.triton.grouped import OPTIONS, product_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.dropout import Seeded

BLOCK_ROWS = 64
PARTS = 32
"""At most so many partial sums of dA over the rows: enough programs where dA itself is small."""


def keep_mask(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Whether each element is kept, bool (count,): what all kernels here decide, written down.

    Args:
        count: the number of elements, below 2**31.
        p: probability of dropping one, 0 < p < 1.
        seed: 0 <= seed < 2**63.
        device: where to.
    """
    kept = torch.empty(count, dtype=torch.int8, device=device)
    keep_kernel[(triton.cdiv(count, 1024),)](kept, count, seed, p, BLOCK=1024, **OPTIONS)
    return kept.view(torch.bool)


def shrink(x: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """`drop(x) A^T`, (rows, r), summed in fp32 and rounded to the dtype of x.

    Args:
        x: (rows, in), fp32, bf16 or fp16.
        A: (r, in), the dtype of x.
        p: of the dropout; the kept elements are not scaled.
        seed: of the dropout.
    """
    x, A = x.contiguous(), A.contiguous()
    rows, features = x.shape
    h = torch.empty(rows, len(A), dtype=x.dtype, device=x.device)
    block_rank = _block_rank(len(A))
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(len(A), block_rank))
    if h.numel():
        shrink_dropped_kernel[grid](
            x, A, h, rows, features, len(A), seed, p,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=block_rank, BLOCK_K=64, PRODUCTS=product_type(x.dtype), **OPTIONS,
        )  # fmt: skip
    return h


def read_dy(dy: Tensor, B: Tensor, h: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """`alpha dy B`, (rows, r) in the dtype of dy, and `alpha dy^T h`, (out, r) in fp32, from one read of dy.

    Args:
        dy: (rows, out).
        B: (out, r), the dtype of dy.
        h: (rows, r), what `shrink` gave.
        alpha: the scaling, with dropout's 1 / (1 - p).
    """
    dy, B, h = dy.contiguous(), B.contiguous(), h.contiguous()
    rows, features = dy.shape
    rank = B.shape[1]
    tiles = triton.cdiv(rows, BLOCK_ROWS)
    dh = torch.empty(rows, rank, dtype=dy.dtype, device=dy.device)
    parts = torch.empty(tiles, features, rank, dtype=torch.float32, device=dy.device)
    if dh.numel():
        read_dy_kernel[(tiles,)](
            dy, B, h, dh, parts, rows, features, rank, alpha,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=max(16, triton.next_power_of_2(rank)), BLOCK_OUT=64,
            PRODUCTS=product_type(dy.dtype), **OPTIONS,
        )  # fmt: skip
    return dh, parts.sum(dim=0)


def down_gradient(dh: Tensor, x: Tensor, p: float, seed: int) -> Tensor:
    """`dh^T drop(x)`, (r, in) in fp32: dh is (rows, r), x (rows, in), both of one dtype."""
    dh, x = dh.contiguous(), x.contiguous()
    rows, features = x.shape
    rank = dh.shape[1]
    per_part = BLOCK_ROWS * triton.cdiv(triton.cdiv(rows, BLOCK_ROWS), PARTS)
    parts = triton.cdiv(rows, per_part) if rows else 0
    block_rank = _block_rank(rank)
    found = torch.empty(parts, rank, features, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(features, 64), triton.cdiv(rank, block_rank), parts)
    if found.numel():
        down_gradient_kernel[grid](
            dh, x, found, rows, features, rank, per_part, seed, p,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=block_rank, BLOCK_K=64, PRODUCTS=product_type(x.dtype), **OPTIONS,
        )  # fmt: skip
    return found.sum(dim=0)


def add_kept_(dx: Tensor, dh: Tensor, A: Tensor, p: float, seed: int) -> Tensor:
    """`dx += keep * (dh A)`, in place: dx is (rows, in) contiguous, dh (rows, r), A (r, in)."""
    dh, A = dh.contiguous(), A.contiguous()
    rows, features = dx.shape
    block_rank = _block_rank(len(A))
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(features, 64))
    if dx.numel():
        add_kept_kernel[grid](
            dx, dh, A, rows, features, len(A), seed, p,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=block_rank, BLOCK_K=64, PRODUCTS=product_type(dx.dtype), **OPTIONS,
        )  # fmt: skip
    return dx


def term_gradients(
    seeded: Seeded,
    scaling: float,
    tensors: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor | None,
    dx: Tensor | None,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of one term, as `lorakit.ops.fused` asks for them; not differentiable in turn.

    Args:
        seeded: the dropout of the forward.
        scaling: of the adapter, without dropout's 1 / (1 - p).
        tensors: A (r, in), B (out, r), bias (out,) or None, and h (rows, r), which is None where B is frozen.
        dy: (rows, out), in the dtype of the products.
        x: (rows, in) in that dtype, or None where A is frozen.
        dx: (rows, in) contiguous, added into; or None for zeros.
        needs: whether x, A, B and bias want a gradient.

    Returns:
        dx, and the gradients of A, B and bias in their dtypes.
    """
    A, B, bias, h = tensors
    assert A is not None
    assert B is not None
    need_x, need_A, need_B, need_bias = needs
    p, seed = seeded
    alpha = scaling / (1.0 - p)
    expand = B.to(dy.dtype)
    dA = dB = dbias = None
    if need_B:
        assert h is not None, "h is kept wherever a B is trained"
        dh, wide = read_dy(dy, expand, h, alpha)
        dB = wide.to(B.dtype)
    else:
        dh = (dy @ expand) * alpha
    if need_A:
        assert x is not None, "x is kept wherever an A is trained"
        dA = down_gradient(dh, x, p, seed).to(A.dtype)
    if need_x:
        dx = dy.new_zeros(len(dy), A.shape[1]) if dx is None else dx
        add_kept_(dx, dh, A.to(dy.dtype), p, seed)
    if need_bias:
        assert bias is not None
        dbias = dy.sum(dim=0, dtype=bias.dtype) * scaling
    return dx, [dA, dB, dbias]


def _block_rank(rank: int) -> int:
    return min(64, max(16, 1 << (rank - 1).bit_length()))
