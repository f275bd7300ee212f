"""Combiners by name. A new one is one function and one row here.

All but the last four are PEFT's values of `combination_type` and compute what PEFT's do. With one adapter PEFT prunes
nothing; `alone` names what is done instead here.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lorakit.combiners.elementwise import on_deltas, on_factors, sce, whole
from lorakit.combiners.factored import cat, exact_sum, slerp, svd
from lorakit.combiners.merging import elected_mean, weighted_sum
from lorakit.combiners.options import Method
from lorakit.combiners.pruning import drop_by_rank, drop_random, keep_largest

if TYPE_CHECKING:
    from collections.abc import Mapping

_REDUCES = frozenset({"energy"})

METHODS: Mapping[str, Method] = {
    "linear": Method(partial(on_factors, prune=whole, merge=weighted_sum), equal_ranks=True),
    "cat": Method(cat),
    "svd": Method(svd, uses=_REDUCES),
    "ties": Method(
        partial(on_factors, prune=keep_largest, merge=elected_mean),
        density=True,
        equal_ranks=True,
        alone="linear",
    ),
    "ties_svd": Method(
        partial(on_deltas, prune=keep_largest, merge=elected_mean), uses=_REDUCES, density=True, alone="svd"
    ),
    "dare_linear": Method(
        partial(on_factors, prune=drop_random, merge=weighted_sum),
        density=True,
        rescales=True,
        equal_ranks=True,
        alone="linear",
    ),
    "dare_linear_svd": Method(
        partial(on_deltas, prune=drop_random, merge=weighted_sum),
        uses=_REDUCES,
        density=True,
        rescales=True,
        alone="svd",
    ),
    "dare_ties": Method(
        partial(on_factors, prune=drop_random, merge=elected_mean),
        density=True,
        rescales=True,
        equal_ranks=True,
        alone="linear",
    ),
    "dare_ties_svd": Method(
        partial(on_deltas, prune=drop_random, merge=elected_mean),
        uses=_REDUCES,
        density=True,
        rescales=True,
        alone="svd",
    ),
    "magnitude_prune": Method(
        partial(on_factors, prune=keep_largest, merge=weighted_sum),
        density=True,
        equal_ranks=True,
        alone="linear",
    ),
    "magnitude_prune_svd": Method(
        partial(on_deltas, prune=keep_largest, merge=weighted_sum), uses=_REDUCES, density=True, alone="svd"
    ),
    "sum": Method(exact_sum, uses=_REDUCES),
    "della": Method(
        partial(on_deltas, prune=drop_by_rank, merge=elected_mean),
        uses=_REDUCES | {"epsilon"},
        density=True,
        rescales=True,
    ),
    "sce": Method(sce, uses=_REDUCES, density=True, alone="svd"),
    "slerp": Method(slerp, uses=_REDUCES | {"t"}, exactly=2),
}
