"""Work on adapter files without any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lorakit.checkpoint.combining import combine_adapters
from lorakit.checkpoint.storing import silent
from lorakit.combiners import CombineOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from lorakit.checkpoint.combining import Combination
    from lorakit.checkpoint.storing import Progress


def combine(
    paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    *,
    output: str | os.PathLike[str],
    method: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    svd_clamp: float | None = None,
    t: float | None = None,
    epsilon: float | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Combination:
    """Combine adapters into a new one; the same functions as `LoraModel.add_weighted_adapter`, without a model.

    Args:
        paths: folders, or repositories of the hub, of adapters for the same base.
        weights: a finite number for each; negative ones subtract.
        output: the folder to write; made if it is not there.
        method: as `combination_type` of `add_weighted_adapter`.
        rank: of the result, for the methods that can reduce.
        energy: keep the fewest ranks that hold this share of the energy.
        density: share of the elements that pruning methods keep.
        majority_sign_method: how signs are elected, by "total" or "frequency".
        svd_clamp: quantile at which entries of the result are cut.
        t: where between two adapters "slerp" goes.
        epsilon: spread of the keep probabilities of "della".
        seed: of random pruning.
        overwrite: replace an adapter that is in `output` already.
        progress: is called with (what, done, total).

    Returns:
        What was written, and how much of the wanted change each weight keeps.

    Raises:
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: an adapter cannot be read.
        ConfigError: the request is not sound, the adapters do not go together, or `output` holds an adapter.
        UnsupportedError: whole modules, biases or token rows whose combination depends on the base.
        OSError: the disk refused. Nothing was written after any of these.
    """
    options = CombineOptions(
        density=density,
        majority_sign_method=majority_sign_method,
        rank=rank,
        svd_clamp=svd_clamp,
        seed=seed,
        energy=energy,
        t=t,
        epsilon=epsilon,
    )
    return combine_adapters(paths, weights, output, method, options, overwrite=overwrite, progress=progress)
