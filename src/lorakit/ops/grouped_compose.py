"""A mixed batch in plain differentiable torch calls that never look at the ids on the host.

It runs where a hand-written node cannot (see `lorakit.ops.reference`), and in a backward that is differentiated in turn.
A compiled graph of it serves every assignment of samples to adapters. Because all adapters are part of the graph,
unused ones get gradients of zero, and with few tokens a NaN in one adapter reaches the samples of all.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.terms import Term


class _Table(NamedTuple):
    """Factors one below the other, a row of zeros last, and which rows are whose."""

    A: Tensor
    B: Tensor
    ranks: list[int]
    first: list[int]


def compose_terms(
    x: Tensor, ids: Tensor, terms: Sequence[Term | None], *, scale: Tensor | None = None
) -> Tensor:
    """What the adapters add to the output of the base, differentiable in x and in every factor.

    Args:
        x: (N, S, in).
        ids: (N,) int64, -1 for the base alone, which is also the index of the last row of every table here: zero.
        terms: the adapters that ids may name; every one of them becomes part of the graph.
        scale: (N, S, in), what dropout multiplies x with; None draws it by the dropouts of the terms.

    Returns:
        (N, S, out) in the dtype of x, or in autocast's.
    """
    there = [term for term in terms if term is not None]
    if scale is None and any(term.dropout for term in there):
        scale = _dropout_scale(x, ids, [0.0 if term is None else term.dropout for term in terms])
    if scale is not None:
        x = x * scale
    table = _table(x, terms)
    scalings = _scalings(x, terms)[ids]
    # the same rule as in `grouped_costs`: with few tokens, fetching the factors of each sample moves most
    product = _masked if x.shape[1] < max(table.ranks) else _fetched
    delta = product(x, table, ids, scalings.view(-1, 1, 1))
    if all(term.bias is None for term in there):
        return delta
    biases = _biases(there[0], terms)[ids]
    return delta + (biases * scalings.unsqueeze(1)).unsqueeze(1).to(delta.dtype)


def _scalings(x: Tensor, terms: Sequence[Term | None]) -> Tensor:
    """(count + 1,) in float32 at least; zero for an adapter that is not there, and last."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scalings = [*[0.0 if term is None else term.scaling for term in terms], 0.0]
    if not any(isinstance(scaling, torch.Tensor) for scaling in scalings):
        return torch.tensor(scalings, dtype=wide, device=x.device)
    return torch.stack([torch.as_tensor(scaling, dtype=wide, device=x.device) for scaling in scalings])


def _table(x: Tensor, terms: Sequence[Term | None]) -> _Table:
    there = [term for term in terms if term is not None]
    A = torch.cat([term.A.to(x.dtype) for term in there])
    B = torch.cat([term.B.t().to(x.dtype) for term in there])
    ranks = [0 if term is None else term.A.shape[0] for term in terms]
    first = [0, *accumulate(ranks)]
    return _Table(
        torch.cat([A, A.new_zeros(1, A.shape[1])]), torch.cat([B, B.new_zeros(1, B.shape[1])]), ranks, first
    )


def _masked(x: Tensor, table: _Table, ids: Tensor, scalings: Tensor) -> Tensor:
    owner = torch.tensor([i for i, rank in enumerate(table.ranks) for _ in range(rank)], device=x.device)
    h = linear(x, table.A[:-1])
    own = torch.where(owner == ids.view(-1, 1, 1), (h * scalings).to(h.dtype), 0)
    return linear(own, table.B[:-1].t())


def _fetched(x: Tensor, table: _Table, ids: Tensor, scalings: Tensor) -> Tensor:
    rank = max(table.ranks)
    index = rows(table.first, table.ranks, ids, rank)
    A, B = (factor[index].view(-1, rank, factor.shape[1]) for factor in table[:2])
    h = torch.bmm(x, A.transpose(1, 2))
    return torch.bmm((h * scalings).to(h.dtype), B)


def rows(first: Sequence[int], ranks: Sequence[int], slots: Tensor, rank: int) -> Tensor:
    """Which rows of the stacked factors belong to each slot, (slots * rank,) int64; the last row beyond its own rank."""
    begin = torch.tensor(first, device=slots.device)
    own = torch.tensor([*ranks, 0], device=slots.device)
    steps = torch.arange(rank, device=slots.device)
    inside = steps < own[slots].unsqueeze(1)
    return torch.where(inside, begin[slots].unsqueeze(1) + steps, begin[-1]).view(-1)


def _dropout_scale(x: Tensor, ids: Tensor, dropouts: Sequence[float]) -> Tensor:
    p = torch.tensor([*dropouts, 0.0], device=x.device)[ids].view(-1, 1, 1)
    return torch.where(torch.rand(x.shape, device=x.device) >= p, 1 / (1 - p), 0.0).to(x.dtype)


def _biases(some: Term, terms: Sequence[Term | None]) -> Tensor:
    zero = some.B.new_zeros(some.B.shape[0])
    return torch.stack([zero if term is None or term.bias is None else term.bias for term in terms] + [zero])
