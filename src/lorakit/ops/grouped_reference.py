"""What a mixed batch means: each sample through its own adapter, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorakit.ops.reference import lora_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.groups import Groups
    from lorakit.ops.terms import Term


def lora_grouped_reference(y: Tensor, x: Tensor, terms: Sequence[Term | None], groups: Groups) -> Tensor:
    """`lora_reference` of every sample with the adapter that `groups` names for it.

    Args:
        y: (N, ..., out), the output of the base layer; not changed.
        x: (N, ..., in), the input of the base layer.
        terms: the adapters that ids may name; None for one that is not on this layer.
        groups: one id for each sample, -1 for the base alone.

    Returns:
        (N, ..., out) in the dtype of y. The products are computed in the dtype of x, or in autocast's.

    Source: Chen et al., 2023 (Punica), arXiv:2310.18547.
    """
    if not groups.samples:
        return y
    chosen = [None if i < 0 else terms[i] for i in groups.samples]
    return torch.stack(
        [lora_reference(y[k], x[k], [] if term is None else [term]) for k, term in enumerate(chosen)]
    )
