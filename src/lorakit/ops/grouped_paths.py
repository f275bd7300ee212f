"""Three ways to add every sample's own adapter into a base output in place, without gradients.

They differ in what they move: `masked` multiplies too much and moves least, `blocked` fetches the factors of each block
of samples, `segments` calls one product for each run of neighbours. `lorakit.ops.grouped_costs` says which is cheapest
when.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

from lorakit.ops.bank import Stack
from lorakit.ops.grouped_compose import rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorakit.ops.bank import Bank
    from lorakit.ops.groups import Blocks, Groups


class Job(NamedTuple):
    """What a path is given. Samples lead; tokens of a sample are flattened."""

    out: Tensor
    """(N, S, out) contiguous, written into; any dtype."""
    x: Tensor
    """(N, S, in), in the dtype to multiply in."""
    bank: Bank
    groups: Groups


class Alphas(NamedTuple):
    """The scaling of each sample, or of each block."""

    common: float
    """The scaling of all of them, or 1.0."""
    own: Tensor | None
    """(blocks, 1, 1) where they differ, zero for base alone."""

    def apart(self, h: Tensor) -> Tensor:
        """h, (blocks, rows, r), times what differs; itself where nothing does."""
        return h if self.own is None else (h * self.own).to(h.dtype)

    def times(self, h: Tensor) -> Tensor:
        """h, (blocks, rows, r), times the scaling."""
        return h * self.common if self.own is None else (h * self.own).to(h.dtype)


def masked(job: Job, size: int = 0) -> None:  # noqa: ARG001 - every path has the same arguments
    """One product with every A in use, all but a sample's own block set to zero, one product with every B in use.

    Work grows with the number of adapters; nothing is gathered. Only for a bank that `is_finite`: zero times
    infinity is not zero.
    """
    out, x, bank, groups = job
    A, B = bank.select(groups.used, x.dtype)
    mask, common = _mask(bank, groups, x.dtype)
    h = linear(x, A)
    if x.dtype == torch.float16:  # may overflow under an adapter that the sample did not ask for
        h.masked_fill_(mask == 0, 0)
    h.mul_(mask)
    _add_product(out.view(-1, out.shape[-1]), h.view(-1, h.shape[-1]), B, common)


def blocked(job: Job, size: int) -> None:
    """One batched product over blocks of `size` samples that share an adapter.

    Size 1 takes the batch as it is and fetches the factors of each sample; larger ones bring samples of one adapter
    together, unless they are neighbours already, and fetch the factors of each block.
    """
    out, x, bank, groups = job
    blocks = groups.blocks(size)
    A, B = block_factors(bank, groups, size, x.dtype)
    alpha = alphas(groups, bank.scalings, size, x.dtype)
    add_block_products_(out, _shrink(take(blocks, x), A), B, blocks, alpha)


def _shrink(x: Tensor, A: Tensor) -> Tensor:
    """`x A^T` of each block: x (blocks, rows, in), A (blocks, r, in), to (blocks, rows, r).

    oneDNN reorders the right operand of a half precision product at every call, so where x is one row, A stands left: 41
    against 51 us for 8 blocks, 137 against 158 for 32, 257 against 311 for 64 (r=16, in=1024, Xeon with AMX). Not in
    float32, where it takes longer.
    """
    if x.shape[1] == 1 and x.dtype.itemsize == 2 and x.device.type == "cpu":
        return torch.bmm(A, x.transpose(1, 2)).view(len(x), 1, A.shape[1])
    return torch.bmm(x, A.transpose(1, 2))


def segments(job: Job, size: int = 0) -> None:  # noqa: ARG001
    """One product in place for each run of neighbouring samples with the same adapter."""
    out, x, bank, groups = job
    A, B = bank.stacked(x.dtype)
    first = bank.first_rows
    tokens = x.shape[1]
    x2, out2 = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for start, stop, adapter in groups.runs:
        own = slice(first[adapter], first[adapter + 1])
        part = slice(start * tokens, stop * tokens)
        _add_product(out2[part], linear(x2[part], A[own]), B[own], bank.scalings[adapter])


PATHS: dict[str, Callable[..., None]] = {
    "masked": masked,
    "blocked": blocked,
    "segments": segments,
}


def add_biases_(out: Tensor, bank: Bank, groups: Groups) -> None:
    """Add the scaled bias of each sample's adapter into `out`, (N, S, out)."""
    if bank.has_bias:
        out.add_(bank.biases().index_select(0, groups.slots).unsqueeze(1))


