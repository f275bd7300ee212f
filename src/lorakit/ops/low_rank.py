"""Singular value decompositions that cost what the rank costs, of a sum of factors and of a dense matrix.

Signs follow one rule, so equal inputs give equal factors: the largest entry of each left vector is positive.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from lorakit.errors import NonFiniteError
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SEED = 20406  # of the start block and of padding: a local generator, torch's own stream is left alone
_SMALLEST_BLOCK = 8  # narrower products read the matrix as often and learn less
# And one more for each digit of the tolerance: without room for these the full SVD would be taken in the end.
_FEWEST_BLOCKS = 5
# Blocks between two checks at most. A check of 300 vectors costs 11 ms, a block 3 ms (1024 x 1024).
_CHECK_EVERY = 4
# The error that `_error` finds was 0.3 to 1 of the true one on noise, power laws and pruned sums of factors.
_SAFETY = 4
# Gaps below these shares of the last and of the first squared singular value count as these.
_LEAST_GAP, _NO_GAP = 1e-3, 1e-30
# Squares of entries in this range neither overflow nor vanish in float32, for any matrix that fits into memory.
_PLAIN_RANGE = (1e-12, 1e12)


class LowRank(NamedTuple):
    """The leading singular triplets of a matrix W (out, in), largest first: `W ~ U @ diag(S) @ Vh`.

    Attributes:
        U: (out, k), orthonormal columns.
        S: (k,), not negative, falling.
        Vh: (k, in), orthonormal rows.
        energy: the squared Frobenius norm of the whole of W, of which `(S**2).sum()` is in these triplets.
        rest: the Frobenius norm of W minus these triplets.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float
    rest: float

    def truncated(self, rank: int) -> LowRank:
        """The first `rank` triplets: the best approximation of W with that rank (Eckart and Young, 1936)."""
        if rank >= self.S.shape[0]:
            return self
        rest = math.hypot(self.rest, _norm(self.S[rank:]))
        return LowRank(self.U[:, :rank], self.S[:rank], self.Vh[:rank], self.energy, rest)

    def factors(self) -> Factors:
        """A = Vh, (k, in), and B = U * S, (out, k), with scaling 1."""
        return Factors(A=self.Vh, B=self.U * self.S, scaling=1.0)


def rank_for(S: Tensor, share: float, energy: float) -> int:
    """The fewest of falling singular values whose squares sum to a share of the energy, at least 1, at most all."""
    reached = S.double().square().cumsum(0)
    return min(1 + int((reached < share * energy).sum()), S.shape[0])


def joint_spectrum(blocks: Sequence[LowRank]) -> Tensor:
    """Of blocks of one weight that share a rank: root of the sum over them of the squares of the k-th singular values.

    Of one block they are its singular values.
    """
    return torch.stack([block.S for block in blocks]).square().sum(dim=0).sqrt()


@torch.no_grad()
def low_rank_svd(parts: Sequence[Factors], *, rank: int | None = None, driver: str | None = None) -> LowRank:
    """The SVD of `sum_i s_i B_i A_i`, from QR of the stacked factors; the dense sum is never built.

    Args:
        parts: factors of one weight, all in float32 or all in float64; biases are not looked at.
        rank: how many triplets at the most; None: all.
        driver: what `torch.linalg.svd` is to use on CUDA ("gesvd", "gesvdj", "gesvda"); elsewhere without effect.

    Returns:
        `min(rank, sum of ranks, out, in)` triplets in the dtype of the factors. Exact to the rounding of that dtype,
        relative to the norms of the factors. O((out + in) R^2 + R^3) for a sum of ranks R.
    """
    total = Factors.cat(parts)
    left, right = torch.linalg.qr(total.B), torch.linalg.qr(total.A.mT)
    core = left.R @ right.R.mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False, driver=driver if core.is_cuda else None)
    kept = slice(rank)
    rest = 0.0 if rank is None else _norm(S[rank:])
    return _oriented(LowRank(left.Q @ U[:, kept], S[kept], Vh[kept] @ right.Q.mT, _norm(S) ** 2, rest))


