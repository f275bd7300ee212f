"""The kernels of an adapter with dropout: what is dropped is decided in registers, from a seed and the element's index.

Philox, a counter-based generator, gives the same number for the same seed and index in every kernel, whatever the tiles,
so forward and backward agree without a mask in memory. Sums over many rows are kept apart by row tile and added
afterwards in one order, so the same inputs give the same bits.

Source: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def keep_kernel(kept: tl.tensor, count: int, seed: int, p: float, BLOCK: tl.constexpr) -> None:
    """Whether each of `count` elements is kept, as int8."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(kept + index, (tl.rand(seed, index) >= p).to(tl.int8), mask=index < count)


@triton.jit  # type: ignore[untyped-decorator]
def shrink_dropped_kernel(
    x: tl.tensor,
    A: tl.tensor,
    h: tl.tensor,
    rows: int,
    features: int,
    rank: int,
    seed: int,
    p: float,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCTS: tl.constexpr,
) -> None:
    """One (BLOCK_ROWS, BLOCK_RANK) tile of h = drop(x) A^T: x is (rows, features), A (rank, features)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < features
        index = row[:, None] * features + k[None, :]
        kept = (tl.rand(seed, index) >= p) & (row < rows)[:, None] & inside[None, :]
        x_part = tl.load(x + index, mask=kept, other=0.0)
        A_part = tl.load(
            A + r[None, :] * features + k[:, None], mask=(r < rank)[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(x_part.to(PRODUCTS), A_part.to(PRODUCTS), total, input_precision="ieee")
    written = (row < rows)[:, None] & (r < rank)[None, :]
    tl.store(h + row[:, None] * rank + r[None, :], total.to(h.dtype.element_ty), mask=written)


@triton.jit  # type: ignore[untyped-decorator]
def read_dy_kernel(
    dy: tl.tensor,
    B: tl.tensor,
    h: tl.tensor,
    dh: tl.tensor,
    dB: tl.tensor,
    rows: int,
    features: int,
    rank: int,
    alpha: float,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRODUCTS: tl.constexpr,
) -> None:
    """From one read of a row tile of dy, (rows, features): dh = alpha dy B, and its part of dB = alpha dy^T h.

    dB is (row tiles, features, rank) in float32. All ranks are in one block, since dy is not to be read again.
    """
    tile = tl.program_id(0)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.arange(0, BLOCK_RANK)
    live, own = row < rows, r < rank
    h_tile = tl.load(h + row[:, None] * rank + r[None, :], mask=live[:, None] & own[None, :], other=0.0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, features, BLOCK_OUT):
        column = start + tl.arange(0, BLOCK_OUT)
        inside = column < features
        dy_part = tl.load(
            dy + row.to(tl.int64)[:, None] * features + column[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        of_B = inside[:, None] & own[None, :]
        B_part = tl.load(B + column[:, None] * rank + r[None, :], mask=of_B, other=0.0)
        total = tl.dot(dy_part.to(PRODUCTS), B_part.to(PRODUCTS), total, input_precision="ieee")
        part = tl.dot(tl.trans(dy_part.to(PRODUCTS)), h_tile.to(PRODUCTS), input_precision="ieee")
        target = dB + (tile.to(tl.int64) * features + column)[:, None] * rank + r[None, :]
        tl.store(target, part * alpha, mask=of_B)
    target = dh + row[:, None] * rank + r[None, :]
    tl.store(target, (total * alpha).to(dh.dtype.element_ty), mask=live[:, None] & own[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def down_gradient_kernel(
    dh: tl.tensor,
    x: tl.tensor,
    dA: tl.tensor,
    rows: int,
    features: int,
    rank: int,
    per_part: int,
    seed: int,
    p: float,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCTS: tl.constexpr,
) -> None:
    """One part's (BLOCK_RANK, BLOCK_K) tile of dA = dh^T drop(x), over `per_part` rows: dA is (parts, rank, features)."""
    r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(2)
    own, inside = r < rank, k < features
    total = tl.zeros((BLOCK_RANK, BLOCK_K), dtype=tl.float32)
    for start in range(part * per_part, (part + 1) * per_part, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        live = row < rows
        dh_part = tl.load(dh + row[None, :] * rank + r[:, None], mask=live[None, :] & own[:, None], other=0.0)
        index = row[:, None] * features + k[None, :]
        kept = (tl.rand(seed, index) >= p) & live[:, None] & inside[None, :]
        x_part = tl.load(x + index, mask=kept, other=0.0)
        total = tl.dot(dh_part.to(PRODUCTS), x_part.to(PRODUCTS), total, input_precision="ieee")
    target = dA + (part.to(tl.int64) * rank + r)[:, None] * features + k[None, :]
    tl.store(target, total, mask=own[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def add_kept_kernel(
    dx: tl.tensor,
    dh: tl.tensor,
    A: tl.tensor,
    rows: int,
    features: int,
    rank: int,
    seed: int,
    p: float,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCTS: tl.constexpr,
) -> None:
    """One (BLOCK_ROWS, BLOCK_K) tile of dx += keep * (dh A), read and written once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live, inside = row < rows, k < features
    total = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        r = start + tl.arange(0, BLOCK_RANK)
        own = r < rank
        dh_part = tl.load(dh + row[:, None] * rank + r[None, :], mask=live[:, None] & own[None, :], other=0.0)
        A_part = tl.load(
            A + r[:, None] * features + k[None, :], mask=own[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(dh_part.to(PRODUCTS), A_part.to(PRODUCTS), total, input_precision="ieee")
    index = row[:, None] * features + k[None, :]
    kept = (tl.rand(seed, index) >= p) & live[:, None] & inside[None, :]
    before = tl.load(dx + index, mask=kept, other=0.0).to(tl.float32)
    tl.store(dx + index, (before + total).to(dx.dtype.element_ty), mask=kept)