def block_factors(bank: Bank, groups: Groups, size: int, dtype: torch.dtype) -> Stack:
    """The factors of each block, A (blocks, r, in) and B (blocks, r, out), r the largest rank in use."""
    blocks, used = groups.blocks(size), groups.used
    rank = max([bank.ranks[i] for i in used])
    if blocks.owners == used and len({bank.ranks[i] for i in used}) == 1:
        found = bank.select(used, dtype)
    else:
        index = groups.once(
            ("rows", bank.ranks, size), lambda: rows(bank.first_rows, bank.ranks, blocks.owner, rank)
        )
        everything = bank.stacked(dtype)
        found = Stack(*[factor.index_select(0, index) for factor in everything])
    return Stack(*[factor.view(len(blocks.owners), rank, factor.shape[1]) for factor in found])


def alphas(groups: Groups, factors: tuple[float, ...], size: int, dtype: torch.dtype) -> Alphas:
    """The number among `factors`, one for each adapter, that belongs to each block of `size`."""
    made: Alphas = groups.once(
        ("alphas", factors, size, dtype), lambda: _alphas(groups, factors, size, dtype)
    )
    return made


def _alphas(groups: Groups, factors: tuple[float, ...], size: int, dtype: torch.dtype) -> Alphas:
    if len({factors[i] for i in groups.used}) == 1:
        return Alphas(factors[groups.used[0]], None)
    table = _exact([*factors, 0.0], dtype).to(groups.ids.device)
    return Alphas(1.0, table[groups.blocks(size).owner].view(-1, 1, 1))


def _exact(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The numbers in `dtype`, or in float32 if it would round one: a scaling that is off spoils every element alike."""
    wide = torch.tensor(numbers, dtype=torch.float64)
    narrow = wide.to(dtype)
    return (
        narrow if torch.equal(narrow.double(), wide) else wide.to(torch.promote_types(dtype, torch.float32))
    )


def _mask(bank: Bank, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(N, 1, rows in use): the scaling of a sample's own rows over the common one, and that; zero elsewhere."""
    made: tuple[Tensor, float] = groups.once(
        ("mask", bank.ranks, bank.scalings, dtype), lambda: _make_mask(bank, groups, dtype)
    )
    return made


def _make_mask(bank: Bank, groups: Groups, dtype: torch.dtype) -> tuple[Tensor, float]:
    used = groups.used
    device = groups.ids.device
    common = bank.scalings[used[0]] if len({bank.scalings[i] for i in used}) == 1 else 1.0
    owner = torch.tensor([i for i in used for _ in range(bank.ranks[i])], device=device)
    table = _exact([scaling / common for scaling in bank.scalings], dtype).to(device)
    mask = torch.where(groups.ids.unsqueeze(1) == owner, table[owner], 0)
    return mask.unsqueeze(1), common


def by_sample(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, ..., features) -> (N, S, features) in `dtype`."""
    t = t if t.dim() == 3 else t.reshape(t.shape[0], prod(t.shape[1:-1]), t.shape[-1])
    return t if t.dtype == dtype else t.to(dtype)


def take(blocks: Blocks, x: Tensor) -> Tensor:
    """(N, S, in) -> (blocks, size * S, in)."""
    if blocks.take is not None:
        x = x.index_select(0, blocks.take)
    return x.reshape(len(blocks.owners), blocks.size * x.shape[1], x.shape[2])


def _add_product(out: Tensor, h: Tensor, B: Tensor, alpha: float) -> None:
    if out.dtype == h.dtype:
        out.addmm_(h, B, alpha=alpha)
    else:
        out.add_(h @ B, alpha=alpha)


def add_block_products_(out: Tensor, h: Tensor, B: Tensor, blocks: Blocks, alpha: Alphas) -> None:
    """Add scaling times `h B`, (blocks, size * S, out), into the samples, (N, S, out), that stand in the blocks."""
    if blocks.take is not None:
        # not `add_(..., alpha=)`, which rounds alpha to bfloat16
        _put_back_(out, torch.bmm(alpha.times(h), B), blocks)
        return
    own, placed = alpha.apart(h), out.view(*h.shape[:2], out.shape[-1])
    if out.dtype == h.dtype:
        placed.baddbmm_(own, B, alpha=alpha.common)
    else:
        placed.add_(torch.bmm(own, B), alpha=alpha.common)


def _put_back_(out: Tensor, placed: Tensor, blocks: Blocks) -> None:
    """Add what stands in the blocks, repetitions left out, into `out`, (N, S, out)."""
    assert blocks.back is not None
    own = placed.view(len(blocks.owners) * blocks.size, *out.shape[1:]).index_select(0, blocks.back)
    if blocks.active is None:
        out.add_(own)
    else:
        out.index_add_(0, blocks.active, own.to(out.dtype))