@torch.no_grad()
def truncated_svd(W: Tensor, rank: int, *, tol: float = 1e-5) -> LowRank:
    """The `rank` leading singular triplets of a dense matrix, by block Krylov iteration (Golub-Kahan).

    The iteration stops when the residuals `|W^T u - s v|`, computed and not estimated, say that `U S Vh` is within
    `tol` of the best approximation of that rank, or that they are down to rounding (nearly equal singular values
    leave the best approximation undetermined). If that takes more than half of the dimension, or the matrix is small,
    the full SVD is taken instead.

    Args:
        W: (out, in), any floating dtype; half precisions are widened to float32, once.
        rank: how many triplets, at least 1.
        tol: wanted distance to the best approximation of that rank, relative to its Frobenius norm.

    Returns:
        `min(rank, out, in)` triplets in float32, or float64 for a float64 W; `rest` is read from the energies and good
        to 1e-3 of W's norm in float32. The same input gives the same result, whatever the state of torch's generators.

    Raises:
        NonFiniteError: W holds NaN or infinity.

    Source: Golub, Luk and Overton, 1981, doi:10.1145/355945.355946 (block Lanczos for singular values).
    """
    W = W.to(torch.float64 if W.dtype == torch.float64 else torch.float32)
    count = min(rank, *W.shape)
    low, high = torch.aminmax(W)
    peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        raise NonFiniteError(f"singular values of a {tuple(W.shape)} matrix: it holds NaN or infinity")
    if peak == 0.0:
        U, Vh = (torch.eye(count, dim, dtype=W.dtype, device=W.device) for dim in W.shape)
        return LowRank(U.mT, W.new_zeros(count), Vh, 0.0, 0.0)
    unit = 1.0 if _PLAIN_RANGE[0] < peak < _PLAIN_RANGE[1] else peak
    if unit != 1.0:
        W = W / unit
    # by rows: one float32 sum over 16 M squares is wrong in the fourth digit
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(W, dim=1), dtype=torch.float64))
    found = None
    blocks = min(W.shape) // 2 // max(count, _SMALLEST_BLOCK)
    if blocks >= _FEWEST_BLOCKS - math.log10(tol):
        found = _Krylov(W, count, tol, norm).run()
    U, S, Vh = found or torch.linalg.svd(W, full_matrices=False)
    rest = math.sqrt(max(0.0, norm**2 - _norm(S[:count]) ** 2))
    return _oriented(LowRank(U[:, :count], S[:count] * unit, Vh[:count], (norm * unit) ** 2, rest * unit))


@torch.no_grad()
def padded_rows(Vh: Tensor, rank: int) -> Tensor:
    """Orthonormal rows Vh (k, in), followed by more of them up to `rank`; zeros once they span the whole space.

    Returns:
        (rank, in) in Vh's dtype, always the same for the same Vh.
    """
    k, dim = Vh.shape
    fresh = min(rank, dim) - k
    if fresh > 0:
        noise = _normal(fresh, dim, Vh)
        Vh = torch.cat([Vh, torch.linalg.qr(torch.cat([Vh, noise]).mT).Q.mT[k:]])
    return pad(Vh, (0, 0, 0, rank - Vh.shape[0]))


