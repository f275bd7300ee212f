"""Initialisers by name. A new scheme is one function and one row here."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import pad

from lorakit.config import LoftQConfig
from lorakit.errors import at_path
from lorakit.init.context import InitContext
from lorakit.init.corda import corda
from lorakit.init.loftq import loftq
from lorakit.init.lora_ga import lora_ga
from lorakit.init.random import gaussian, kaiming, orthogonal, random
from lorakit.init.spectral import mica, olora, pissa

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.init.context import InitResult
    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec

INITIALISERS: Mapping[str, Callable[[InitContext], InitResult]] = {
    "default": kaiming,
    "gaussian": gaussian,
    "random": random,
    "orthogonal": orthogonal,
    "eva": kaiming,  # until `initialize_lora_eva_weights` has seen data
    "pissa": pissa,
    "olora": olora,
    "mica": mica,
    "loftq": loftq,
    "corda": corda,
    "lora_ga": lora_ga,
}

OPTIONS: Mapping[str, Callable[[LoraConfig], object]] = {
    "loftq": lambda config: LoftQConfig(**cast("dict[str, int]", config.loftq_config)),
}
"""What a config says of a scheme, for those that have options; it becomes `AdapterSpec.init_options`."""

FROZEN: Mapping[str, frozenset[str]] = {"mica": frozenset({"B"})}
"""Which factors are never trained, by scheme."""
TAKES_OFF = frozenset({"pissa", "olora", "corda", "lora_ga"})
"""Schemes that give an offset (`InitResult.offset`)."""
REPLACES_BASE = frozenset({"loftq"})
"""Schemes that are meant to change the base (`InitResult.base_weight`)."""
FROM_WEIGHT = frozenset({"pissa", "olora", "mica", "loftq"})
"""Schemes that begin from a decomposition of the weight, or of what quantisation takes from it."""
_ASK = FROM_WEIGHT | REPLACES_BASE | {"orthogonal"}
"""Schemes that cannot begin on every weight."""
_FROM_SHAPES = frozenset({kaiming, gaussian, random, orthogonal})
"""Functions that look at no weight: none is got ready for them, and no graph could come of what they draw."""


def initialiser_name(init_lora_weights: bool | str) -> str:
    """The registry's name for a value of `LoraConfig.init_lora_weights`.

    True and False have names too. "pissa_niter_N" is "pissa", whose iteration stops by itself.
    """
    if isinstance(init_lora_weights, bool):
        return "default" if init_lora_weights else "random"
    return init_lora_weights.partition("_niter_")[0]


def initialiser_options(config: LoraConfig) -> object:
    """What `config` says of its scheme, or None where that has no options."""
    options = OPTIONS.get(initialiser_name(config.init_lora_weights))
    return None if options is None else options(config)


def why_not_begin(init: str, layout: Layout, r: int, *, on_grid: bool = False) -> str:
    """Why a scheme cannot begin an adapter of rank r on this weight, or an empty text.

    Args:
        init: its name here.
        layout: of the weight.
        r: the adapter's rank.
        on_grid: whether the weight is quantised.
    """
    if init not in _ASK:
        return ""
    rank, (out, inner) = layout.block_rank(r), layout.block_shape
    where = " for each group" if layout.groups > 1 else ""
    if init == "orthogonal" and rank % 2:
        return f"init_lora_weights='orthogonal' needs an even rank{where}, got {rank}"
    if init in REPLACES_BASE and on_grid:
        return (
            f"init_lora_weights={init!r} quantises the weight by itself, and this one is quantised already; set it to "
            "True, and call replace_lora_weights_loftq() afterwards"
        )
    most = min(out, inner // layout.groups)
    if init in FROM_WEIGHT and rank > most:
        return (
            f"init_lora_weights={init!r} begins from the weight, which has rank {most} at the most{where}, got {rank}; "
            "lower it by rank_pattern, or leave this one out with exclude_modules"
        )
    return ""


def initialise(spec: AdapterSpec, read: Callable[[torch.dtype], Tensor]) -> tuple[InitResult, ...]:
    """The new factors of each block of an adapter, by the scheme that its spec names.

    Args:
        spec: what is planned for the weight.
        read: gives the weight as `WeightCodec.peek` does; called only by schemes that look at it.

    Raises:
        NonFiniteError: a scheme that looks at the weight found NaN or infinity, or would begin with it.
    """
    scheme, blocks = INITIALISERS[spec.init], range(spec.layout.blocks)
    if scheme in _FROM_SHAPES:
        return tuple([scheme(InitContext(spec, read, block)) for block in blocks])
    once = cache(read)
    with at_path(spec.path), torch.no_grad():
        return tuple(
            [scheme(InitContext(spec, partial(_block, spec, once, block), block)) for block in blocks]
        )


def _block(
    spec: AdapterSpec, read: Callable[[torch.dtype], Tensor], block: int, dtype: torch.dtype
) -> Tensor:
    weight, layout = read(dtype), spec.layout
    if layout.experts:
        return weight[block]
    if layout.groups > 1:  # factors see the channels of all groups, so the block has zeros at those of others
        own = weight.chunk(layout.groups)[block]
        return pad(own, (block * own.shape[1], (layout.groups - 1 - block) * own.shape[1]))
    return weight
