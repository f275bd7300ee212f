"""How factors begin that are shorter than the layout's: not all schemes can choose them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.specs import AdapterSpec
    from lorakit.variants.variant import Start

_INDEPENDENT = frozenset({"default", "random", "gaussian"})
"""Schemes that draw every number by itself, so that a shorter factor can be drawn too."""


def check_scheme(spec: AdapterSpec, name: str) -> None:
    """Refuse schemes that choose a whole A or B.

    Raises:
        PlanError: says which module, and what to do.
    """
    if spec.init not in _INDEPENDENT:
        problem = (
            f"{spec.path}: init_lora_weights={spec.init!r} chooses whole factors, of which {name} has only parts; use "
            "True, False or 'gaussian'"
        )
        raise PlanError([problem])


def shortened(start: Start, shape: tuple[int, ...], *, bound: float) -> Tensor:
    """An A of another shape (r, less): uniform in ±bound, but under "gaussian" with that scheme's own deviation."""
    spec = start.spec
    if spec.init == "gaussian":
        return start.A[:, : shape[1]].contiguous()
    drawn = torch.empty(shape, dtype=torch.float32, device=spec.device).uniform_(-bound, bound)
    return drawn.to(spec.dtype)
