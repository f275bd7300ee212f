"""Initialisers that look only at the shapes.

All draw in fp32 from torch's default generator of the device and then cast to the adapter's dtype, so one
seed gives the same numbers whatever dtype the adapter has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lorakit.init.context import InitContext, InitResult
from lorakit.types import Factors

if TYPE_CHECKING:
    from torch import Tensor


def kaiming(context: InitContext) -> InitResult:
    """A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B zero: the adapter begins as no change.

    On an embedding A is zero and B normal, since A is looked up and not multiplied.

    Source: Hu et al., 2021, arXiv:2106.09685, and its reference implementation.
    """
    if context.spec.kind == "embedding":
        return _embedding(context)
    r, in_features, out_features = _sizes(context)
    bound = 1 / math.sqrt(in_features)
    A = _empty(context, r, in_features).uniform_(-bound, bound)
    return _result(context, A, _zeros(context, out_features, r), bias_bound=0.0)


def gaussian(context: InitContext) -> InitResult:
    """A normal with standard deviation 1/r, B zero (the scheme of the diffusers library); embeddings as `kaiming`."""
    if context.spec.kind == "embedding":
        return _embedding(context)
    r, in_features, out_features = _sizes(context)
    A = _empty(context, r, in_features).normal_(std=1 / context.spec.r)
    return _result(context, A, _zeros(context, out_features, r), bias_bound=0.0)


def random(context: InitContext) -> InitResult:
    """A uniform in ±1/sqrt(in), B uniform in ±1/sqrt(r): not the identity; for tests and debugging.

    On an embedding both are normal.
    """
    r, in_features, out_features = _sizes(context)
    if context.spec.kind == "embedding":
        A, B = _empty(context, r, in_features).normal_(), _empty(context, out_features, r).normal_()
        return _result(context, A, B, bias_bound=0.0)
    bound_A, bound_B = 1 / math.sqrt(in_features), 1 / math.sqrt(r)
    A = _empty(context, r, in_features).uniform_(-bound_A, bound_A)
    B = _empty(context, out_features, r).uniform_(-bound_B, bound_B)
    return _result(context, A, B, bias_bound=bound_B)


def orthogonal(context: InitContext) -> InitResult:
    """A and B both non-zero, in orthogonal halves of the rank space, so that B @ A = 0.

    The rows of a random orthogonal (r, r) matrix are dealt alternately to A and to B, so r is even.

    Source: https://datta0.github.io/posts/rethink-lora-init/ (orthogonal initialisation).
    """
    r, in_features, out_features = _sizes(context)
    assert r % 2 == 0, "the planner refuses odd ranks"
    Q = _empty(context, r, r).normal_()
    if not Q.is_meta:
        Q = torch.linalg.qr(Q).Q
    A = (_empty(context, in_features, r // 2).normal_() @ Q[0::2]).T * 0.1
    B = (_empty(context, out_features, r // 2).normal_() @ Q[1::2]) * 0.1
    return _result(context, A, B, bias_bound=0.0)


def _embedding(context: InitContext) -> InitResult:
    r, in_features, out_features = _sizes(context)
    A, B = _empty(context, r, in_features).zero_(), _empty(context, out_features, r).normal_()
    return _result(context, A, B, bias_bound=0.0)


def _sizes(context: InitContext) -> tuple[int, int, int]:
    out_features, in_features = context.shape
    return context.rank, in_features, out_features


def _empty(context: InitContext, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=context.spec.device)


def _zeros(context: InitContext, *size: int) -> Tensor:
    return torch.zeros(size, dtype=context.spec.dtype, device=context.spec.device)


def _result(context: InitContext, A: Tensor, B: Tensor, *, bias_bound: float) -> InitResult:
    spec = context.spec
    bias = None
    if spec.lora_bias:
        bias = _empty(context, context.shape[0]).uniform_(-bias_bound, bias_bound).to(spec.dtype)
    A, B = (part if part.dtype is spec.dtype else part.to(spec.dtype) for part in (A, B))
    return InitResult(Factors(A.contiguous(), B.contiguous(), spec.scaling, bias))
