"""LoRA-GA: an adapter begins so that its first step is the one that the whole weight would have taken.

Source: Wang et al., 2024, arXiv:2407.05000. A and B begin as singular vectors of the weight's gradient `G = dy^T x`,
summed over the data. A small G is summed as it is. Of a large one two sketches are, `G Omega` and `Psi^T G`, whose
size follows the rank (Tropp, Yurtsever, Udell and Cevher, 2017, arXiv:1609.00048).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from lorakit.init.context import InitResult
from lorakit.init.spectral import on_meta
from lorakit.ops.low_rank import LowRank, truncated_svd
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraGAConfig
    from lorakit.init.context import InitContext
    from lorakit.layouts import Layout

    Draw = Callable[[int, int, torch.device], Tensor]

# A gradient of 1024 x 1024 takes 4 MiB; those up to there are summed whole.
LARGEST_WHOLE = 1 << 20
_SEED = 52405
# Of the best rank-2r part of the gradient, relative.
_TOL = 1e-4


class GradientSum(ABC):
    """A weight's gradient, summed over the data.

    Attributes:
        count: how many gradients there were.
    """

    def __init__(self) -> None:
        self.count = 0

    @abstractmethod
    def _take(self, dy: Tensor, x: Tensor) -> None:
        """Add `dy.T @ x`."""

    @abstractmethod
    def _svd(self, k: int) -> LowRank:
        """The leading triplets of the sum."""

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one call.

        Args:
            dy: (n, out), the loss's gradient by the layer's output, float32.
            x: (n, in), the layer's input, float32.
        """
        self._take(dy, x)
        self.count += 1

    def mean_svd(self, k: int) -> LowRank:
        """The `k` leading singular triplets of the mean gradient.

        Raises:
            NonFiniteError: the gradients hold NaN or infinity.
        """
        svd = self._svd(k)
        return svd._replace(
            S=svd.S / self.count, energy=svd.energy / self.count**2, rest=svd.rest / self.count
        )


class WholeGradient(GradientSum):
    """The whole (out, in) sum in float32: its triplets are exact to the tolerance of `truncated_svd`."""

    def __init__(self, out: int, inner: int, device: torch.device) -> None:
        super().__init__()
        self._sum = torch.zeros(out, inner, dtype=torch.float32, device=device)

    def _take(self, dy: Tensor, x: Tensor) -> None:
        self._sum.addmm_(dy.mT, x)

    def _svd(self, k: int) -> LowRank:
        return truncated_svd(self._sum, k, tol=_TOL)


class SketchedGradient(GradientSum):
    """Two sketches, (out, 2k + 1) and (4k + 3, in), that give k triplets.

    Exact, to rounding, for a gradient of rank 2k + 1 or less. Of any other the rank-k part has an expected error, by its
    squared Frobenius norm, of at most four times that of the best one, plus what cutting to k adds (Tropp et al.,
    theorem 4.3 with these sizes).
    """

    def __init__(self, out: int, inner: int, device: torch.device, k: int, draw: Draw) -> None:
        super().__init__()
        self._draw = draw
        self._width = 2 * k + 1
        sizes = {"dtype": torch.float32, "device": device}
        self._right = torch.zeros(out, self._width, **sizes)  # type: ignore[call-overload]
        self._left = torch.zeros(2 * self._width + 1, inner, **sizes)  # type: ignore[call-overload]

    def _take(self, dy: Tensor, x: Tensor) -> None:
        out, width = self._right.shape
        height, inner = self._left.shape
        self._right.addmm_(dy.mT, x @ self._draw(inner, width, x.device))
        self._left.addmm_((dy @ self._draw(out, height, x.device)).mT, x)

    def _svd(self, k: int) -> LowRank:
        right, left = self._right.double(), self._left.double()
        Q = torch.linalg.qr(right).Q
        test = self._draw(right.shape[0], left.shape[0], right.device).double()
        basis, corner = torch.linalg.qr(
            test.mT @ Q
        )  # normal numbers times orthonormal columns: never singular
        rows = torch.linalg.solve_triangular(corner, basis.mT @ left, upper=True)
        svd = truncated_svd(rows.float(), k, tol=_TOL)
        return svd._replace(U=Q.float() @ svd.U)


