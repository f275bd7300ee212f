"""Refusing what cannot be combined, with every reason at once."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch

from lorakit.combiners.registry import METHODS
from lorakit.config import NearNames
from lorakit.errors import ConfigError, NonFiniteError, bullet_list
from lorakit.ops import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorakit.combiners.options import CombineOptions, Method
    from lorakit.types import Factors

_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
_MAJORITIES = ("total", "frequency")
_OWN = ("energy", "t", "epsilon")


def check_request(method: str, count: int, weights: Sequence[float], options: CombineOptions) -> None:
    """Refuse a request that no set of adapters could satisfy; nothing but its arguments is looked at.

    Args:
        method: a name in `METHODS`.
        count: the number of adapters.
        weights: one for each adapter; negative ones are allowed.
        options: see `CombineOptions`.

    Raises:
        ConfigError: with every problem found: a method that is not known, too few or too many adapters or weights, a
            weight that is no finite number, an option that is missing, of a wrong type, out of range, or of no use to
            the method.
    """
    problems = [*_about_weights(count, weights)]
    row = METHODS.get(method)
    if row is None:
        near = NearNames(METHODS)(str(method))
        problems.append(f"combination_type={method!r} is not known{near}; known are {', '.join(METHODS)}")
    else:
        problems += _about_count(method, row, count)
        problems += _about_density(method, row, count, options)
        problems += [
            f"{name} has no effect under {method!r}; leave it out"
            for name in _OWN
            if name not in row.uses and getattr(options, name) is not None
        ]
    problems += _about_options(options)
    if problems:
        raise ConfigError(bullet_list(f"cannot combine {count} adapter(s)", problems))


def check_parts(method: str, parts: Sequence[Factors]) -> None:
    """Refuse factors that do not go together.

    Raises:
        ConfigError: weights of several shapes, tensors on several devices, or different ranks where the method needs
            equal ones.
        NonFiniteError: a factor or bias holds NaN or infinity.
    """
    problems = []
    if len(shapes := {part.shape for part in parts}) > 1:
        problems.append(f"adapters of one weight have one shape (out, in), found {sorted(shapes)}")
    if len(devices := {str(part.A.device) for part in parts} | {str(part.B.device) for part in parts}) > 1:
        problems.append(f"the factors are on several devices: {', '.join(sorted(devices))}; move them to one")
    if METHODS[method].equal_ranks and len({part.rank for part in parts}) > 1:
        problems.append(
            f"{method!r} adds A to A and B to B and needs equal ranks, found {[part.rank for part in parts]}; "
            "use 'sum', 'cat' or 'svd', or a method that ends in '_svd'"
        )
    if problems:
        raise ConfigError(bullet_list(f"cannot combine {len(parts)} adapter(s) by {method!r}", problems))
    bad = [
        f"adapter {number}: {name} holds NaN or infinity"
        for number, part in enumerate(parts)
        for name in not_finite(part)
    ]
    bad += [
        f"adapter {n}: scaling is {p.scaling}" for n, p in enumerate(parts) if not math.isfinite(p.scaling)
    ]
    if bad:
        raise NonFiniteError(bullet_list(f"cannot combine by {method!r}", bad))


def not_finite(factors: Factors) -> list[str]:
    """Which tensors of these factors hold NaN or infinity."""
    tensors = {"A": factors.A, "B": factors.B, "bias": factors.bias}
    return [name for name, tensor in tensors.items() if tensor is not None and not is_finite(tensor)]


def _about_weights(count: int, weights: Sequence[float]) -> Iterator[str]:
    if count < 1:
        yield "no adapters were given; give one or more"
    if len(weights) != count:
        yield f"{len(weights)} weight(s) for {count} adapter(s); give one each"
    for number, weight in enumerate(weights):
        if not _number(weight):
            yield f"weight {number} must be a finite number, got {weight!r}"


def _about_count(method: str, row: Method, count: int) -> Iterator[str]:
    if row.exactly is not None and count != row.exactly:
        yield f"{method!r} combines exactly {row.exactly} adapters, got {count}"


def _about_density(method: str, row: Method, count: int, options: CombineOptions) -> Iterator[str]:
    density, pruned = options.density, row.density and (count > 1 or row.alone is None)
    if density is None:
        if pruned:
            yield f"{method!r} needs density, the share of the elements to keep, in [0, 1]"
        return
    if row.rescales and pruned and density == 0:
        yield f"density must be above 0 under {method!r}, which divides by it"
    spread = options.epsilon if "epsilon" in row.uses else None
    sound = _within(density, 0, 1) and _within(spread, 0, 1)
    if spread is not None and sound and not spread / 2 <= density <= 1 - spread / 2:
        yield f"density ± epsilon / 2 must lie in [0, 1], got density={density} and epsilon={spread}"


def _about_options(options: CombineOptions) -> Iterator[str]:
    for name, accepts, wanted in _RULES:
        value = getattr(options, name)
        if not accepts(value):
            yield f"{name} must be {wanted}, got {value!r}"


def _number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, Real) and _number(value) and low <= float(value) <= high


def _whole(value: object, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= least


def _share(value: object) -> bool:
    return value is None or (_within(value, 0, 1) and value != 0)


def _fraction(value: object) -> bool:
    return value is None or _within(value, 0, 1)


_RULES: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("density", _fraction, "a number in [0, 1], or None"),
    ("majority_sign_method", lambda value: value in _MAJORITIES, "'total' or 'frequency'"),
    ("rank", lambda value: value is None or _whole(value, 1), "a whole number from 1 up, or None"),
    ("svd_clamp", _share, "a number in (0, 1], or None"),
    ("svd_full_matrices", lambda value: isinstance(value, bool), "True or False"),
    ("svd_driver", lambda value: value in _DRIVERS, "'gesvd', 'gesvdj', 'gesvda' or None"),
    (
        "seed",
        lambda value: value is None or isinstance(value, torch.Generator) or _whole(value, 0),
        "a whole number from 0 up, a torch.Generator, or None",
    ),
    ("energy", _share, "a number in (0, 1], or None"),
    ("t", _fraction, "a number in [0, 1], or None"),
    ("epsilon", _fraction, "a number in [0, 1], or None"),
)
