"""The weights that transformers makes of a checkpoint's tensors on loading, where the two are named differently.

Which names those are, transformers itself says (5.0 and later, `transformers.conversion_mapping`), and only of a model:
so one is made, on the meta device, without any numbers. This happens only for adapters with names that the checkpoint
does not have. What can be told as ranges of tensors one after another is (renaming, cutting along the first dimension,
joining, stacking experts); the names of everything else are given back as refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.merging.weight import Piece, Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorakit.checkpoint.shards import ModelShards


def converted(shards: ModelShards) -> tuple[dict[str, Weight], dict[str, str]]:
    """The weights that have other names in the model than in the checkpoint, and the names of those that cannot be told.

    Returns:
        Both empty where transformers is not there, does not know the model, or converts nothing.
    """
    model = _meta_model(shards)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return {}, {}
    if model is None:
        return {}, {}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    weights: dict[str, Weight] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(shards.places, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            continue
        if pattern is None:
            place = shards.places[name].info
            if renamed != name:
                weights[renamed] = Weight(
                    renamed, place.shape, place.dtype, (Piece(name, 0, math.prod(place.shape)),)
                )
            continue
        groups.setdefault(renamed, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)
    refused: dict[str, str] = {}
    for target, (converter, sources) in groups.items():
        made = _made(target, converter, sources, shards)
        weights.update(made)
        if not made:
            operations = " and ".join(type(operation).__name__ for operation in converter.operations)
            refused.update(dict.fromkeys(_targets(target, converter), operations))
    return weights, refused


def _meta_model(shards: ModelShards) -> Any:
    """The model of a checkpoint's config without numbers; None where transformers does not have it."""
    try:
        import transformers
    except ImportError:
        return None
    names = shards.config.get("architectures")
    kind: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    with torch.device("meta"):
        return kind(kind.config_class.from_dict(shards.config))  # type: ignore[attr-defined]


def _made(
    target: str, converter: Any, sources: Mapping[str, Sequence[str]], shards: ModelShards
) -> dict[str, Weight]:
    """The weights that a conversion makes, by name; none where they are no ranges of elements one after another."""
    operations = tuple(
        (type(operation).__name__, getattr(operation, "dim", 0)) for operation in converter.operations
    )
    recipe = _RECIPES.get(operations)
    ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
    dtypes = {shards.places[name].info.dtype for names in ordered for name in names}
    counts = {len(names) for names in ordered}
    if (
        recipe is None
        or len(dtypes) != 1
        or len(counts) != 1
        or len(ordered) != len(converter.source_patterns)
    ):
        return {}
    return recipe(_targets(target, converter), ordered, shards)


def _targets(target: str, converter: Any) -> list[str]:
    """The names of all that a conversion makes; `target` is that of the first."""
    patterns = converter.target_patterns
    prefix, first, suffix = target.partition(patterns[0])
    return [prefix + pattern + suffix for pattern in patterns] if first else [target]


def _whole(name: str, shards: ModelShards) -> Piece:
    return Piece(name, 0, math.prod(shards.places[name].info.shape))


def _cut(targets: Sequence[str], ordered: Sequence[Sequence[str]], shards: ModelShards) -> dict[str, Weight]:
    """One tensor cut into equal parts along its first dimension."""
    ((source,),) = ordered
    info = shards.places[source].info
    if info.shape[0] % len(targets):
        return {}
    shape = (info.shape[0] // len(targets), *info.shape[1:])
    count = math.prod(shape)
    return {
        name: Weight(name, shape, info.dtype, (Piece(source, number * count, count),))
        for number, name in enumerate(targets)
    }


def _joined(
    targets: Sequence[str], ordered: Sequence[Sequence[str]], shards: ModelShards
) -> dict[str, Weight]:
    """Tensors joined along their first dimension."""
    names = [name for each in ordered for name in each]
    shapes = [shards.places[name].info.shape for name in names]
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    pieces = tuple(_whole(name, shards) for name in names)
    return {targets[0]: Weight(targets[0], shape, shards.places[names[0]].info.dtype, pieces)}


def _stacked(
    targets: Sequence[str], ordered: Sequence[Sequence[str]], shards: ModelShards
) -> dict[str, Weight]:
    """Matrices of experts stacked, those of one expert joined along their first dimension."""
    shapes = [{shards.places[name].info.shape for name in names} for names in ordered]
    if any(len(each) != 1 for each in shapes):
        return {}
    each = [shape for (shape,) in shapes]
    shape = (len(ordered[0]), sum(shape[0] for shape in each), *each[0][1:])
    pieces = tuple(_whole(name, shards) for names in zip(*ordered, strict=True) for name in names)
    return {targets[0]: Weight(targets[0], shape, shards.places[ordered[0][0]].info.dtype, pieces)}


_RECIPES: dict[
    tuple[tuple[str, int], ...],
    Callable[[Sequence[str], Sequence[Sequence[str]], ModelShards], dict[str, Weight]],
] = {
    (("Chunk", 0),): _cut,
    (("Concatenate", 0),): _joined,
    (("MergeModulelist", 0),): _stacked,
    (("MergeModulelist", 0), ("Concatenate", 1)): _stacked,
}
