"""Dropout that is drawn again instead of stored: a seed of 8 bytes stands for the mask.

Each element is dropped with probability p, independently (p is met to 2**-32 or better). The seed comes from torch's
default generator, so `torch.manual_seed` fixes it and gradient checkpointing replays it. The numbers differ from those
of `torch.nn.functional.dropout`; the distribution does not.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

# Cost of the draw for 2**20 elements on a core with AVX-512: skips take 5 to 10 ms * p, one 32-bit word an element takes
# 2 ms, `torch.nn.functional.dropout` 5 to 7 ms.
SKIP_UP_TO = 0.25


# What the kernels for one adapter take: an index of 32 bits for each element, and all ranks in one block.
KERNEL_ELEMENTS, KERNEL_RANK = 2**31, 128
HALVES = frozenset(
    {torch.bfloat16, torch.float16}
)  # fp32 products have no tensor cores, and compile for a minute
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Seeded(NamedTuple):
    """Dropout that GPU kernels decide in registers, from the seed and an element's index; nothing is drawn beforehand.

    Attributes:
        p: probability of dropping an element.
        seed: from `draw_seeds`.
    """

    p: float
    seed: int


def decides_in_registers(A: Tensor, rows: int, products: torch.dtype) -> bool:
    """Whether kernels serve an adapter with dropout and this A, (r, in), on so many rows: on GPUs, with Triton."""
    fits = A.shape[0] <= KERNEL_RANK and rows * A.shape[1] < KERNEL_ELEMENTS
    return A.is_cuda and fits and products in HALVES and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def draw_seeds(count: int) -> list[int]:
    """`count` seeds from torch's default CPU generator."""
    seeds: list[int] = torch.empty(count, dtype=torch.int64, device="cpu").random_().tolist()
    return seeds


def draw_dropped(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Which of `count` elements a dropout of probability p takes away; a pure function of its arguments.

    Args:
        count: the number of elements.
        p: probability of dropping one, 0 < p < 1.
        seed: from `draw_seeds`.
        device: where the elements live.

    Returns:
        Either the dropped positions in ascending order, int64, or for each element whether it is kept, bool (count,).
        `zeroed` and `zero_` take both.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if device.type != "cpu":
        return torch.empty(count, dtype=torch.bool, device=device).bernoulli_(1 - p, generator=generator)
    if p <= SKIP_UP_TO:
        return _skips(count, p, generator)
    words = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int32)[:count] >= round(p * 2**32) - 2**31


def _skips(count: int, p: float, generator: torch.Generator) -> Tensor:
    """Dropped positions by drawing the gaps between them, which are geometric: floor(log U / log(1 - p)).

    U is (w + 1/2) / 2**32 for a 32-bit word w: half the random numbers that a float64 would take, and never 0 or 1, so
    that floor + 1 is ceil.
    """
    per_draw = 1 / math.log1p(-p)
    expected = count * p
    words = (int(expected + 6 * math.sqrt(expected)) + 17) // 2  # more draws are needed less than once in 1e9
    parts, last = [], -1.0
    while last < count:
        drawn = torch.empty(words, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        steps = drawn.view(torch.int32).to(torch.float64).add_(2**31 + 0.5).log_()
        steps = steps.sub_(32 * math.log(2)).mul_(per_draw).ceil_()
        steps[0] += last
        parts.append(steps.cumsum_(0))
        last = steps[-1].item()
    ends = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ends[: int(torch.searchsorted(ends, count))].to(torch.int64)


def zeroed(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of x with the dropped elements zero; differentiable, and the kept ones are not scaled."""
    if dropped.dtype == torch.bool:
        return x * dropped.view(x.shape)
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def add_undropped_(total: Tensor, left: Tensor, right: Tensor, dropped: Tensor) -> Tensor:
    """`total`, contiguous, plus the elements of `left @ right` that are not dropped, in place.

    Of positions, the product is added whole and the dropped elements are put back: 0.37 ms for 2**20 elements in
    bfloat16 with p=0.05, against 0.79 for a product of its own, its zeros and its addition.
    """
    if dropped.dtype == torch.bool:
        return total.add_(zero_(left @ right, dropped))
    flat = total.view(-1)
    before = flat.index_select(0, dropped)
    total.addmm_(left, right)
    flat.index_copy_(0, dropped, before)
    return total


def zero_(x: Tensor, dropped: Tensor) -> Tensor:
    """x, contiguous, with the dropped elements set to zero in place."""
    if dropped.dtype == torch.bool:
        return x.mul_(dropped.view(x.shape))
    x.view(-1).index_fill_(0, dropped, 0)
    return x
