"""The dropout of the fused ops: its distribution, its replay in backward, and its dependence on the seed."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.ops import Term, lora_add, lora_linear
from lorakit.ops.dropout import draw_dropped, draw_seeds, zero_, zeroed

CPU = torch.device("cpu")
RATES = pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.25, 0.26, 0.5, 0.9])


def kept(count, p, seed):
    return zeroed(torch.ones(count), draw_dropped(count, p, seed, CPU))


def z_score(successes, trials, p):
    return abs(successes - trials * p) / math.sqrt(trials * p * (1 - p))


@RATES
def test_rate_and_independence_of_neighbours(p):
    n = 400_000
    gone = 1 - kept(n, p, 11)
    assert z_score(gone.sum().item(), n, p) < 4
    for lag in (1, 2, 7, 64):
        both = (gone[:-lag] * gone[lag:]).sum().item()
        assert z_score(both, n - lag, p * p) < 5


@RATES
def test_counts_of_blocks_are_binomial(p):
    block, blocks = 1000, 400
    counts = (1 - kept(block * blocks, p, 12)).view(blocks, block).sum(1).double()
    variance = block * p * (1 - p)
    chi_square = ((counts - block * p) ** 2 / variance).sum().item()
    assert abs(chi_square - blocks) < 5 * math.sqrt(2 * blocks + blocks / variance)


@RATES
def test_two_seeds_are_independent_and_one_seed_repeats(p):
    n = 400_000
    a, b = 1 - kept(n, p, 13), 1 - kept(n, p, 14)
    assert z_score((a * b).sum().item(), n, p * p) < 5
    assert torch.equal(a, 1 - kept(n, p, 13))


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_every_position_has_the_same_rate(p):
    n, draws = 40, 4000
    total = sum(1 - kept(n, p, seed) for seed in range(draws))
    z = (total.double() - draws * p) / math.sqrt(draws * p * (1 - p))
    assert z.abs().max() < 4.5
    assert abs((z**2).sum().item() - n) < 5 * math.sqrt(2 * n)


@pytest.mark.parametrize("p", [1e-12, 0.2, 0.25, 0.3, 0.999999])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1001])
def test_any_size(p, count):
    dropped = draw_dropped(count, p, 5, CPU)
    ones = torch.ones(count)
    assert torch.equal(zeroed(ones, dropped), zero_(ones.clone(), dropped))


def test_seeds_follow_torchs_generator():
    torch.manual_seed(0)
    a, b = draw_seeds(3), draw_seeds(3)
    torch.manual_seed(0)
    assert draw_seeds(3) == a
    assert len({*a, *b}) == 6


def one_hot_term(n, p):
    """An adapter that returns its dropped input: B A is the identity."""
    return Term(torch.eye(n).requires_grad_(), torch.eye(n), None, 1.0, p)


def through(op, x, terms):
    out = x.shape[-1]
    if op is lora_add:
        return lora_add(torch.zeros(x.shape), x, terms)
    return lora_linear(x, torch.zeros(out, out), None, terms)


OPS = pytest.mark.parametrize("op", [lora_add, lora_linear])


@OPS
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_backward_drops_what_forward_dropped_and_scales_alike(op, p):
    x = torch.ones(500, 20, requires_grad=True)
    term = one_hot_term(20, p)
    y = through(op, x, [term])
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.unique(y.detach()).tolist() == pytest.approx([0.0, 1 / (1 - p)])
    torch.testing.assert_close(term.A.grad[0], y.detach().sum(0), rtol=1e-5, atol=1e-4)
    assert z_score((y == 0).sum().item(), y.numel(), p) < 4


@OPS
@pytest.mark.parametrize("p", [0.05, 0.4])
def test_expectation_is_the_input(op, p):
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(2)
    draws = 2000
    with torch.no_grad():
        mean = sum(through(op, x, [one_hot_term(10, p)]) for _ in range(draws)) / draws
    z = (mean - x) / (x.abs() * math.sqrt(p / (1 - p) / draws))
    assert z.abs().max() < 4.5


@OPS
def test_adapters_drop_independently(op):
    p, x = 0.4, torch.ones(500, 20)
    with torch.no_grad():
        y = through(op, x, [one_hot_term(20, p), one_hot_term(20, p)._replace(scaling=3.0)])
    unit = (y * (1 - p)).round()
    for value, rate in [(0, p * p), (1, (1 - p) * p), (3, (1 - p) * p), (4, (1 - p) ** 2)]:
        assert z_score((unit == value).sum().item(), y.numel(), rate) < 4.5


@OPS
def test_probability_one_leaves_the_bias(op):
    term = Term(torch.eye(4), torch.eye(4), torch.ones(4), 2.0, 1.0)
    assert torch.equal(through(op, torch.ones(3, 4), [term]), torch.full((3, 4), 2.0))
