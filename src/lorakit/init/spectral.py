"""Initialisers that begin from a decomposition of the base weight: its largest part, its smallest, or its columns.

All compute in float32, for a float64 base in float64, and none draws random numbers: equal weights give equal factors.
On meta they give shapes alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lorakit.init.context import InitResult, check_finite
from lorakit.ops.low_rank import truncated_svd
from lorakit.types import Factors

if TYPE_CHECKING:
    from lorakit.init.context import InitContext
    from lorakit.ops.low_rank import LowRank

# Of the best rank-r part, relative. At 1e-5 the iteration takes 1.3 times as long (1024 x 1024); PEFT's
# svd_lowrank with 16 steps is off by 0.2.
PRINCIPAL_TOL = 1e-4
# Rows of A that no singular value asks for get the norm of the rows that plain LoRA draws.
_IDLE_NORM = 1 / math.sqrt(3)


def pissa(context: InitContext) -> InitResult:
    """The adapter begins as the `r` largest singular triplets of W, and these are taken off the base.

    `W ~ U S V` of rank r; A = sqrt(S / |scaling|) V and B = U sqrt(S / |scaling|), with the scaling's sign in B.
    `"pissa_niter_N"` is the same: the iteration stops by its residual, so there are no steps to choose.

    Source: Meng et al., 2024, arXiv:2404.02948.
    """
    if context.spec.device.type == "meta":
        return _taken_off(on_meta(context))
    found = balanced(truncated_svd(context.weight(), context.rank, tol=PRINCIPAL_TOL), context.spec.scaling)
    return _taken_off(context.factors(found.A, found.B))


def olora(context: InitContext) -> InitResult:
    """B begins as the first `r` orthonormal columns of a QR decomposition of W, A as B^T W; they are taken off the base.

    These columns follow from the first r columns of W alone: (out, r) is decomposed, not (out, in). Of a group of a
    convolution they are those of its own channels.

    Source: Büyükakyüz, 2024, arXiv:2406.01775.
    """
    if context.spec.device.type == "meta":
        return _taken_off(on_meta(context))
    W = context.weight()
    own = W[:, context.own_inputs]
    head, rest = own[:, : context.rank], own[:, context.rank :]
    Q, R = torch.linalg.qr(head)
    A = torch.zeros(context.rank, W.shape[1], dtype=W.dtype, device=W.device)
    A[:, context.own_inputs] = torch.cat([R, Q.mT @ rest], dim=1)
    check_finite(
        "the base weight", A
    )  # every entry of W goes into A, and W takes 8 times as long (4096 x 4096)
    return _taken_off(context.factors(A, Q))


def mica(context: InitContext) -> InitResult:
    """B begins, and stays, as the left singular vectors of the `r` smallest singular values of W; A begins as zero.

    Their order is that of falling singular values, and the largest entry of each is positive.

    Source: arXiv:2604.01694 (Minor Component Adaptation).
    """
    if context.spec.device.type == "meta":
        return InitResult(on_meta(context))
    W = context.weight()[:, context.own_inputs]
    check_finite("the base weight", W)
    U = torch.linalg.svd(W, full_matrices=False).U[:, -context.rank :]
    low, high = torch.aminmax(U, dim=0)
    B = torch.where(low + high < 0, -U, U)
    return InitResult(context.factors(B.new_zeros(context.rank, context.shape[1]), B))


def balanced(svd: LowRank, scaling: float) -> Factors:
    """Factors whose delta is `U S Vh`, the singular values shared evenly by A and B; in the dtype of the triplets.

    Where a singular value is zero, A holds its direction and B zeros: with zeros in both nothing would ever train.
    """
    root = (svd.S / abs(scaling)).sqrt()
    A = torch.where(root > 0, root, _IDLE_NORM)[:, None] * svd.Vh
    return Factors(A, svd.U * (root if scaling > 0 else -root), scaling)


def on_meta(context: InitContext) -> Factors:
    """Factors without numbers."""
    out_features, in_features = context.shape
    A = torch.empty(context.rank, in_features, device="meta")
    return context.factors(A, torch.empty(out_features, context.rank, device="meta"))


def _taken_off(factors: Factors) -> InitResult:
    """Begin as these factors, less a copy of them: training changes the factors in place."""
    return InitResult(factors, Factors(factors.A.clone(), factors.B.clone(), factors.scaling))
