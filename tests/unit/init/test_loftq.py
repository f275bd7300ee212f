"""LoftQ against the plain algorithm: full SVDs in fp64, the same quantisers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakit import LoftQConfig
from lorakit.init import Misfit, initialise
from lorakit.init import loftq as module
from lorakit.init.loftq import ROUNDERS, fit, norm_of
from models import spec_of


def normal(out, inner, seed=0):
    return 0.02 * torch.randn(out, inner, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(W, bits, steps, r):
    """The error after each step, Li et al.'s algorithm 1 as written."""
    errors, lora = [], torch.zeros_like(W)
    for _ in range(steps):
        Q = ROUNDERS[bits]((W - lora).float()).double()
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        lora = (U[:, :r] * S[:r]) @ Vh[:r]
        errors.append((W - Q - lora).norm().item())
    return errors


def begin(W, bits, steps, *, r=8, alpha=8.0, dtype=torch.float32):
    spec = spec_of(tuple(W.shape), dtype, r=r, alpha=alpha, init="loftq")
    (result,) = initialise(replace(spec, init_options=LoftQConfig(bits, steps)), lambda wanted: W.to(wanted))
    return result


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape", [(256, 320), (320, 250)], ids=str)
@pytest.mark.parametrize("alpha", [8.0, 24.0, -3.0])
def test_no_worse_than_the_plain_algorithm(bits, steps, shape, alpha):
    """Whatever the scaling, which the plain algorithm knows nothing of."""
    W = normal(*shape)
    result = begin(W, bits, steps, alpha=alpha)
    errors = naive(W, bits, steps, 8)
    left = (W - result.base_weight - result.factors.delta(torch.float64)).norm().item()
    assert left <= min(errors) * (1 + 2e-4)  # a value near the middle of two levels may fall the other way
    assert result.misfit.after == pytest.approx(left, rel=1e-5)
    assert result.misfit.before == pytest.approx((W - ROUNDERS[bits](W.float())).norm().item(), rel=1e-5)
    assert torch.equal(ROUNDERS[bits](result.base_weight), result.base_weight)  # quantised, and stays so


def test_more_steps_get_closer_to_an_easy_weight():
    after = [begin(normal(256, 256), 4, steps).misfit.after for steps in (1, 2, 5)]
    assert after[0] > after[1] > after[2]


def test_the_best_step_is_kept(monkeypatch):
    """Later steps may lose what an earlier one had."""
    W = normal(96, 80).float()
    calls = []

    def worse_each_time(target):
        calls.append(1)
        return ROUNDERS[4](target) + 0.1 * (len(calls) - 1) * normal(96, 80, seed=9).float()

    monkeypatch.setattr(module, "ROUNDERS", {4: worse_each_time})
    result = begin(W, 4, 4)
    assert len(calls) == 4
    assert torch.equal(result.base_weight, ROUNDERS[4](W))


def test_a_weight_that_quantisation_does_not_change_leaves_nothing_to_fit():
    W = ROUNDERS[4](normal(96, 128).float())
    result = begin(W, 4, 2)
    assert torch.equal(result.base_weight, W)
    assert (result.factors.B == 0).all()
    assert (result.factors.A.norm(dim=1) > 0.1).all()
    assert (result.misfit.before, result.misfit.after) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fit_says_what_is_left(dtype):
    error = normal(200, 150).float()
    found = fit(error, 8, 2.0, dtype)
    assert found.factors.A.dtype == found.factors.B.dtype == dtype
    rest = error - found.factors.delta()
    assert (found.rest - rest).abs().max() <= 1e-7
    assert found.before == pytest.approx(error.norm().item(), rel=1e-5)
    assert found.after == pytest.approx(rest.norm().item(), rel=1e-5)


def test_norms_of_large_sums():
    assert norm_of(torch.full((3000, 1000), 0.1)) == pytest.approx(0.1 * 3e6**0.5, rel=1e-6)


def test_misfits_add_up_and_are_printed():
    total = Misfit.total([Misfit(30.0, 0.3, 0.0), Misfit(40.0, 0.4, 0.25)])
    assert total == pytest.approx((50.0, 0.5, 0.25))
    assert str(total) == "error 1.000% -> 0.500% of the weight's norm"
    assert str(Misfit(0.0, 0.0, 0.0)) == "error 0.000% -> 0.000% of the weight's norm"
