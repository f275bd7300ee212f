"""The two kernels of a mixed batch: `shrink`, h = A_i x, and `expand`, y += scaling_i * B_i h + scaled bias_i.

Rows are tokens in the order of their sample's adapter. A program owns one tile of neighbouring rows of one adapter and
exits at once where there is none, so a grid sized for the worst batch serves every batch, also inside a captured graph.
Ranks are the true ones: a program of `shrink` beyond its adapter's rank exits, the loop of `expand` ends at it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def shrink_kernel(
    x: tl.tensor,
    A: tl.tensor,
    h: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    first_rows: tl.tensor,
    features: int,
    tokens: int,
    rows_total: int,
    widest: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRODUCTS: tl.constexpr,
) -> None:
    """One (BLOCK_ROWS, BLOCK_RANK) tile of one of the SPLIT partial sums over the features: h is (SPLIT, rows, widest)."""
    tile = tl.program_id(0)
    part = tl.program_id(2)
    adapter = tl.load(tiles + 3 * tile)
    if adapter < 0:
        return
    first = tl.load(first_rows + adapter)
    rank = tl.load(first_rows + adapter + 1) - first
    r = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    if tl.program_id(1) * BLOCK_RANK >= rank:
        return
    row = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    live = row < tl.load(tiles + 3 * tile + 2)
    sample = tl.load(order + row // tokens, mask=live, other=0).to(tl.int64)
    x_row = (sample * tokens + row % tokens) * features
    A_row = (first + r).to(tl.int64) * features
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(part * BLOCK_K, features, BLOCK_K * SPLIT):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < features
        x_part = tl.load(x + x_row[:, None] + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        A_part = tl.load(
            A + A_row[None, :] + k[:, None], mask=(r < rank)[None, :] & inside[:, None], other=0.0
        )
        total = tl.dot(x_part.to(PRODUCTS), A_part.to(PRODUCTS), total, input_precision="ieee")
    target = h + (part * rows_total + row).to(tl.int64)[:, None] * widest + r[None, :]
    tl.store(target, total, mask=live[:, None] & (r < rank)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def expand_kernel(
    h: tl.tensor,
    B: tl.tensor,
    y: tl.tensor,
    scalings: tl.tensor,
    biases: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    first_rows: tl.tensor,
    features: int,
    tokens: int,
    rows_total: int,
    widest: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """One (BLOCK_ROWS, BLOCK_OUT) tile of y, read and written once; every row belongs to one adapter, so nobody else does."""
    tile = tl.program_id(0)
    adapter = tl.load(tiles + 3 * tile)
    if adapter < 0:
        return
    first = tl.load(first_rows + adapter)
    rank = tl.load(first_rows + adapter + 1) - first
    if rank == 0:
        return
    row = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    live = row < tl.load(tiles + 3 * tile + 2)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = column < features
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        r = start + tl.arange(0, BLOCK_RANK)
        own = r < rank
        hidden = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for part in tl.static_range(SPLIT):
            source = h + (part * rows_total + row).to(tl.int64)[:, None] * widest + r[None, :]
            hidden += tl.load(source, mask=live[:, None] & own[None, :], other=0.0)
        B_part = tl.load(
            B + (first + r).to(tl.int64)[:, None] * features + column[None, :],
            mask=own[:, None] & inside[None, :],
            other=0.0,
        )
        rounded = hidden.to(B.dtype.element_ty)
        total = tl.dot(rounded.to(PRODUCTS), B_part.to(PRODUCTS), total, input_precision="ieee")
    total *= tl.load(scalings + adapter)
    if HAS_BIAS:
        total += tl.load(biases + adapter.to(tl.int64) * features + column, mask=inside, other=0.0).to(
            tl.float32
        )[None, :]
    sample = tl.load(order + row // tokens, mask=live, other=0).to(tl.int64)
    target = y + (sample * tokens + row % tokens)[:, None] * features + column[None, :]
    written = live[:, None] & inside[None, :]
    base = tl.load(target, mask=written, other=0.0).to(tl.float32)
    tl.store(target, (base + total).to(y.dtype.element_ty), mask=written)
