"""What the ops are given, one `Term` for each active adapter; the dtype of their products, and the shape of what they give.

The dtype rule is `torch.nn.functional.linear`'s own: the dtype of the input, or autocast's inside autocast. One
thing is added: a CPU that has no instructions for a half precision computes in float32 and rounds the result once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

# Below this many rows a product is bound by reading the weight, and widening the weight costs more than it saves.
# (1024 x 1024, AVX2, ms, bfloat16 against widened: 1 row 0.21 : 0.24, 32 rows 7.3 : 1.6; 4096 x 4096: 3.5 : 65, 99 : 82.)
WIDEN_FROM_ROWS = 32


class Term(NamedTuple):
    """One active adapter on one layer, adding `scaling * (B @ (A @ dropped(x)) + bias)`.

    Attributes:
        A: (r, in), any floating dtype.
        B: (out, r), the dtype and device of A.
        bias: (out,) or None, the bias of B (`lora_bias=True`).
        scaling: the factor on the whole term: a number, or a 0-d tensor of one that changes under a compiled graph.
        dropout: probability of zeroing an element of x, the rest being scaled by `1 / (1 - dropout)`; 0.0 in eval mode.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout: float


def emulated_dtypes() -> frozenset[torch.dtype]:
    """The half precisions that this CPU multiplies without instructions of its own.

    There a bfloat16 product runs 9 times (`x @ W.T`) to 80 times (`dy @ W`) slower than the float32 one (1024 cubed,
    AMD EPYC with AVX2, torch 2.13).
    """
    return _EMULATED


def _has_instructions(query: str) -> bool:
    supported = getattr(torch.ops.mkldnn, query, None)
    return supported is None or bool(supported())


# Asked once, at import (0.3 ms): a compiled graph may read a constant, but warns of a cached function.
_EMULATED = frozenset(
    dtype
    for dtype, query in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if not _has_instructions(query)
)


def in_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device; torch refuses the question for meta."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off; meta has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear(x, W)` returns here: x's, or autocast's inside autocast."""
    if x.dtype != torch.float64 and in_autocast(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in when the result of multiplying x, (..., in), is to be of `dtype`."""
    if dtype in emulated_dtypes() and x.device.type == "cpu" and x.numel() >= WIDEN_FROM_ROWS * x.shape[-1]:
        return torch.float32
    return dtype


def shaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """What a node computed, (rows, features), in the shape that it returns, and not as a view.

    Autograd forbids writing into a view that a custom node returned, and users write into outputs; and to a gradient that
    is a view it adds another one out of place.
    """
    return fresh if fresh.shape == shape else torch.ops.aten._unsafe_view.default(fresh, shape)
