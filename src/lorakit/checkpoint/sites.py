"""The factors of an adapter file, weight by weight, without any model.

What a file holds says enough: the shapes of the factors tell a matrix from a convolution, and the config tells the rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lorakit.checkpoint.hub import resolve_adapter
from lorakit.checkpoint.keys import from_file_key
from lorakit.checkpoint.reading import open_adapter
from lorakit.config import REQUIRED_KEYS, LoraConfig, Matcher, check_supported, ends_in
from lorakit.errors import AdapterFormatError, UnsupportedError, bullet_list
from lorakit.layouts import Layout, matrix_layout
from lorakit.specs import FACTOR_OF, TOKEN_ROWS, scaling_of
from lorakit.variants import variant_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from lorakit.types import Factors

_FACTOR = re.compile(
    r"(?P<site>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])"
)
ROWS = f".{TOKEN_ROWS}"


class Site(NamedTuple):
    """The factors of one adapter on one weight.

    Attributes:
        layout: of the factors.
        blocks: one pair for each block of the layout.
        is_embedding: whether they are named as those of an embedding.
    """

    layout: Layout
    blocks: tuple[Factors, ...]
    is_embedding: bool


@dataclass(frozen=True)
class Source:
    """One adapter, read.

    Attributes:
        where: its folder, for messages.
        config: its config.
        sites: its factors by the path in the file.
        rows: its token rows by module, as token to row.
        rest: its other tensors by name.
    """

    where: str
    config: LoraConfig
    sites: dict[str, Site]
    rows: dict[str, dict[int, Tensor]]
    rest: dict[str, Tensor]


class Sorted(NamedTuple):
    """The tensors of a file by what they are.

    Attributes:
        factors: A, B and bias of B by the path in the file.
        embeddings: those of these paths that are named as an embedding's.
        rows: token rows by module.
        rest: all others by name.
    """

    factors: dict[str, dict[str, Tensor]]
    embeddings: set[str]
    rows: dict[str, Tensor]
    rest: dict[str, Tensor]


def read_source(path: str | os.PathLike[str], *, instead: str) -> Source:
    """An adapter, with its factors in blocks.

    Args:
        path: a folder, or a repository of the hub.
        instead: what to do where the adapter is more than its factors, for the message.

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError, NonFiniteError: it cannot be read.
        UnsupportedError: its config asks for what lorakit cannot do.
    """
    file = open_adapter(resolve_adapter(path))
    where = str(file.folder)
    config = LoraConfig.from_dict(file.config, where=where, required=REQUIRED_KEYS)
    check_supported(config, loading=True)
    variant = variant_of(config)
    if variant is not None:
        raise UnsupportedError(
            f"{where}: {variant.name} is more than its factors, which are all that files alone tell; {instead}"
        )
    found = sort_tensors({from_file_key(key): tensor for key, tensor in file.load().items()})
    rows = {
        module: dict(zip(_tokens_of(config, module, len(own), where), own, strict=True))
        for module, own in found.rows.items()
    }
    sites, problems = find_sites(found, config)
    if problems:
        raise AdapterFormatError(bullet_list(f"{where}: its factors cannot be read", problems))
    return Source(where, config, sites, rows, found.rest)


def sort_tensors(tensors: Mapping[str, Tensor]) -> Sorted:
    """Tell factors from token rows and from all else, by their names inside the model."""
    sorted_ = Sorted({}, set(), {}, {})
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is not None:
            sorted_.factors.setdefault(found["site"], {})[FACTOR_OF[found["part"]]] = tensor
            if "embedding" in found["part"]:
                sorted_.embeddings.add(found["site"])
        elif name.endswith(ROWS):
            sorted_.rows[name.removesuffix(ROWS)] = tensor
        else:
            sorted_.rest[name] = tensor
    return sorted_


def find_sites(found: Sorted, config: LoraConfig) -> tuple[dict[str, Site], list[str]]:
    """The factors in blocks, and one line for each that cannot be read."""
    matcher = Matcher(replace(config, target_modules=None))
    problems: list[str] = []
    sites = {}
    for path, parts in found.factors.items():
        if not {"A", "B"} <= parts.keys():
            problems.append(f"{path}: has only {sorted(parts)} of A and B")
            continue
        try:
            sites[path] = _site(path, parts, config, matcher, is_embedding=path in found.embeddings)
        except (AdapterFormatError, UnsupportedError) as error:
            problems.append(f"{path}: {error}")
    return sites, problems


def _site(
    path: str, parts: Mapping[str, Tensor], config: LoraConfig, matcher: Matcher, *, is_embedding: bool
) -> Site:
    A, B = parts["A"], parts["B"]
    owner = owner_of(path)
    is_parameter = carries_parameters(config, owner)
    r, alpha = (config.r, config.lora_alpha) if is_parameter else (matcher.rank(owner), matcher.alpha(owner))
    scaling = scaling_of(r, alpha, rslora=config.use_rslora)
    experts, rest = divmod(A.shape[0], r)
    if rest or (experts != 1 and not is_parameter):
        raise AdapterFormatError(f"A has {A.shape[0]} rows, the config says rank {r}")
    if is_parameter and {**config.rank_pattern, **config.alpha_pattern}:
        raise UnsupportedError(
            "rank_pattern or alpha_pattern beside target_parameters: a file does not say which parameter is which; "
            "load the adapters on a model and call add_weighted_adapter()"
        )
    layout = _layout(A, B, experts if is_parameter else 0)
    return Site(layout, layout.split(A, B, scaling, parts.get("bias")), is_embedding)


def _layout(A: Tensor, B: Tensor, experts: int) -> Layout:
    if A.ndim > 2:
        groups, rest = divmod(A.shape[0], B.shape[1])
        if rest or B.shape[0] % groups:
            raise AdapterFormatError(f"A of {tuple(A.shape)} and B of {tuple(B.shape)} do not go together")
        return Layout(B.shape[0], tuple(A.shape[1:]), groups=groups)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdapterFormatError(f"A of {tuple(A.shape)} and B of {tuple(B.shape)} do not go together")
    if experts > 1:
        return Layout(B.shape[0], (A.shape[1],), experts=experts)
    return matrix_layout(B.shape[0], A.shape[1])


def owner_of(path: str) -> str:
    """The module that a config names for the factors at a path: what is inside a wrapped one goes with it."""
    return path.partition(".base_layer")[0]


def carries_parameters(config: LoraConfig, module: str) -> bool:
    """Whether the factors on a module are those of its bare parameters (`target_parameters`)."""
    owners = [name.rpartition(".")[0] for name in config.target_parameters or ()]
    return any(ends_in(module, owner) for owner in owners if owner)


def _tokens_of(config: LoraConfig, module: str, count: int, where: str) -> list[int]:
    wanted = config.trainable_token_indices
    if isinstance(wanted, dict):
        found = next((v for name, v in wanted.items() if ends_in(module, name)), None)
    else:
        found = wanted
    if found is None or len(found) != count:
        raise AdapterFormatError(
            f"{where}: {count} token rows of {module}, and the config names {0 if found is None else len(found)}"
        )
    return list(found)
