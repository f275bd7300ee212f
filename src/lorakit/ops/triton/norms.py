"""DoRA's row norms from one read of the weight, which is neither widened in memory nor multiplied into a delta.

Under `TRITON_INTERPRET=1` the kernel runs on CPU tensors, which is how it is tested without a GPU; it has not been tuned,
or timed, on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lorakit.ops.triton.grouped import OPTIONS

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def row_norms_kernel(
    W: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    gram: tl.tensor,
    squares: tl.tensor,
    norms: tl.tensor,
    out: int,
    features: int,
    rank: int,
    row_stride: int,
    column_stride: int,
    least: float,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_ROWS norms: sqrt(squares + rowsum((2 W A^T + B gram) * B)), where B has the scaling in it."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.arange(0, BLOCK_RANK)
    live, own = row < out, r < rank
    W_row = row.to(tl.int64)[:, None] * row_stride
    product = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < features
        W_part = tl.load(
            W + W_row + k.to(tl.int64)[None, :] * column_stride,
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        A_part = tl.load(
            A + r[None, :] * features + k[:, None], mask=own[None, :] & inside[:, None], other=0.0
        )
        product = tl.dot(W_part.to(tl.float32), A_part, product, input_precision="ieee")
    B_part = tl.load(B + row[:, None] * rank + r[None, :], mask=live[:, None] & own[None, :], other=0.0)
    inner = tl.load(gram + r[:, None] * rank + r[None, :], mask=own[:, None] & own[None, :], other=0.0)
    product = 2.0 * product + tl.dot(B_part, inner, input_precision="ieee")
    total = tl.load(squares + row, mask=live, other=0.0) + tl.sum(product * B_part, axis=1)
    tl.store(norms + row, tl.maximum(tl.sqrt(tl.maximum(total, 0.0)), least), mask=live)


def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The norms of the rows of `W + B A`, (out,) in fp32: `lorakit.ops.dora.row_norms` with the scaling in B.

    Args:
        W: (out, in) of any strides; fp32, bf16 or fp16.
        squares: (out,) in fp32, the squared norms of the rows of W.
        A: (r, in) in fp32, r at most `lorakit.ops.dropout.KERNEL_RANK`: all in one block, so that W is read once.
        B: (out, r) in fp32.
    """
    A, B, squares = A.contiguous(), B.contiguous(), squares.contiguous()
    out, features = W.shape
    norms = torch.empty(out, dtype=torch.float32, device=W.device)
    row_norms_kernel[(triton.cdiv(out, 32),)](
        W, A, B, A @ A.t(), squares, norms, out, features, len(A), *W.stride(), torch.finfo(torch.float32).tiny,
        BLOCK_ROWS=32, BLOCK_RANK=max(16, triton.next_power_of_2(len(A))), BLOCK_K=32, **OPTIONS,
    )  # fmt: skip
    return norms