def normal_matrix(rows: int, columns: int, device: torch.device) -> Tensor:
    """Normal numbers, float32: always the same for a size."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator).to(device)


def new_gradient_sum(out: int, inner: int, r: int, device: torch.device, draw: Draw) -> GradientSum:
    """An empty sum of gradients of an (out, in) weight that is to give `2 r` triplets.

    `draw` is `normal_matrix`, or remembers what that gave.
    """
    k = 2 * r
    sketches = out * (2 * k + 1) + inner * (4 * k + 3)
    if out * inner <= LARGEST_WHOLE or 2 * sketches >= out * inner:
        return WholeGradient(out, inner, device)
    return SketchedGradient(out, inner, device, k, draw)


@dataclass(frozen=True, eq=False)
class GradientStart:
    """What an adapter begins from on one weight.

    Attributes:
        gradient: the leading triplets of the weight's mean gradient, at least 2 r.
        options: directions and scales.
        lasting: see `Gathered`.
    """

    gradient: LowRank
    options: LoraGAConfig
    lasting: bool = False

    def why_not(self, layout: Layout, r: int) -> str:
        """See `Gathered.why_not`."""
        found = (self.gradient.U.shape[0], self.gradient.Vh.shape[1])
        if found != layout.shape or self.gradient.S.shape[0] < 2 * r:
            return (
                f"what preprocess_loraga gathered is for (out, in) = {found} and a rank of "
                f"{self.gradient.S.shape[0] // 2}, this adapter has {layout.shape} and {r}; call it again with this "
                "model and this config"
            )
        return ""


DIRECTIONS: Mapping[str, Callable[[int], tuple[slice | Tensor, slice | Tensor]]] = {
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "random": lambda r: (torch.randperm(2 * r)[:r],) * 2,
}
"""Which of the 2 r triplets give A its rows and B its columns."""


def _stable(context: InitContext, options: LoraGAConfig, _first: float) -> tuple[float, float]:
    return 1.0, context.shape[0] ** 0.25 / options.stable_gamma**0.5


def _weight_svd(context: InitContext, _options: LoraGAConfig, first: float) -> tuple[float, float]:
    return 1.0, float(truncated_svd(context.weight(), 1).S[0]) / first if first > 0 else 1.0


def _gd_scale(context: InitContext, _options: LoraGAConfig, _first: float) -> tuple[float, float]:
    return 1 / context.spec.scaling, 1 / context.spec.scaling


def _unit(_context: InitContext, _options: LoraGAConfig, _first: float) -> tuple[float, float]:
    return 1.0, 1.0


SCALES: Mapping[str, Callable[[InitContext, LoraGAConfig, float], tuple[float, float]]] = {
    "stable": _stable,
    "weight_svd": _weight_svd,
    "gd_scale": _gd_scale,
    "unit": _unit,
}
"""What A and B are multiplied by, given the first of B's singular values."""


def lora_ga(context: InitContext) -> InitResult:
    """A begins as right singular vectors of the gradient, B as left ones times their singular values; taken off the base.

    Which ones `LoraGAConfig.direction` says, of 2 r; `scale` says how large they are.
    """
    spec = context.spec
    if spec.device.type == "meta":
        factors = on_meta(context)
    else:
        start = cast("GradientStart", spec.init_options)
        U, S, Vh = (part.to(spec.device) for part in start.gradient[:3])
        of_A, of_B = DIRECTIONS[start.options.direction](spec.r)
        A, values = Vh[of_A], S[of_B]
        scale_A, scale_B = SCALES[start.options.scale](context, start.options, float(values[0]))
        factors = context.factors(A * scale_A, U[:, of_B] * (values * scale_B))
    return InitResult(factors, Factors(factors.A.clone(), factors.B.clone(), factors.scaling))
