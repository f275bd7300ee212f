"""Dropout that is drawn again instead of stored: a seed of 8 bytes stands for the mask.

Each element is dropped with probability p, independently (p is met to 2**-32 or better). The seed comes from torch's
default generator, so `torch.manual_seed` fixes it and gradient checkpointing replays it. The numbers differ from those
of `torch.nn.functional.dropout`; the distribution does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Cost of the draw for 2**20 elements on one AVX2 core: skips take 22 ms * p, one 32-bit word an element takes 5 ms,
# `torch.nn.functional.dropout` 11 ms.
SKIP_UP_TO = 0.25


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
    """Dropped positions by drawing the gaps between them, which are geometric: floor(log U / log(1 - p))."""
    per_draw = 1 / math.log1p(-p)
    expected = count * p
    batch = int(expected + 6 * math.sqrt(expected)) + 16  # a second batch is needed less than once in 1e9
    parts, last = [], 0.0
    while last <= count:
        uniform = torch.empty(batch, dtype=torch.float64).uniform_(2.0**-53, 1.0, generator=generator)
        ends = uniform.log_().mul_(per_draw).floor_().add_(1).cumsum_(0).add_(last)
        parts.append(ends)
        last = ends[-1].item()
    ends = torch.cat(parts) if len(parts) > 1 else parts[0]
    inside = int(torch.searchsorted(ends, count, right=True))
    return ends[:inside].to(torch.int64).sub_(1)


def zeroed(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of x with the dropped elements zero; differentiable, and the kept ones are not scaled."""
    if dropped.dtype == torch.bool:
        return x * dropped.view(x.shape)
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def zero_(x: Tensor, dropped: Tensor) -> Tensor:
    """x, contiguous, with the dropped elements set to zero in place."""
    if dropped.dtype == torch.bool:
        return x.mul_(dropped.view(x.shape))
    x.view(-1).index_fill_(0, dropped, 0)
    return x
