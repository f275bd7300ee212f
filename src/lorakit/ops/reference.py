"""The specification of the fused ops, in plain differentiable torch calls.

It is also what runs where a hand-written backward cannot: under `torch.compile` and export, `torch.func` transforms,
forward-mode differentiation, tracing, on meta tensors and on tensor subclasses.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lorakit.ops.terms import Term

PLAIN = frozenset({torch.Tensor, Parameter})
_COUNTED = ContextVar("counted on meta tensors", default=False)


@contextmanager
def nodes_on_meta() -> Iterator[None]:
    """Let meta tensors go through the hand-written nodes, so that what a real step keeps can be counted."""
    token = _COUNTED.set(True)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def lora_reference(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """`y + sum_i s_i * (B_i A_i drop_i(x) + bias_i)`, in the dtype of y, as a composition of torch calls.

    Args:
        y: (..., out), the output of the base layer; not changed.
        x: (..., in), the input of the base layer.
        terms: the active adapters; dropout is `torch.nn.functional.dropout`.

    Returns:
        (..., out) in the dtype of y. The products are computed in the dtype of x, or in autocast's.

    Source: Hu et al., 2021, arXiv:2106.09685.
    """
    total = y
    for A, B, bias, scaling, dropout in terms:
        h = linear(torch_dropout(x, dropout) if dropout else x, A.to(x.dtype)) * scaling
        total = total + linear(h, B.to(h.dtype))
        if bias is not None:
            total = total + bias * scaling
    return total.to(y.dtype)


def must_compose(x: Tensor, terms: Sequence[Term]) -> bool:
    """Whether a hand-written autograd node would be wrong, or opaque, for these tensors at this moment."""
    if torch.compiler.is_compiling():
        return True
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return True
    if type(x) not in PLAIN or (x.is_meta and not _COUNTED.get()):
        return True
    for A, B, _, scaling, dropout in terms:  # a loop: a generator costs 1 us a call
        if type(A) not in PLAIN or type(B) not in PLAIN or not 0.0 <= dropout < 1.0:
            return True
        if type(scaling) is not float and not can_read(scaling):
            return True
    return False


def can_read(scaling: float | Tensor) -> bool:
    """Whether the scaling is a number, or a tensor that can be read as one at no cost.

    A tensor on the CPU takes 0.3 us. One elsewhere would make the host wait for the device at every layer, and one that
    is differentiated, or has no data, must stay a tensor.
    """
    if isinstance(scaling, torch.Tensor):
        plain = type(scaling) in PLAIN and scaling.device.type == "cpu"
        return plain and not (scaling.requires_grad and torch.is_grad_enabled())
    return True