class _Basis:
    """Orthonormal vectors, as rows of a buffer that doubles."""

    def __init__(self, dim: int, like: Tensor) -> None:
        self._buffer = like.new_empty(0, dim)
        self.count = 0

    @property
    def rows(self) -> Tensor:
        return self._buffer[: self.count]

    def extend(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Add what is new in `block` (b, dim): the b new rows, and the (b, count) coefficients that give block back.

        Projected out twice, with Householder QR after each, which needs no well-conditioned block.
        """
        old = self.rows
        first = block @ old.mT
        Q, R = torch.linalg.qr((block - first @ old).mT)
        second = Q.mT @ old.mT
        Q, again = torch.linalg.qr(Q - old.mT @ second.mT)
        new = Q.mT
        self._append(new)
        return new, torch.cat([first + R.mT @ second, R.mT @ again.mT], dim=1)

    def _append(self, new: Tensor) -> None:
        needed = self.count + new.shape[0]
        if needed > self._buffer.shape[0]:
            larger = self._buffer.new_empty(2 * needed, self._buffer.shape[1])
            larger[: self.count] = self.rows
            self._buffer = larger
        self._buffer[self.count : needed] = new
        self.count = needed


class _Ritz(NamedTuple):
    """Triplets of the small matrix: coefficients (rank, k) of left and right vectors, and what W^T u - s v measures."""

    left: Tensor
    S: Tensor
    right: Tensor
    residuals: Tensor


class _Krylov:
    """Block Golub-Kahan iteration on W (out, in), with full reorthogonalisation.

    `W @ right.rows.T == left.rows.T @ coefficients.T` holds at every step, so a singular triplet of the small
    `coefficients` gives u and v with `W v = s u`, and `W^T u - s v` is all that is wrong with them.
    """

    def __init__(self, W: Tensor, rank: int, tol: float, norm: float) -> None:
        self.W, self.rank, self.tol, self.norm = W, rank, tol, norm
        self.block = max(rank, _SMALLEST_BLOCK)
        self.left, self.right = _Basis(W.shape[0], W), _Basis(W.shape[1], W)
        self.coefficients = W.new_empty(0, 0)
        self.tail = W.new_empty(0, 0)

    def run(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """U, S, Vh once they have converged; None when they do not within half of the dimension."""
        newest, _ = self.right.extend(_normal(self.block, self.W.shape[0], self.W) @ self.W)
        limit, check_at = min(self.W.shape) // 2 // self.block, 2
        history: list[tuple[int, float]] = []
        for block in range(1, limit + 1):
            newest = self._step(newest)
            if block < min(check_at, limit) and self._tail_matters():
                continue
            wrong, found = self._ritz()
            if wrong <= 1.0:
                return self._confirmed(found)
            history.append((block, math.log(wrong)))
            check_at = block + _blocks_to_go(history)
        return None

    def _step(self, newest: Tensor) -> Tensor:
        """One block more on either side; returns the new right vectors."""
        images, row = self.left.extend((self.W @ newest.mT).mT)  # 0.6 of the time of newest @ W.mT
        grown = pad(self.coefficients, (0, self.block))
        self.coefficients = torch.cat([grown, row])
        newest, column = self.right.extend(images @ self.W)
        self.tail = column[:, -self.block :].double()
        return newest

    def _tail_matters(self) -> bool:
        """Whether the newest block added anything: no, once the range of W is used up."""
        return float(self.tail.norm()) > 1e-6 * float(self.coefficients.abs().max())

    def _ritz(self) -> tuple[float, _Ritz]:
        """How far from converged (at most 1 is converged), and the triplets of the small matrix.

        The residuals are read off the recurrence, which has them to more digits than a product with W.
        """
        right, S, left = torch.linalg.svd(self.coefficients.double())
        spill = left[:, -self.block :] @ self.tail
        residuals = torch.linalg.vector_norm(spill[: self.rank], dim=1)
        rounding = 8 * self._eps * float(S[0])
        wrong = min(_SAFETY * self._error(spill, S) / self.tol, float(residuals.max()) / rounding)
        return wrong, _Ritz(left[: self.rank], S[: self.rank], right[:, : self.rank].mT, residuals)

    @property
    def _eps(self) -> float:
        return torch.finfo(self.W.dtype).eps

    def _error(self, spill: Tensor, S: Tensor) -> float:
        """Relative distance to the best approximation, to second order in the residuals.

        `spill` (k, block) holds the residuals of all k triplets in the newest right vectors. They pull in those vectors,
        and through them the triplets beyond the wanted ones; each pull is divided by the gap between the squares of the
        singular values. The newest vectors carry about twice the square of the tail.
        """
        s = S[: self.rank, None]
        own = 2 * float(torch.linalg.matrix_norm(self.tail, 2)) ** 2
        none = _NO_GAP * float(S[0]) ** 2
        direct = (
            s / (s.square() - own).clamp(min=max(none, _LEAST_GAP * float(s[-1]) ** 2)) * spill[: self.rank]
        )
        gaps = (s.square() - S[self.rank :].square()).clamp(min=none)
        through = direct @ spill[self.rank :].mT * S[self.rank :] / gaps
        return float(
            torch.linalg.vector_norm(s * torch.cat([direct, through], dim=1)) / torch.linalg.vector_norm(s)
        )

    def _confirmed(self, found: _Ritz) -> tuple[Tensor, Tensor, Tensor] | None:
        """The triplets, sharpened, if their true residuals and norms are what the recurrence says; else None.

        `U U^T W` is the best that can be made of the left vectors; the product is the one in the residual, so all it
        costs is the SVD of (rank, in).
        """
        U = found.left.to(self.W.dtype) @ self.left.rows
        V = found.right.to(self.W.dtype) @ self.right.rows[: found.right.shape[1]]
        image = U @ self.W
        residuals = torch.linalg.vector_norm((image - found.S[:, None].to(V.dtype) * V).double(), dim=1)
        rounding = 64 * self._eps * self.norm
        one = torch.eye(self.rank, dtype=U.dtype, device=U.device)
        skew = max(float((rows @ rows.mT - one).abs().max()) for rows in (U, V))
        if skew > 64 * self._eps or bool((residuals > 2 * found.residuals + rounding).any()):
            return None
        Q, R = torch.linalg.qr(image.mT)
        rotation, values, Wh = torch.linalg.svd(R.mT)
        return U.mT @ rotation, values, Wh @ Q.mT


def _blocks_to_go(history: Sequence[tuple[int, float]]) -> int:
    """Blocks until the next check is worth its price: where the last two checks point, read on the log scale."""
    if len(history) < 2:
        return 2
    (block, error), (last_block, last_error) = history[-2:]
    fall = (error - last_error) / (last_block - block)
    return min(_CHECK_EVERY, max(1, math.ceil(last_error / fall))) if fall > 0 else _CHECK_EVERY


def _oriented(svd: LowRank) -> LowRank:
    """The same with the largest entry of each column of U positive."""
    # extremes of a few long rows take 5 us, those of columns 30 (1024 x 16)
    low, high = torch.aminmax(svd.U.mT.contiguous(), dim=1)
    signs = torch.where(low + high < 0, -1.0, 1.0).to(svd.U.dtype)
    return svd._replace(U=svd.U * signs, Vh=svd.Vh * signs[:, None])


def _norm(values: Tensor) -> float:
    return math.hypot(*values.tolist())  # of some dozens: 3 us, against 20 in torch


def _normal(rows: int, columns: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype).to(like.device)
