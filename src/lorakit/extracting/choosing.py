"""Which changes become factors, which are kept whole, and which have no place in an adapter."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from lorakit.config import LoraConfig, NearNames, TaskType, ends_in
from lorakit.errors import ConfigError, UnsupportedError, bullet_list
from lorakit.surgery import describe
from lorakit.surgery.describe import is_read_by_parent
from lorakit.surgery.targets import shortest_names

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import nn

    from lorakit.extracting.changes import Change
    from lorakit.surgery import Description, Plan
    from lorakit.surgery.describe import Node


_MOST = 200  # lines in an error
_NUMBER = re.compile(r"\.\d+\.")


class Asked(NamedTuple):
    """What the caller says of where changes go.

    Attributes:
        target_modules: names that end the paths of modules whose weight becomes factors; None: every linear layer and
            convolution but the head.
        modules_to_save: of modules that are kept whole.
        bias: which biases are kept, as in `LoraConfig`.
        ignore: names that end the names of tensors, or the paths of modules, whose change is left out.
    """

    target_modules: Sequence[str] | None
    modules_to_save: Sequence[str]
    bias: str
    ignore: Sequence[str]


def choose(
    model: nn.Module, changes: Mapping[str, Change], known: Mapping[str, str], asked: Asked, rank: int
) -> LoraConfig:
    """A config for an adapter with a place for the changes.

    Raises:
        ConfigError: nothing changed, or a name means nothing in this model.
        UnsupportedError: nothing changed that could become factors.
    """
    description = describe(model)
    _check_names(description, asked)
    whole = [path for path in _named(description, asked.modules_to_save) if _is_touched(path, changes, known)]
    shared = _shared(known)
    targets = {
        path
        for path, node in description.nodes.items()
        if (change := changes.get(f"{path}.weight")) is not None
        and change.size is not None
        and change.name not in shared
        and not any(path == other or path.startswith(f"{other}.") for other in whole)
        and not _is_ignored(change.name, asked.ignore)
        and _is_target(description, node, asked.target_modules)
    }
    if not changes:
        raise ConfigError("nothing to extract: the two checkpoints hold the same numbers")
    if not targets:
        raise UnsupportedError(
            bullet_list(
                "none of these tensors, which changed, is one that factors are to stand for", _listed(changes)
            )
        )
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=shortest_names(targets, description.nodes),
        modules_to_save=whole or None,
        bias=asked.bias,
        ensure_weight_tying=any(name.startswith(f"{path}.") for path in whole for name in shared),
        task_type=TaskType.CAUSAL_LM.value if type(model).__name__.endswith("ForCausalLM") else None,
    )


def check_covered(
    plan: Plan, changes: Mapping[str, Change], known: Mapping[str, str], asked: Asked
) -> list[Change]:
    """The changes that are left out because the caller said so.

    Raises:
        UnsupportedError: others have no place in the adapter; lists them.
    """
    covered = {known.get(name, name) for name in _covered(plan, known)}
    left = [change for name, change in changes.items() if name not in covered]
    lost = {change.name: change for change in left if not _is_ignored(change.name, asked.ignore)}
    if lost:
        raise UnsupportedError(
            bullet_list(
                "these tensors changed, and the adapter has no place for them",
                _listed(lost),
                "Name their modules in modules_to_save (kept whole), set bias='all' for biases, name more target_modules, "
                "or give names to ignore: their change is then left out, and told.",
            )
        )
    return left


def _listed(changes: Mapping[str, Change]) -> list[str]:
    """One line for each tensor, or for all that are called so but for a number."""
    alike: dict[tuple[str, bool], list[Change]] = {}
    for change in changes.values():
        pattern = _NUMBER.sub(".*.", change.name)
        alike.setdefault((pattern, change.size is None), []).append(change)
    lines: list[str] = []
    for (pattern, is_odd), group in alike.items():
        sizes = [change.size for change in group if change.size is not None]
        if is_odd or len(group) == 1:
            lines += map(str, group)
        else:
            lines.append(
                f"{pattern}: {len(group)} tensors changed, by {min(sizes):.2e} to {max(sizes):.2e} of their norm"
            )
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"and {len(lines) - _MOST:,} more"]


def _covered(plan: Plan, known: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{spec.path}.weight" for spec in plan.specs)
    yield from plan.biases
    for name in known:
        if any(name.startswith(f"{path}.") for path in plan.modules_to_save):
            yield name


def _is_target(description: Description, node: Node, names: Sequence[str] | None) -> bool:
    if node.kind is None or is_read_by_parent(node.module) or getattr(node.module, "groups", 1) > 1:
        return False
    if names is not None:
        return any(ends_in(node.path, name) for name in names)
    embeddings = [description.embedding("input"), description.embedding("output")]
    is_one = any(node.module is each for each in embeddings)
    return not is_one and (node.kind.is_linear or node.kind.name == "conv")


def _named(description: Description, entries: Collection[str]) -> list[str]:
    """The outermost modules that entries of `modules_to_save` mean: as PEFT, by any ending of their path."""
    found = [path for path in description.nodes if path and any(path.endswith(entry) for entry in entries)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _is_touched(path: str, changes: Mapping[str, Change], known: Mapping[str, str]) -> bool:
    return any(name.startswith(f"{path}.") and first in changes for name, first in known.items())


def _is_ignored(name: str, entries: Collection[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(ends_in(name, entry) or ends_in(module, entry) for entry in entries)


def _shared(known: Mapping[str, str]) -> set[str]:
    """All names of tensors that have several."""
    counts = Counter(known.values())
    return {name for name, first in known.items() if counts[first] > 1}


def _check_names(description: Description, asked: Asked) -> None:
    paths = [path for path in description.nodes if path]
    near = NearNames(paths)
    tensors = [name for name, _ in description.model.named_parameters()]
    problems = [
        f"target_modules: {name!r} is no module of this model{near(name)}"
        for name in asked.target_modules or ()
        if not any(ends_in(path, name) for path in paths)
    ]
    problems += [
        f"modules_to_save: {name!r} is no module of this model{near(name)}"
        for name in asked.modules_to_save
        if not any(path.endswith(name) for path in paths)
    ]
    problems += [
        f"ignore: {name!r} is neither a tensor nor a module of this model{near(name)}"
        for name in asked.ignore
        if not any(ends_in(each, name) for each in (*paths, *tensors))
    ]
    if problems:
        raise ConfigError(bullet_list("names that this model does not have", problems))
