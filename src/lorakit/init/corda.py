"""CorDA: an adapter begins as the part of a weight that its inputs use most, or least.

Source: Yang et al., 2024, arXiv:2406.05223. With the inputs' covariance C and `W C = U S V`, the adapter begins as
`U_r S_r V_r C^-1`. Since `U_r S_r V_r = U_r U_r^T W C`, that is `U_r U_r^T W`: nothing is inverted or solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from lorakit.init.context import InitResult
from lorakit.init.spectral import balanced, on_meta
from lorakit.ops.low_rank import LowRank, truncated_svd
from lorakit.types import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.init.context import InitContext
    from lorakit.layouts import Layout

# Added to the diagonal of C, in parts of its mean: directions that no input had count a little.
_DAMPING = 0.01
# Of the best rank-r part of W C, relative; see `spectral.PRINCIPAL_TOL`.
_TOL = 1e-4


@dataclass(frozen=True, eq=False)
class OrientedParts:
    """The part of one weight that an adapter is to begin as: `U @ diag(S) @ V.T`.

    Attributes:
        U: (out, r), orthonormal columns.
        S: (r,), singular values of W C.
        V: (in, r), the right singular vectors times the inverse of C.
        lasting: see `Gathered`.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    lasting: bool = False

    def why_not(self, layout: Layout, r: int) -> str:
        """See `Gathered.why_not`."""
        out, inner = layout.shape
        found = (self.U.shape[0], self.V.shape[0], self.S.shape[0])
        if found == (out, inner, r):
            return ""
        return (
            f"what preprocess_corda gathered is for (out, in, rank) = {found}, this adapter has {(out, inner, r)}; "
            "call it again with this model and this config"
        )


def corda(context: InitContext) -> InitResult:
    """The adapter begins as what `preprocess_corda` found, which is taken off the base.

    A = sqrt(S / |scaling|) V^T and B = U sqrt(S / |scaling|), with the scaling's sign in B.
    """
    spec = context.spec
    if spec.device.type == "meta":
        factors = on_meta(context)
    else:
        parts = cast("OrientedParts", spec.init_options)
        U, S, V = (part.to(spec.device) for part in (parts.U, parts.S, parts.V))
        whole = balanced(LowRank(U, S, V.mT, 0.0, 0.0), spec.scaling)
        factors = context.factors(whole.A, whole.B)
    return InitResult(factors, Factors(factors.A.clone(), factors.B.clone(), factors.scaling))


@torch.no_grad()
def oriented_parts(
    W: Tensor, covariance: Tensor, rank: int, method: str, *, lasting: bool = False
) -> OrientedParts:
    """The part of W that matters most to the inputs ("ipm"), or least ("kpm").

    Args:
        W: (out, in), float32.
        covariance: (in, in) of the inputs, up to a factor.
        rank: at most `min(out, in)`.
        method: "ipm" takes the largest singular triplets of W C, by an iteration; "kpm" the smallest, by the whole SVD.
        lasting: see `Gathered`.

    Raises:
        NonFiniteError: W or the covariance holds NaN or infinity.
    """
    C = covariance.to(W.device, W.dtype, copy=True)
    C.diagonal().add_(_DAMPING * C.diagonal().mean())
    product = W @ C
    if method == "ipm":
        svd = truncated_svd(product, rank, tol=_TOL)
        U, S = svd.U, svd.S
    else:
        check = truncated_svd(product, 1)  # refuses what is not finite; the largest singular value
        U, S, _ = torch.linalg.svd(product, full_matrices=False)
        U, S = U[:, -rank:], S[-rank:]
        S = S.clamp(min=float(check.S[0]) * torch.finfo(S.dtype).eps)
    tiny = torch.finfo(S.dtype).tiny
    V = (U.mT @ W) / S.clamp(min=tiny)[:, None]
    return OrientedParts(U.contiguous(), S.contiguous(), V.mT.contiguous(), lasting)
