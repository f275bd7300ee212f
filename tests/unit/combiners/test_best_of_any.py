"""Eckart and Young for any shapes, ranks, weights and scalings: no factors of that rank come nearer than those of `svd`."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.combiners import CombineOptions, combine
from lorakit.types import Factors
from unit.combiners import naive

sizes = st.integers(1, 24)
numbers = st.floats(-4, 4).filter(lambda value: value == 0 or abs(value) > 1e-3)


@st.composite
def requests(draw):
    out, features, seed = draw(sizes), draw(sizes), draw(st.integers(0, 10_000))
    ranks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    parts = [
        Factors(part.A, part.B, draw(numbers))
        for part in naive.parts_of(
            (out, features), ranks, draw(st.sampled_from([torch.float64, torch.float32])), seed=seed
        )
    ]
    weights = draw(st.lists(numbers, min_size=len(ranks), max_size=len(ranks)))
    return parts, weights, draw(st.integers(1, 30))


@given(requests(), st.sampled_from(["svd", "sum"]))
@settings(deadline=None, max_examples=300, derandomize=True, database=None)
def test_svd_of_factors_is_the_best_of_its_rank(request, method):
    parts, weights, rank = request
    found = combine(parts, weights, method, CombineOptions(rank=rank))
    wanted = naive.weighted(parts, weights)
    scale = sum(abs(w) * naive.delta(p).norm() for p, w in zip(parts, weights, strict=True))
    slack = (1e-12 if found.factors.A.dtype == torch.float64 else 1e-5) * scale
    least = torch.linalg.svdvals(wanted)[rank:].norm()
    assert (wanted - found.factors.delta(torch.float64)).norm() <= least + slack
    assert abs(found.error - least) <= slack
    assert found.factors.rank == rank
    assert 0 <= found.kept <= 1
