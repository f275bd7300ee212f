"""`lora_grouped` by Triton kernels: true ranks, no padding, no synchronisation with the host, y written in place.

Under `TRITON_INTERPRET=1` the same kernels run on CPU tensors, which is how they are tested without a GPU. Block sizes
are those that the shapes suggest; none has been tuned on a GPU yet.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lorakit.errors import UnsupportedError
from lorakit.ops.terms import product_dtype, result_dtype
from lorakit.ops.triton.kernels import expand_kernel, shrink_kernel
from lorakit.ops.triton.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.ops.bank import Bank
    from lorakit.ops.groups import Groups

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
PROGRAMS = 128
"""With fewer programs than this a GPU stands half empty, so the sum over the features is split."""
OPTIONS = {
    "enable_fp_fusion": True
}  # the default so far, which Triton 3.9 warns about unless it is spelled out


def lora_grouped(y: Tensor, x: Tensor, bank: Bank, groups: Groups) -> Tensor:
    """What `lorakit.ops.lora_grouped` returns, without gradients and dropout.

    Nothing here depends on who gets which adapter except what `Schedule` keeps on the device, so a captured CUDA graph
    serves another batch of the same sizes after `Schedule.of(captured, tokens).copy_(Schedule.of(new, tokens))`.

    Args:
        y: (N, ..., out) contiguous, the output of the base layer; written into.
        x: (N, ..., in), the input of the base layer; float32, bfloat16 or float16.
        bank: the adapters of this layer.
        groups: who of the N samples gets which.

    Returns:
        y.

    Raises:
        UnsupportedError: x has another dtype, or y is not contiguous.

    Source: Chen et al., 2023 (Punica), arXiv:2310.18547; Sheng et al., 2023 (S-LoRA), arXiv:2311.03285.
    """
    products = product_dtype(x, result_dtype(x))
    if products not in DTYPES or not y.is_contiguous():
        raise UnsupportedError(
            f"the Triton kernels of a mixed batch take contiguous float32, bfloat16 and float16, not a {products} product "
            f"into strides {y.stride()}; call lorakit.ops.lora_grouped"
        )
    with torch.no_grad():
        add_grouped_(y, x, bank, groups.on(x.device), products)
    return y


def add_grouped_(y: Tensor, x: Tensor, bank: Bank, groups: Groups, products: torch.dtype) -> None:
    """Add every sample's own adapter into y, contiguous; products in `products`, sums in float32."""
    tokens = prod(x.shape[1:-1])
    if not y.numel():
        return
    x = x.to(products).contiguous()
    schedule = Schedule.of(groups, tokens)
    A, B = bank.stacked(products)
    first_rows, scalings = bank.on_device("first_rows"), bank.on_device("scalings")
    widest, total = max(bank.ranks), x.shape[0] * tokens
    block_rank = min(64, max(16, triton.next_power_of_2(widest)))
    tiles, rank_blocks = len(schedule.tiles), triton.cdiv(widest, block_rank)
    block_k = 64 if products.itemsize == 2 else 32
    split = _split(tiles * rank_blocks, x.shape[-1] // block_k)
    h = torch.empty(split, total, widest, dtype=torch.float32, device=x.device)
    shared = (schedule.order, schedule.tiles, first_rows)
    multiply = product_type(products)
    shrink_kernel[(tiles, rank_blocks, split)](
        x, A, h, *shared, x.shape[-1], tokens, total, widest,
        BLOCK_ROWS=schedule.rows, BLOCK_RANK=block_rank, BLOCK_K=block_k, SPLIT=split, PRODUCTS=multiply,
        **OPTIONS,
    )  # fmt: skip
    biases = bank.biases() if bank.has_bias else y
    block_out = 64
    expand_kernel[(tiles, triton.cdiv(y.shape[-1], block_out))](
        h, B, y, scalings, biases, *shared, y.shape[-1], tokens, total, widest,
        BLOCK_ROWS=schedule.rows, BLOCK_RANK=block_rank, BLOCK_OUT=block_out, SPLIT=split, PRODUCTS=multiply,
        HAS_BIAS=bank.has_bias, **OPTIONS,
    )  # fmt: skip


def _split(programs: int, steps: int) -> int:
    """Into how many partial sums the features are cut: a power of two up to 16, each of four steps at least."""
    split = 1
    while split < 16 and programs * split < PROGRAMS and steps >= 8 * split:
        split *= 2
    return split


def product_type(dtype: torch.dtype) -> tl.dtype:
    """What `tl.dot` is given; the interpreter would multiply bfloat16 by its bits."""
    if not isinstance(shrink_kernel, triton.JITFunction):
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
