"""Pruning: exact numbers, ties, thresholds found and missed, probabilities; and the election by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.combiners import CombineOptions, merging, pruning
from lorakit.combiners.options import Job
from unit.combiners import naive

BIG = 4 * pruning._SAMPLE + 1  # the first size that the threshold is sought in a window


def job(**options):
    return Job((), (), CombineOptions(**options), torch.float32, None)


def values(kind, n):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    return {
        "normal": normal,
        "float16": normal.half().double(),
        "integers": (2 * normal).round(),
        "constant": torch.ones(n, dtype=torch.float64) * -2,
        "mostly zero": normal * (normal > 2),
        "ascending": torch.arange(n, dtype=torch.float64),
        "tiny": normal * 1e-300,
        "two levels": torch.where(torch.arange(n) % 2 == 0, 1.0, -3.0).double(),
        "periodic": normal[:4096].repeat(n // 4096 + 1)[:n],
    }[kind]


KINDS = [
    "normal",
    "float16",
    "integers",
    "constant",
    "mostly zero",
    "ascending",
    "tiny",
    "two levels",
    "periodic",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 37, 5000, BIG, 3 * BIG])
@pytest.mark.parametrize("density", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.99999, 1.0])
def test_exactly_the_k_largest_stay(kind, n, density):
    x = values(kind, n)
    before = x.clone()
    k = int(density * n)
    kept = pruning.keep_largest(x, job(density=density))
    # a stable sort by size: the first of equals are first
    order = x.abs().argsort(descending=True, stable=True)[:k]
    wanted = torch.zeros_like(x)
    wanted[order] = x[order]
    assert torch.equal(kept, wanted)
    assert torch.equal(x, before)


def test_a_window_that_misses_costs_time_only():
    """The sample sees one element in four, and these are the small ones."""
    x = torch.randn(BIG * 2, generator=torch.Generator().manual_seed(0)) + 10
    x[:: x.numel() // pruning._SAMPLE | 1] *= 1e-3
    k = x.numel() // 2
    assert torch.count_nonzero(pruning.largest(x, k)) == k
    assert pruning.largest(x, k).abs().sum() == pytest.approx(
        x.abs().sort(descending=True).values[:k].sum().item(), rel=1e-5
    )


def test_matrices_and_views():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    wanted = naive.pruned(x, 0.3)
    assert torch.equal(pruning.keep_largest(x, job(density=0.3)), wanted)
    assert torch.equal(pruning.keep_largest(x.t().contiguous().t(), job(density=0.3)), wanted)


def test_ties_are_settled_by_row_and_column():
    x = torch.tensor([[1.0, -2.0, 2.0], [2.0, -1.0, -2.0]])
    assert pruning.largest(x, 3).tolist() == [[0.0, -2.0, 2.0], [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_random_pruning_rescales(density):
    x = torch.full((400, 500), -2.0)
    torch.manual_seed(0)
    found = pruning.drop_random(x, job(density=density))
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(
        density, abs=5 * math.sqrt(density * (1 - density) / x.numel())
    )
    torch.testing.assert_close(found[kept], x[kept] / density)
    assert pruning.drop_random(x, job(density=1.0)) is x


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.4), (0.3, None), (0.95, None), (0.5, 0.0), (0.5, 1.0), (1.0, None)]
)
def test_small_elements_of_a_row_are_dropped_more_often(density, epsilon):
    columns, rows = 20, 20000
    row = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).double() + 1
    x = (row * torch.where(torch.arange(columns) % 2 == 0, 1, -1)).expand(rows, columns)
    torch.manual_seed(1)
    found = pruning.drop_by_rank(x, job(density=density, epsilon=epsilon))
    spread = min(0.2, density, 2 * (1 - density)) if epsilon is None else epsilon
    probability = density + spread * ((row - 0.5) / columns - 0.5)
    kept = found != 0
    frequency = kept.double().mean(dim=0)
    assert (frequency - probability).abs().max() <= 5 * 0.5 / math.sqrt(rows)
    torch.testing.assert_close(found[kept], (x / probability)[kept])


def test_rank_is_within_the_row(monkeypatch):
    """Rows of very different sizes are dropped alike, in one tile or in many."""
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(-30, 30, 64, dtype=torch.float64)[:, None]
    torch.manual_seed(2)
    whole = pruning.drop_by_rank(x, job(density=0.5))
    assert 0.3 < (whole[:8] != 0).double().mean() < 0.7
    monkeypatch.setattr(pruning, "tile_rows", lambda shape: 10)
    torch.manual_seed(2)
    tiled = pruning.drop_by_rank(x, job(density=0.5))
    assert ((tiled != 0).double().mean() - 0.5).abs() < 0.05
    assert tiled.shape == x.shape


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_election(majority):
    tensors = [
        torch.tensor([5.0, 1.0, 0.0, -1.0, 2.0]),
        torch.tensor([-1.0, -1.0, 0.0, -3.0, 0.0]),
        torch.tensor([-1.0, 0.0, 0.0, 9.0, 4.0]),
    ]
    weights = [1.0, 10.0, -100.0]
    found = merging.elected_mean(
        iter([t.clone() for t in tensors]), weights, job(majority_sign_method=majority)
    )
    first = 5.0 if majority == "total" else (-10.0 + 100.0) / 2
    fourth = -900.0 if majority == "total" else (-1.0 - 30.0) / 2
    # a tie is positive, zeros do not count
    assert found.tolist() == [first, 1.0, 0.0, fourth, (2.0 - 400.0) / 2]
    assert torch.equal(found, naive.elected(tensors, weights, majority))


def test_merging_leaves_what_it_is_given_alone():
    tensors = [torch.randn(4, 5) for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    for merge in (merging.weighted_sum, merging.elected_mean):
        merge(iter(tensors), [1.0, 2.0, -1.0], job())
        assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))
