"""`lorakit.diff`: how far apart two adapters are, weight by weight, from their files.

What is compared is what they do to a weight, the delta, and not A and B: these can be written in many ways. Everything is
read from the factors, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from lorakit.checkpoint.keys import natural_key
from lorakit.checkpoint.sites import read_source
from lorakit.checkpoint.storing import silent
from lorakit.ops.low_rank import low_rank_svd
from lorakit.ops.norms import frobenius_norm
from lorakit.ops.similarity import Angles, column_angles, difference_norm, inner_product, row_angles
from lorakit.specs import TOKEN_ROWS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorakit.checkpoint.sites import Site, Source
    from lorakit.checkpoint.storing import Progress
    from lorakit.ops.low_rank import LowRank
    from lorakit.types import Factors

T = TypeVar("T")


@dataclass(frozen=True)
class LayerDifference:
    """Two deltas of one weight.

    Attributes:
        path: in the files.
        difference: Frobenius norm of the one minus the other, relative to the larger of the two norms: 0 if they are the
            same, 1 if one of them is zero, 2 if they are opposite.
        cosine: of the angle between them as vectors, in [-1, 1]; None if one of them is zero.
        norm_a, norm_b: their Frobenius norms.
        rank_a, rank_b: of the factors.
        columns: the principal angles between their column spaces, of experts and groups the mean overlap and the extreme
            angles; None if one of them is zero.
        rows: the same between their row spaces.
    """

    path: str
    difference: float
    cosine: float | None
    norm_a: float
    norm_b: float
    rank_a: int
    rank_b: int
    columns: Angles | None
    rows: Angles | None


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors that adapters hold whole: of modules saved whole, biases, token rows.

    Attributes:
        name: inside the model.
        difference: as of a layer.
    """

    name: str
    difference: float


@dataclass(frozen=True)
class ConfigDifference:
    """A field in which two configs differ.

    Attributes:
        field: its name.
        a, b: its values; None where a config does not have it.
    """

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class AdapterDifference:
    """What `diff` found.

    Attributes:
        a, b: the folders.
        difference: of all deltas together, as of one layer; a weight that only one adapter changes counts as a delta of
            zero in the other.
        cosine: of the angle between all deltas together; None if one adapter changes nothing.
        norm_a, norm_b: of all deltas together.
        largest: the largest of `difference` and of the differences of `tensors`; 1 where a tensor is in one alone.
        layers: a row for each weight that both change.
        tensors: a row for each tensor that both hold whole.
        only_a, only_b: what one of them has alone, factors and tensors.
        config: the fields that differ.
    """

    a: str
    b: str
    difference: float
    cosine: float | None
    norm_a: float
    norm_b: float
    largest: float
    layers: tuple[LayerDifference, ...]
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    config: tuple[ConfigDifference, ...]


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: Progress = silent
) -> AdapterDifference:
    """Compare two adapters.

    Args:
        a: one folder, or repository of the hub.
        b: the other.
        progress: is called with (what, done, total).

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError, NonFiniteError: one cannot be read.
        UnsupportedError: one is more than its factors (DoRA and other variants): what it does depends on the base.
    """
    instead = "merge each into the base (lorakit merge) and compare the merged weights"
    first, second = (read_source(path, instead=instead) for path in (a, b))
    sites = _matched(first.sites, second.sites, lambda site: (*site.layout.block_shape, site.layout.blocks))
    tensors = _matched(_whole(first), _whole(second), lambda tensor: tuple(tensor.shape))
    layers = []
    for done, (path, pair) in enumerate(sites.both.items()):
        progress("comparing", done, len(sites.both))
        layers.append(_layer(path, *pair))
    progress("comparing", len(layers), len(layers))
    compared = tuple(TensorDifference(name, _relative(*pair)) for name, pair in tensors.both.items())
    total = _Total(
        layers, [_norm(site) for site in sites.a.values()], [_norm(site) for site in sites.b.values()]
    )
    parted = [1.0] * (len(tensors.a) + len(tensors.b))
    return AdapterDifference(
        a=first.where,
        b=second.where,
        difference=total.difference,
        cosine=_cosine(total.inner, *total.norms),
        norm_a=total.norms[0],
        norm_b=total.norms[1],
        largest=max(total.difference, *(each.difference for each in compared), *parted, 0.0),
        layers=tuple(layers),
        tensors=compared,
        only_a=(*sites.a, *tensors.a),
        only_b=(*sites.b, *tensors.b),
        config=_config(first, second),
    )


