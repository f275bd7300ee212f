"""LoftQ: the factors that make up best for what quantisation takes from a weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.config import LoftQConfig
from lorakit.init.context import InitResult, Misfit, narrowed
from lorakit.init.spectral import balanced, on_meta
from lorakit.ops.low_rank import truncated_svd
from lorakit.ops.quantise import round_int8, round_nf4, round_uniform
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.init.context import InitContext

ROUNDERS: Mapping[int, Callable[[Tensor], Tensor]] = {
    2: lambda W: round_uniform(W, 4),
    4: round_nf4,
    8: round_int8,
}
"""How a weight is quantised, by bits.

With 4 and 8 bits as bitsandbytes does it, so that the base, quantised by it afterwards, keeps the values that the
factors were made for. Of 2 bits, four evenly spaced values miss normal numbers by 0.51 of their norm; those of LoftQ's
normal map, -1, 0, 0.34 and 1, by 0.56.
"""

# The error of quantisation is close to noise, whose leading part is flat: this far off the best part, the error that is
# left was 1e-7 of itself above the least (1024 x 1024, 2, 4 and 8 bits), and the SVD takes 0.6 of the time of 1e-4.
RESIDUAL_TOL = 3e-2


class Fit(NamedTuple):
    """What factors make of the error of a quantised weight.

    Attributes:
        factors: its best part of their rank, within `RESIDUAL_TOL`.
        rest: (out, in), the error less their delta.
        before: Frobenius norm of the error.
        after: of the rest.
    """

    factors: Factors
    rest: Tensor
    before: float
    after: float


def loftq(context: InitContext) -> InitResult:
    """The base is quantised, and the adapter begins as the best rank-r fit of what that lost; alternately, several times.

    `Q = quantise(W - scaling * B A)`, then `scaling * B A = SVD_r(W - Q)`, beginning with B A = 0. The result is the
    step that ends closest to W, since not every step gets closer. `base_weight` is its Q, dequantised.

    The options of the spec are a `LoftQConfig`: bits, and the number of steps.

    Source: Li et al., 2023, arXiv:2310.08659.
    """
    if context.spec.device.type == "meta":
        return InitResult(on_meta(context), base_weight=torch.empty(context.shape, device="meta"))
    options = context.spec.init_options
    assert isinstance(options, LoftQConfig)
    quantise, W = ROUNDERS[options.loftq_bits], context.weight()
    before, best, wanted = math.nan, None, W
    for step in range(options.loftq_iter):
        Q = quantise(wanted)
        found = fit(W - Q, context.rank, context.spec.scaling, context.spec.dtype)
        if step == 0:
            before = found.before
        if best is None or found.after < best[0]:
            best = found.after, found.factors, Q
        wanted = found.rest.add_(Q)
    assert best is not None, "loftq_iter is positive"
    after, factors, Q = best
    return InitResult(
        context.factors(factors.A, factors.B), base_weight=Q, misfit=Misfit(norm_of(W), before, after)
    )


def fit(error: Tensor, rank: int, scaling: float, dtype: torch.dtype) -> Fit:
    """Factors in `dtype` that make up for an error (out, in) of float32 or float64.

    Raises:
        NonFiniteError: the error holds NaN or infinity, or the factors more than `dtype` can hold.
    """
    svd = truncated_svd(error, rank, tol=RESIDUAL_TOL)
    wide = balanced(svd, scaling)
    factors = Factors(narrowed(wide.A, dtype), narrowed(wide.B, dtype), scaling)
    rest = torch.addmm(error, factors.B.to(error.dtype), factors.A.to(error.dtype), alpha=-scaling)
    return Fit(factors, rest, math.sqrt(svd.energy), norm_of(rest))


def norm_of(W: Tensor) -> float:
    """The Frobenius norm; summed row by row, since one float32 sum over 16 M squares is wrong in the fourth digit."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(W, dim=1), dtype=torch.float64))
