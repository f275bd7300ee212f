"""EVA: the directions in which a layer's input varies most, and the ranks that layers get by them.

Source: Paischer et al., 2024, arXiv:2410.07170. The scatter of all inputs is accumulated (Chan et al., 1979), so the
components are those of all the rows together, not of a chain of truncated decompositions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.ops.low_rank import truncated_svd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

# A scatter matrix of 2048 inputs takes 16 MiB. Wider layers keep their leading directions alone, which there is also
# faster: a batch of 2048 rows costs more in the product of (in, in) than in a truncated SVD.
WIDEST_DENSE = 2048
# Up to here all eigenvectors are found at once: 6 ms at 384, where the leading ones alone take 13; 83 and 29 at 1024.
_ALL_EIGENVECTORS = 512
# Wider ones than this are followed from batch to batch, which takes half a millisecond at 384.
_FOLLOWED = 256
# Vectors that are followed beside the wanted ones, and products a step: the wanted ones then lag behind by little.
_SPARE, _STEPS = 8, 2


class Components(NamedTuple):
    """The leading principal components of rows.

    Attributes:
        values: (k,), float64, the squared singular values of the centred rows, falling.
        vectors: (k, in), float32, orthonormal; the largest entry of each is positive.
        total: the squared Frobenius norm of the centred rows, of which `values` is a part.
    """

    values: Tensor
    vectors: Tensor
    total: float

    @property
    def ratios(self) -> Tensor:
        """(k,) shares of the variance that each explains."""
        return self.values / self.total if self.total > 0 else torch.zeros_like(self.values)

    @property
    def significant(self) -> int:
        """How many of them are more than rounding."""
        if not self.total > 0:
            return 0
        least = float(self.values[0]) * self.vectors.shape[1] * torch.finfo(torch.float32).eps
        return int((self.values > least).sum())

    def start(self, rank: int, *, whiten: bool) -> Tensor:
        """A (rank, in) of an adapter: the first components, divided by the roots of their singular values if `whiten`."""
        rows = self.vectors[:rank]
        return rows / self.values[:rank].pow(0.25).to(rows.dtype)[:, None] if whiten else rows.clone()


class Scatter(ABC):
    """The mean of rows (n, in), and what their centred products say of their principal components.

    Attributes:
        count: how many rows there were.
        mean: (in,), float32.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float32, device=device)

    @abstractmethod
    def _take(self, rows: Tensor) -> None:
        """Add rows that are centred already."""

    @abstractmethod
    def _body(self) -> tuple[Tensor, ...]:
        """What is kept beside the mean, of the same shapes in every scatter of these sizes."""

    @abstractmethod
    def _take_body(self, body: Sequence[Tensor]) -> None:
        """Add what another scatter keeps."""

    @abstractmethod
    def components(self, k: int, near: Tensor | None = None) -> Components:
        """The leading `min(k, in)` components.

        Args:
            k: how many.
            near: (k, in), what they were some rows ago: the result then lags a little behind and costs a few products.
        """

    def add(self, rows: Tensor) -> None:
        """Add rows (n, in) of float32, which are overwritten."""
        if not rows.shape[0]:
            return
        mean = rows.mean(dim=0)
        self._take(rows.sub_(mean))
        self._shift(rows.shape[0], mean)

    def parts(self) -> tuple[Tensor, ...]:
        """Everything as tensors: count, mean, and the rest."""
        count = torch.tensor([self.count], dtype=torch.int64, device=self.mean.device)
        return (count, self.mean, *self._body())

    def absorb(self, parts: Sequence[Tensor]) -> None:
        """Add the rows of another scatter of these sizes, by its `parts`."""
        count, mean, *body = parts
        if int(count):
            self._take_body(body)
            self._shift(int(count), mean)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Count rows that were centred on a mean of their own."""
        both, change = self.count + count, mean - self.mean
        if self.count:
            self._take((change * (self.count * count / both) ** 0.5)[None])
        self.mean = self.mean + change * (count / both)
        self.count = both


class DenseScatter(Scatter):
    """The whole matrix: exact to the rounding of float32.

    Attributes:
        matrix: (in, in), the products of the centred rows.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(dim, device)
        self.matrix = torch.zeros(dim, dim, dtype=torch.float32, device=device)

    def _take(self, rows: Tensor) -> None:
        self.matrix.addmm_(rows.mT, rows)

    def _body(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def _take_body(self, body: Sequence[Tensor]) -> None:
        self.matrix += body[0]

    def components(self, k: int, near: Tensor | None = None) -> Components:
        """See `Scatter.components`; exact without `near`."""
        matrix, dim = self.matrix, self.matrix.shape[0]
        k = min(k, dim)
        total = float(matrix.diagonal().sum(dtype=torch.float64))
        if 4 * k >= dim or dim <= (_ALL_EIGENVECTORS if near is None else _FOLLOWED):
            values, vectors = torch.linalg.eigh(matrix)
            return _components(values.flip(0)[:k], vectors.mT.flip(0)[:k], total)
        if near is None:
            svd = truncated_svd(matrix, k)
            return _components(svd.S, svd.Vh, total)
        columns = torch.cat([near.mT, matrix[:, :_SPARE]], dim=1)
        for _ in range(_STEPS):
            columns = matrix @ torch.linalg.qr(columns).Q
        basis = torch.linalg.qr(columns).Q
        values, turn = torch.linalg.eigh(basis.mT @ (matrix @ basis))
        return _components(values.flip(0)[:k], (basis @ turn).mT.flip(0)[:k], total)


class ThinScatter(Scatter):
    """The leading `width` directions: exact while the rows span no more, else each addition cuts off the smallest.

    What is cut off is at most the part of the rows outside their best `width` directions, once for each addition.
    """

    def __init__(self, dim: int, device: torch.device, width: int) -> None:
        super().__init__(dim, device)
        self._rows = torch.zeros(min(width, dim), dim, dtype=torch.float32, device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)

    def _take(self, rows: Tensor) -> None:
        self._total += rows.square().sum(dtype=torch.float64)
        self._cut(rows)

    def _cut(self, rows: Tensor) -> None:
        width = self._rows.shape[0]
        stacked = torch.cat([self._rows, rows])
        svd = truncated_svd(stacked, width)
        self._rows[: svd.S.shape[0]] = svd.S[:, None] * svd.Vh

    def _body(self) -> tuple[Tensor, ...]:
        return self._rows, self._total

    def _take_body(self, body: Sequence[Tensor]) -> None:
        self._total += body[1]
        self._cut(body[0])

    def components(self, k: int, near: Tensor | None = None) -> Components:  # noqa: ARG002 - they are at hand
        """See `Scatter.components`; the same with `near` and without."""
        norms = torch.linalg.vector_norm(self._rows, dim=1)
        rows = self._rows / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return _components(norms.double().square()[:k], rows[:k], float(self._total))


def new_scatter(dim: int, device: torch.device, width: int) -> Scatter:
    """An empty scatter of rows (n, dim) that is to give up to `width` components."""
    if dim <= WIDEST_DENSE or 4 * width >= dim:
        return DenseScatter(dim, device)
    return ThinScatter(dim, device, 2 * width)


def _components(values: Tensor, vectors: Tensor, total: float) -> Components:
    low, high = torch.aminmax(vectors, dim=1)
    signs = torch.where(low + high < 0, -1.0, 1.0)
    return Components(values.double().clamp(min=0.0), vectors * signs[:, None], total)


def have_settled(new: Tensor, old: Tensor | None, tau: float) -> Tensor:
    """Which components (k, in) have a cosine of `tau` or more with what they were before; none without a before.

    With signs as `Components` has them: one that turned by half a circle has not settled, as in PEFT.
    """
    if old is None:
        return torch.zeros(new.shape[0], dtype=torch.bool)
    return (torch.nn.functional.cosine_similarity(new, old, dim=1) >= tau).cpu()


def spread_ranks(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Give `budget` ranks to the components that explain most of their layer's variance.

    Args:
        ratios: by layer, the falling shares of variance of the components that it may have.
        budget: the sum of all ranks, or less where there are not so many components.

    Returns:
        The rank of each layer; some may be 0. Of equal shares the layer that is named first comes first.
    """
    owners = [name for name, shares in ratios.items() for _ in shares]
    if not owners:
        return {}
    shares = torch.cat([shares.double().cpu() for shares in ratios.values()])
    order = torch.sort(shares, descending=True, stable=True).indices[:budget]
    counts = Counter(owners[index] for index in order.tolist())
    return {name: counts[name] for name in ratios}
