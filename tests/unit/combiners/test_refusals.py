"""Everything that is refused, each by an error that names it, and all at once."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.combiners import METHODS, CombineOptions, check_request, combine
from lorakit.errors import ConfigError, NonFiniteError
from lorakit.types import Factors
from unit.combiners import naive

NONE = CombineOptions()


@pytest.mark.parametrize(
    ("method", "count", "weights", "options", "says"),
    [
        ("tie", 2, [1, 1], NONE, r"combination_type='tie' is not known; did you mean 'ties'"),
        ("dare_tie_svd", 2, [1, 1], NONE, r"did you mean 'dare_ties_svd'"),
        ("", 2, [1, 1], NONE, r"known are linear, cat, svd"),
        ("linear", 0, [], NONE, r"no adapters"),
        ("linear", 2, [1], NONE, r"1 weight\(s\) for 2 adapter\(s\)"),
        ("linear", 1, [1, 1], NONE, r"2 weight\(s\) for 1 adapter\(s\)"),
        ("linear", 2, [1, math.nan], NONE, r"weight 1 must be a finite number, got nan"),
        ("linear", 2, [-math.inf, 1], NONE, r"weight 0 must be a finite number, got -inf"),
        ("linear", 2, ["1", 1], NONE, r"weight 0 must be a finite number, got '1'"),
        ("linear", 2, [True, 1], NONE, r"weight 0 must be a finite number, got True"),
        ("slerp", 3, [1, 1, 1], NONE, r"'slerp' combines exactly 2 adapters, got 3"),
        ("slerp", 1, [1], NONE, r"'slerp' combines exactly 2 adapters, got 1"),
        ("dare_ties", 2, [1, 1], CombineOptions(density=0.0), r"density must be above 0"),
        ("della", 1, [1], CombineOptions(density=0), r"density must be above 0"),
        ("della", 1, [1], NONE, r"'della' needs density"),
        ("della", 2, [1, 1], CombineOptions(density=0.1, epsilon=0.3), r"density=0.1 and epsilon=0.3"),
        ("della", 2, [1, 1], CombineOptions(density=0.9, epsilon=0.3), r"density=0.9 and epsilon=0.3"),
        (
            "della",
            2,
            [1, 1],
            CombineOptions(density=0.9, epsilon=-0.1),
            r"epsilon must be a number in \[0, 1\]",
        ),
        ("svd", 2, [1, 1], CombineOptions(epsilon=0.1), r"epsilon has no effect under 'svd'"),
        ("svd", 2, [1, 1], CombineOptions(t=0.1), r"t has no effect under 'svd'"),
        ("ties", 2, [1, 1], CombineOptions(density=0.5, energy=0.1), r"energy has no effect under 'ties'"),
        ("svd", 2, [1, 1], CombineOptions(svd_clamp=0.0), r"svd_clamp must be a number in \(0, 1\]"),
        ("svd", 2, [1, 1], CombineOptions(svd_clamp=1.01), r"svd_clamp"),
        ("svd", 2, [1, 1], CombineOptions(svd_clamp=math.nan), r"svd_clamp"),
        ("svd", 2, [1, 1], CombineOptions(energy=0.0), r"energy must be a number in \(0, 1\]"),
        ("svd", 2, [1, 1], CombineOptions(energy=1.5), r"energy"),
        ("svd", 2, [1, 1], CombineOptions(rank=0), r"rank must be a whole number from 1 up"),
        ("svd", 2, [1, 1], CombineOptions(rank=4.0), r"rank"),
        ("svd", 2, [1, 1], CombineOptions(rank=True), r"rank"),
        ("svd", 2, [1, 1], CombineOptions(svd_driver="gesdd"), r"svd_driver must be 'gesvd'"),
        ("svd", 2, [1, 1], CombineOptions(svd_full_matrices=None), r"svd_full_matrices"),
        ("svd", 2, [1, 1], CombineOptions(seed=-1), r"seed"),
        ("svd", 2, [1, 1], CombineOptions(seed=1.5), r"seed"),
        (
            "ties",
            2,
            [1, 1],
            CombineOptions(density=0.5, majority_sign_method="most"),
            r"majority_sign_method",
        ),
        ("slerp", 2, [1, 1], CombineOptions(t=1.5), r"t must be a number in \[0, 1\]"),
    ],
)
def test_requests(method, count, weights, options, says):
    with pytest.raises(ConfigError, match=says):
        check_request(method, count, weights, options)
    with pytest.raises(ConfigError, match=says):
        combine(naive.parts_of((6, 5), [2] * count), weights, method, options)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.density])
def test_densities(method):
    with pytest.raises(ConfigError, match=f"'{method}' needs density"):
        check_request(method, 2, [1, 1], NONE)
    for density in (-0.1, 1.1, math.nan, "0.5", True):
        with pytest.raises(ConfigError, match=r"density must be a number in \[0, 1\]"):
            check_request(method, 2, [1, 1], CombineOptions(density=density))
    check_request(method, 2, [1, 1], CombineOptions(density=1))
    check_request(method, 2, [1, -1.5], CombineOptions(density=0.5))


def test_everything_at_once():
    options = CombineOptions(
        density=2, rank=0, svd_clamp=0, energy=2, t=3, seed="x", epsilon=9, svd_driver="y"
    )
    with pytest.raises(ConfigError) as caught:
        check_request("nothing", 3, [1, math.nan], options)
    for word in (
        "nothing",
        "2 weight",
        "weight 1",
        "density",
        "rank",
        "svd_clamp",
        "energy",
        "t must",
        "seed",
        "epsilon",
        "svd_driver",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_shapes_that_differ(method):
    parts = [*naive.parts_of((6, 5), [2]), *naive.parts_of((5, 6), [2])]
    with pytest.raises(ConfigError, match=r"\[\(5, 6\), \(6, 5\)\]"):
        combine(parts, [1, 1], method, CombineOptions(density=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_differ(method):
    parts = naive.parts_of((6, 5), [2, 3])
    if METHODS[method].equal_ranks:
        with pytest.raises(ConfigError, match=r"equal ranks, found \[2, 3\]; use 'sum', 'cat' or 'svd'"):
            combine(parts, [1, 1], method, CombineOptions(density=0.5))
    else:
        combine(parts, [1, 1], method, CombineOptions(density=0.5))


def test_devices_that_differ():
    part = naive.parts_of((6, 5), [2])[0]
    away = Factors(part.A.to("meta"), part.B.to("meta"), 1.0)
    with pytest.raises(ConfigError, match=r"several devices: cpu, meta"):
        combine([part, away], [1, 1], "linear")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["A", "B", "bias"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_parts_that_are_not_finite(method, side, bad):
    parts = naive.parts_of((6, 5), [2, 2], bias=True)
    getattr(parts[1], side).view(-1)[1] = bad
    with pytest.raises(NonFiniteError, match=f"adapter 1: {side} holds NaN or infinity"):
        combine(parts, [1, 1], method, CombineOptions(density=0.5))


def test_scaling_that_is_not_finite():
    part = naive.parts_of((6, 5), [2])[0]
    with pytest.raises(NonFiniteError, match="adapter 0: scaling is nan"):
        combine([Factors(part.A, part.B, math.nan)], [1], "cat")


@pytest.mark.parametrize("method", METHODS)
def test_results_that_do_not_fit(method):
    parts = naive.parts_of((6, 5), [2, 2], torch.float16, bias=True)
    with pytest.raises(NonFiniteError, match=r"torch\.float16"):
        combine(parts, [1e12, 1e12], method, CombineOptions(density=0.5))


def test_a_quantile_that_leaves_nothing():
    parts = naive.parts_of((30, 20), [4, 4])
    with pytest.raises(ConfigError, match=r"svd_clamp=0.1: .* give one near 1"):
        combine(parts, [1, 1], "svd", CombineOptions(svd_clamp=0.1))
