"""What every combiner is given and gives back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorakit.types import Factors


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """How to combine, beside the method and the weights. What a method does not use, it does not look at.

    The last three are lorakit's own, and are refused by `check_request` for a method that has no use for them.

    Attributes:
        density: share of the elements that pruning keeps, in [0, 1]; `sce`: share that is selected. Needed by the
            methods that prune.
        majority_sign_method: how `ties` and its like elect the sign of an element: by the sum of the values
            ("total"), or by their number ("frequency").
        rank: the rank of the result, for the methods that end in an SVD and for `sum` and `slerp`. None is the largest
            rank of the parts, or what the exact result needs for `sum` and `slerp`.
        svd_clamp: quantile, in (0, 1], of the entries of U * S and Vh; entries larger than it in size are cut to it.
        svd_full_matrices: accepted for PEFT's callers; it has no effect on the result.
        svd_driver: the driver of `torch.linalg.svd` under `svd` on CUDA: "gesvd", "gesvdj" or "gesvda".
        seed: of the random pruning; a generator is drawn from, None draws from torch's default generator.
        energy: keep the fewest triplets that hold this share, in (0, 1], of the squared singular values, within `rank`;
            without a rank within the largest of the parts, where the delta is dense.
        t: where `slerp` stops between the first delta (0) and the second (1). None is the middle.
        epsilon: how far the keep probabilities of `della` spread around `density`, from the smallest element of
            a row to the largest. None is 0.2, or less where that would leave (0, 1].
    """

    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    seed: int | torch.Generator | None = None
    energy: float | None = None
    t: float | None = None
    epsilon: float | None = None

    def of_block(self, path: str, number: int, groups: int) -> CombineOptions:
        """The options for one block of the weight at a path: its share of the rank, and random numbers of its own.

        Args:
            path: where the weight is.
            number: of the block.
            groups: how many blocks share the rank (the groups of a convolution).
        """
        seed = self.seed
        if isinstance(seed, int):  # or weights of one shape would all lose the same elements
            seed ^= zlib.crc32(f"{path}:{number}".encode())
        rank = self.rank if self.rank is None or groups == 1 else max(1, self.rank // groups)
        return replace(self, seed=seed, rank=rank)


class Combined(NamedTuple):
    """The result of combining, and what it cost.

    Attributes:
        factors: scaling 1, the dtype of the widest part, contiguous, no memory shared with the parts.
        kept: the share of the energy (squared Frobenius norm) of the wanted delta that the result keeps, in [0, 1].
        error: the Frobenius norm of wanted delta minus result, before rounding to the dtype; None for methods that
            approximate nothing.
    """

    factors: Factors
    kept: float
    error: float | None


class Job(NamedTuple):
    """A checked request.

    Attributes:
        parts: without biases, all in `dtype` and on one device.
        weights: one for each part.
        options: as the caller gave them.
        dtype: float32, or float64 where a part is float64.
        generator: what random pruning draws from; None is torch's default.
    """

    parts: tuple[Factors, ...]
    weights: tuple[float, ...]
    options: CombineOptions
    dtype: torch.dtype
    generator: torch.Generator | None


class Method(NamedTuple):
    """One row of `METHODS`.

    Attributes:
        run: `Job` -> `Combined`; the factors in the dtype of the job, the bias left to the caller.
        uses: names of the fields of `CombineOptions` that it looks at, beside those that PEFT lets any method have.
        density: whether it needs `density`.
        rescales: whether it divides by `density`, which must then not be 0.
        equal_ranks: whether the ranks of all parts must be the same.
        exactly: the number of parts, if only one number will do.
        alone: the method that stands in for it when there is one part only.
    """

    run: Callable[[Job], Combined]
    uses: frozenset[str] = frozenset()
    density: bool = False
    rescales: bool = False
    equal_ranks: bool = False
    exactly: int | None = None
    alone: str | None = None
