"""Combining adapter files into one, without any model: `lorakit.combine`.

The factors are combined weight by weight. Only what an adapter owns beside them (whole modules, biases, token rows) is a
question of the base: it is combined as base + sum of weight · (own - base), which is the weighted sum itself where the
weights sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import natural_key, to_file_key
from lorakit.checkpoint.sites import ROWS, Site, carries_parameters, owner_of, read_source
from lorakit.checkpoint.storing import refuse_existing, refuse_twice, silent, stored_sites, tied_sites
from lorakit.checkpoint.writing import write_adapter
from lorakit.combiners import check_request, combine
from lorakit.config import combined_config
from lorakit.errors import ConfigError, UnsupportedError, at_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from lorakit.checkpoint.sites import Source
    from lorakit.checkpoint.storing import Progress
    from lorakit.combiners import CombineOptions
    from lorakit.config import LoraConfig


@dataclass(frozen=True)
class CombinedLayer:
    """The combination on one weight.

    Attributes:
        path: in the file.
        rank: of the result.
        kept: the share in [0, 1] of the energy (squared Frobenius norm) of the wanted delta that the result has; the
            smallest one of groups and experts.
    """

    path: str
    rank: int
    kept: float


@dataclass(frozen=True)
class Combination:
    """What `combine` did.

    Attributes:
        output: the folder written.
        method: as asked.
        weights: of the adapters, in order.
        layers: a row for each weight, by path.
        parameters: of all tensors.
    """

    output: str
    method: str
    weights: tuple[float, ...]
    layers: tuple[CombinedLayer, ...]
    parameters: int


def combine_adapters(
    paths: Sequence[str | os.PathLike[str]],
    weights: Sequence[float],
    output: str | os.PathLike[str],
    method: str,
    options: CombineOptions,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Combination:
    """Write the combination of adapters to a new folder.

    Raises:
        ConfigError: the request is not sound, or the factors do not go together.
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: an adapter cannot be read.
        UnsupportedError: what they own beside factors cannot be combined without the base.
        OSError: the disk refused. Nothing was written after any of these.
    """
    target = Path(output)
    check_request(method, len(paths), weights, options)
    refuse_existing(target, overwrite=overwrite)
    sources = [
        read_source(path, instead="load the adapters on a model and call add_weighted_adapter()")
        for path in paths
    ]
    refuse_twice([source.where for source in sources])
    _check_related(sources)
    numbers = [float(weight) for weight in weights]
    combined, kept = _combined_sites(sources, numbers, method, options, progress)
    rows = _combined_rows(sources, numbers)
    rest = _combined_rest(sources, numbers)
    config, ranks = _config(sources, combined, rows)
    tensors = stored_sites(combined, ranks, tied_sites(sources), biased=config.lora_bias)
    for path, tokens in rows.items():
        tensors[path + ROWS] = torch.stack([tokens[token] for token in sorted(tokens)])
    tensors.update(rest)
    write_adapter(target, config.to_dict(), {to_file_key(name): tensor for name, tensor in tensors.items()})
    layers = [
        CombinedLayer(path, ranks[owner_of(path)], kept[path]) for path in sorted(combined, key=natural_key)
    ]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Combination(str(target), method, tuple(numbers), tuple(layers), parameters)


# ---- combining ----------------------------------------------------------------------------------------


def _check_related(sources: Sequence[Source]) -> None:
    """Refuse adapters of different models: none has a weight in common with another, and they say so themselves."""
    names = {source.config.base_model_name_or_path: source.where for source in sources}
    places = [place for source in sources for place in {*source.sites, *source.rows, *source.rest}]
    if len(sources) > 1 and len(names) == len(sources) and all(names) and len(places) == len(set(places)):
        told = ", ".join(f"{where} for {name!r}" for name, where in names.items())
        raise ConfigError(
            f"the adapters have no weight in common, and name different bases ({told}): combine adapters of one base; if it "
            "is one, give them its name in base_model_name_or_path"
        )


def _combined_sites(
    sources: Sequence[Source],
    weights: Sequence[float],
    method: str,
    options: CombineOptions,
    progress: Progress,
) -> tuple[dict[str, Site], dict[str, float]]:
    """The combined factors by path, and the share of the wanted delta that each keeps."""
    found, kept = {}, {}
    paths = list(dict.fromkeys(path for source in sources for path in source.sites))
    for done, path in enumerate(paths):
        progress("combining", done, len(paths))
        mine = [(s.sites[path], w) for s, w in zip(sources, weights, strict=True) if path in s.sites]
        layout = mine[0][0].layout
        if any(site.layout != layout or site.is_embedding != mine[0][0].is_embedding for site, _ in mine):
            shapes = [(*site.layout.row, site.layout.out) for site, _ in mine]
            raise ConfigError(f"{path}: the adapters are for weights of different shapes {shapes}")
        if method == "slerp" and len(mine) < len(sources):
            raise UnsupportedError(
                f"{path}: slerp is between two deltas, and only one adapter is on this weight"
            )
        with at_path(path):
            blocks = [
                combine(parts, [w for _, w in mine], method, options.of_block(path, number, layout.groups))
                for number, parts in enumerate(zip(*(site.blocks for site, _ in mine), strict=True))
            ]
        found[path] = Site(layout, tuple(block.factors for block in blocks), mine[0][0].is_embedding)
        kept[path] = min(block.kept for block in blocks)
    progress("combining", len(paths), len(paths))
    return found, kept


def _combined_rows(sources: Sequence[Source], weights: Sequence[float]) -> dict[str, dict[int, Tensor]]:
    found: dict[str, dict[int, Tensor]] = {}
    for module in dict.fromkeys(path for source in sources for path in source.rows):
        tokens = dict.fromkeys(t for source in sources for t in source.rows.get(module, ()))
        for token in tokens:
            own = [
                (source.rows[module][token], weight)
                for source, weight in zip(sources, weights, strict=True)
                if token in source.rows.get(module, ())
            ]
            found.setdefault(module, {})[token] = _affine(own, f"token {token} of {module}")
    return found


def _combined_rest(sources: Sequence[Source], weights: Sequence[float]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for source in sources for name in source.rest)
    return {
        name: _affine(
            [(s.rest[name], w) for s, w in zip(sources, weights, strict=True) if name in s.rest], name
        )
        for name in names
    }


def _affine(own: Sequence[tuple[Tensor, float]], what: str) -> Tensor:
    """The weighted sum of whole tensors, whose weights must sum to 1: then the base has no part in it."""
    total = sum(weight for _, weight in own)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise UnsupportedError(
            f"{what} is held whole by {len(own)} of the adapters, whose weights sum to {total:g}: what that makes of it "
            "depends on the base. Give those weights that sum to 1, or load the adapters on a model and call "
            "add_weighted_adapter()"
        )
    if len({tuple(tensor.shape) for tensor, _ in own}) > 1:
        raise ConfigError(f"{what}: its shapes differ, {[tuple(tensor.shape) for tensor, _ in own]}")
    wide = torch.promote_types(own[0][0].dtype, torch.float32)
    result = torch.zeros(own[0][0].shape, dtype=wide)
    for tensor, weight in own:
        result += tensor.to(wide) * weight
    return result.to(own[0][0].dtype)


# ---- writing ------------------------------------------------------------------------------------------


def _config(
    sources: Sequence[Source], combined: Mapping[str, Site], rows: Mapping[str, Mapping[int, Tensor]]
) -> tuple[LoraConfig, dict[str, int]]:
    """A config for exactly the combined tensors, and the rank for each module that it names."""
    configs = [source.config for source in sources]
    parameters = {tuple(sorted(config.target_parameters or ())) for config in configs}
    if len(parameters) > 1:
        raise UnsupportedError(
            "the adapters have different target_parameters, and a file does not say which of its tensors is which; "
            "load the adapters on a model and call add_weighted_adapter()"
        )
    if len({str(config.layer_replication) for config in configs}) > 1:
        raise UnsupportedError("the adapters have different layer_replication: they are for different models")
    ranks: dict[str, int] = {}
    for path, site in combined.items():
        rank = max(block.rank for block in site.blocks) * site.layout.groups
        ranks[owner_of(path)] = max(rank, ranks.get(owner_of(path), 0))
    of_parameters = [ranks[owner] for owner in ranks if carries_parameters(configs[0], owner)]
    if of_parameters:  # patterns could not tell parameters apart when the result is read
        ranks.update({owner: max(ranks.values()) for owner in ranks})
    first = configs[0]
    config = combined_config(
        configs,
        ranks,
        biased=any(block.bias is not None for site in combined.values() for block in site.blocks),
        modules_to_save=_union(config.modules_to_save for config in configs),
        tokens={path: sorted(tokens) for path, tokens in rows.items()},
    )
    config = replace(config, extra={})
    if not all(_selects_alike(first, other) for other in configs):
        modules = {owner for owner in ranks if not carries_parameters(first, owner)}
        config = replace(
            config,
            target_modules=modules,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    return config, ranks


def _selects_alike(one: LoraConfig, other: LoraConfig) -> bool:
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _union(lists: Iterable[list[str] | None]) -> list[str] | None:
    return list(dict.fromkeys(name for names in lists for name in names or ())) or None