# ---- what goes with what ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matched(Generic[T]):
    """Things by name: those that both have in one shape, and those that one has alone."""

    both: dict[str, tuple[T, T]]
    a: dict[str, T]
    b: dict[str, T]


def _matched(a: Mapping[str, T], b: Mapping[str, T], shape: Callable[[T], tuple[int, ...]]) -> _Matched[T]:
    """What is in both, but of different shapes, counts as in one alone, twice."""
    both = {
        name: (a[name], b[name])
        for name in sorted(a, key=natural_key)
        if name in b and shape(a[name]) == shape(b[name])
    }
    return _Matched(
        both,
        {name: own for name, own in a.items() if name not in both},
        {name: own for name, own in b.items() if name not in both},
    )


def _whole(source: Source) -> dict[str, Tensor]:
    """The tensors that are not factors; of token rows, one for each token."""
    rows = {
        f"{module}.{TOKEN_ROWS}[{token}]": row
        for module, own in source.rows.items()
        for token, row in own.items()
    }
    return {**source.rest, **rows}


def _config(a: Source, b: Source) -> tuple[ConfigDifference, ...]:
    first, second = a.config.to_dict(), b.config.to_dict()
    return tuple(
        ConfigDifference(name, first.get(name), second.get(name))
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    )


# ---- how far apart ------------------------------------------------------------------------------------


class _Total:
    """All deltas together, from those of the layers and the norms of what is in one alone."""

    def __init__(
        self, layers: Sequence[LayerDifference], alone_a: Sequence[float], alone_b: Sequence[float]
    ) -> None:
        self.norms = (
            math.hypot(*(layer.norm_a for layer in layers), *alone_a),
            math.hypot(*(layer.norm_b for layer in layers), *alone_b),
        )
        self.inner = sum((layer.cosine or 0.0) * layer.norm_a * layer.norm_b for layer in layers)
        apart = (layer.difference * max(layer.norm_a, layer.norm_b) for layer in layers)
        self.difference = _share(math.hypot(*apart, *alone_a, *alone_b), *self.norms)


def _layer(path: str, a: Site, b: Site) -> LayerDifference:
    blocks = list(zip(a.blocks, b.blocks, strict=True))
    norms = _norm(a), _norm(b)
    apart = math.hypot(*(0.0 if _are_equal(*pair) else difference_norm(*pair) for pair in blocks))
    inner = sum(inner_product(*pair) for pair in blocks)
    svds = [(_svd(one), _svd(other)) for one, other in blocks]
    return LayerDifference(
        path=path,
        difference=_share(apart, *norms),
        cosine=_cosine(inner, *norms),
        norm_a=norms[0],
        norm_b=norms[1],
        rank_a=a.blocks[0].rank * a.layout.groups,
        rank_b=b.blocks[0].rank * b.layout.groups,
        columns=_together([column_angles(*pair) for pair in svds]),
        rows=_together([row_angles(*pair) for pair in svds]),
    )


def _are_equal(a: Factors, b: Factors) -> bool:
    """Whether the very numbers are the same; the norm of their difference would be some 1e-16 of theirs."""
    return a.scaling == b.scaling and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)


def _svd(block: Factors) -> LowRank:
    return low_rank_svd([block.to(torch.float64)])


def _norm(site: Site) -> float:
    return math.hypot(*(frobenius_norm(block) for block in site.blocks))


def _together(found: Sequence[Angles | None]) -> Angles | None:
    """Of all blocks: the mean overlap, the smallest and the largest angle."""
    angles = [each for each in found if each is not None]
    if not angles:
        return None
    return Angles(
        sum(each.overlap for each in angles) / len(angles),
        min(each.smallest for each in angles),
        max(each.largest for each in angles),
    )


def _relative(a: Tensor, b: Tensor) -> float:
    wide = a.double(), b.double()
    norms = [float(torch.linalg.vector_norm(each)) for each in wide]
    return _share(float(torch.linalg.vector_norm(wide[0] - wide[1])), *norms)


def _share(apart: float, a: float, b: float) -> float:
    return apart / max(a, b) if apart else 0.0


def _cosine(inner: float, a: float, b: float) -> float | None:
    return max(-1.0, min(1.0, inner / (a * b))) if a and b else None
