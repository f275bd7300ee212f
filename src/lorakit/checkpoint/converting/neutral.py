"""The form in which adapters pass from one format to another: factors, scalings and a few settings, module by module.

A reader gives an `Adapter`, a writer takes one; none of them knows of another format. Scalings are exact: a piece
carries its alpha as well as the quotient, and a number that a format has no place for goes into B, without rounding
where the ratio is a power of two.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.storing import module_pattern
from lorakit.config import LoraConfig
from lorakit.layouts import filled, matrix_layout
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from lorakit.checkpoint.converting.base import Base
    from lorakit.layouts import Layout


@dataclass(frozen=True)
class Piece:
    """What an adapter does to one module.

    Attributes:
        factors: A (r, in), B (out, r), the scaling `alpha / r`, and a bias of B or None.
        alpha: the numerator of that scaling; under rsLoRA its square root of r is in it.
        layout: of the factors: a matrix, or a convolution of one group.
        is_embedding: whether the module is an embedding: A is (r, tokens), B is (dim, r).
        magnitude: (out,) of DoRA, or None.
    """

    factors: Factors
    alpha: float
    layout: Layout
    is_embedding: bool = False
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """The adapter of one model.

    Attributes:
        component: which model of a pipeline ("unet", "text_encoder" ...); empty where there is only one.
        config: what is known of it beside the pieces.
        pieces: by the path of the module, in the names of PEFT.
    """

    component: str
    config: LoraConfig
    pieces: dict[str, Piece]


@dataclass(frozen=True)
class Adapter:
    """One file's adapter: a part for each model that it is for.

    Attributes:
        where: the file, for messages.
        parts: one, or several of a pipeline.
    """

    where: str
    parts: tuple[Part, ...]


@dataclass
class Context:
    """What a reader or a writer gets beside the file.

    Attributes:
        base: the base that the caller named, or None.
        overwrite: whether an output may be replaced.
        notes: what the caller should know of what was made; readers and writers add to it.
    """

    base: Base | None
    overwrite: bool
    notes: list[str] = field(default_factory=list)


def plain_piece(A: Tensor, B: Tensor, alpha: float, *, is_embedding: bool = False) -> Piece:
    """A piece of a matrix, from stored factors A (r, in) and B (out, r)."""
    factors = Factors(A, B, alpha / A.shape[0])
    return Piece(factors, alpha, matrix_layout(*factors.shape), is_embedding)


def alpha_of(scaling: float, r: int) -> float:
    """The alpha whose quotient by `r` is this very scaling, a whole number where one is; else the nearest."""
    product = scaling * r
    near = (round(product), product, math.nextafter(product, -math.inf), math.nextafter(product, math.inf))
    return next((float(alpha) for alpha in near if alpha / r == scaling), product)


def features_of(part: Part) -> dict[str, str]:
    """The features of a part that not every format has, each with where it is."""
    found = {}
    for path, piece in part.pieces.items():
        own = {
            "dora": piece.magnitude is not None,
            "lora_bias": piece.factors.bias is not None,
            "embedding": piece.is_embedding,
            "convolution": len(piece.layout.row) > 1,
        }
        found.update({name: path for name, used in own.items() if used and name not in found})
    if part.config.alora_invocation_tokens is not None:
        found["alora"] = "alora_invocation_tokens"
    return found


# ---- the config that says what the pieces are ---------------------------------------------------------


def config_of(pieces: Mapping[str, Piece], like: LoraConfig | None = None) -> LoraConfig:
    """A config that says of the pieces what they are, with what another one says of the base and of the task.

    Its `target_modules` are whole paths: only they mean these modules and no others whatever the base is.
    """
    ranks = {path: piece.factors.rank for path, piece in pieces.items()}
    alphas = {path: piece.alpha for path, piece in pieces.items()}
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    known = LoraConfig() if like is None else like
    return LoraConfig(
        base_model_name_or_path=known.base_model_name_or_path,
        revision=known.revision,
        task_type=known.task_type,
        fan_in_fan_out=known.fan_in_fan_out,
        lora_dropout=known.lora_dropout,
        alora_invocation_tokens=known.alora_invocation_tokens,
        r=int(r),
        lora_alpha=whole(alpha),
        rank_pattern={module_pattern(path): rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={module_pattern(path): whole(own) for path, own in alphas.items() if own != alpha},
        target_modules=set(pieces),
        use_dora=any(piece.magnitude is not None for piece in pieces.values()),
        lora_bias=any(piece.factors.bias is not None for piece in pieces.values()),
        inference_mode=True,
    )


def most_common(numbers: Iterable[float]) -> float:
    """The number that occurs most often, of several the first."""
    return Counter(numbers).most_common(1)[0][0]


def whole(number: float) -> float:
    """An int where the number is one."""
    return int(number) if number == int(number) else number


# ---- one number for all modules -----------------------------------------------------------------------


class Folded(NamedTuple):
    """Pieces whose differences from a common number are in B, and a note about them or an empty text."""

    pieces: dict[str, Piece]
    note: str


def with_alpha(pieces: Mapping[str, Piece], alpha: float) -> Folded:
    """The pieces with the same alpha, their ranks as they are."""
    return _folded(pieces, {path: piece.alpha / alpha for path, piece in pieces.items()}, "alpha")


class Even(NamedTuple):
    """Pieces of one rank and one scaling."""

    rank: int
    scaling: float
    pieces: dict[str, Piece]


def at_one_scaling(part: Part, context: Context) -> Even:
    """The pieces of a part with the largest rank, lesser ones filled with zeros, and the scaling that most have.

    A note in `context` says what was rounded for it.
    """
    pieces = part.pieces
    rank = max(piece.factors.rank for piece in pieces.values())
    scaling = most_common(piece.factors.scaling for piece in pieces.values())
    ratios = {path: piece.factors.scaling / scaling for path, piece in pieces.items()}
    folded = _folded(pieces, ratios, "scaling")
    context.notes += [folded.note] if folded.note else []
    return Even(rank, scaling, {path: _padded(piece, rank) for path, piece in folded.pieces.items()})


def _folded(pieces: Mapping[str, Piece], ratios: Mapping[str, float], what: str) -> Folded:
    found, rounded = {}, 0
    for path, piece in pieces.items():
        ratio = ratios[path]
        B, exact = (piece.factors.B, True) if ratio == 1.0 else _times(piece.factors.B, ratio)
        rounded += not exact
        found[path] = replace(piece, factors=replace(piece.factors, B=B))
    count = sum(ratio != 1.0 for ratio in ratios.values())
    if not count:
        return Folded(found, "")
    how = f", in {rounded} of them rounded once to float32" if rounded else ", without rounding"
    return Folded(
        found,
        f"{count} of {len(found)} modules have another {what} than the rest, which is in their B now{how}",
    )


def _times(tensor: Tensor, ratio: float) -> tuple[Tensor, bool]:
    """The product in the tensor's dtype where that is exact, else in float32, rounded once; and whether it is exact."""
    scaled = tensor * ratio
    power_of_two = math.frexp(abs(ratio))[0] == 0.5
    if power_of_two and torch.equal(scaled / ratio, tensor):
        return scaled, True
    product = tensor.double() * ratio
    return (product if tensor.dtype == torch.float64 else product.float()), False


def _padded(piece: Piece, r: int) -> Piece:
    factors = piece.factors
    A, B = filled(factors.A, r, dim=0), filled(factors.B, r, dim=1)
    return replace(piece, factors=replace(factors, A=A, B=B))
