"""Which modules `target_modules` means when it is None or "all-linear", and how to write the answer down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.config import SEQ_CLS_HEADS, TARGET_MODULES, NearNames, TaskType
from lorakit.config.suggest import suffixes
from lorakit.errors import PlanError
from lorakit.surgery.describe import is_read_by_parent

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description

ALL_LINEAR = "all-linear"

IMPLICIT_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS.value: SEQ_CLS_HEADS,
    TaskType.TOKEN_CLS.value: SEQ_CLS_HEADS,
    TaskType.QUESTION_ANS.value: ("qa_outputs",),
}
"""Heads that a task's model begins with untrained: trained whole and saved, whichever of them it has."""


def resolve_targets(description: Description, config: LoraConfig, whole: Collection[str]) -> set[str] | str:
    """`target_modules` as a set of names or a regular expression, with None and "all-linear" resolved.

    None takes the default of the model's type. Where there is none, it means no module if the config names
    parameters or tokens, which can be all that an adapter trains.

    Raises:
        PlanError: None, and there is nothing else; or "all-linear" finds nothing.
    """
    targets = config.target_modules
    if targets == ALL_LINEAR:
        return _all_linear(description, config, whole)
    if targets is not None:
        return targets if isinstance(targets, str) else set(targets)
    model_type = description.model_type()
    known = TARGET_MODULES.get(model_type or "")
    if known is not None:
        return known if isinstance(known, str) else set(known)
    if config.target_parameters or config.trainable_token_indices:
        return set()
    names = sorted({node.path.rpartition(".")[2] for node in description.nodes.values() if node.kind})
    why = f"target_modules is None and there is no default for model type {model_type!r}"
    raise PlanError([f'{why}; pass target_modules="all-linear" or some of these names: {names}'])


def _all_linear(description: Description, config: LoraConfig, whole: Collection[str]) -> set[str]:
    """Every linear layer but the head that makes the model's output."""
    head = description.embedding("output")
    heads = SEQ_CLS_HEADS if head is None and config.task_type == TaskType.SEQ_CLS else ()
    chosen = {
        node.path
        for node in description.nodes.values()
        if node.kind is not None
        and node.kind.is_linear
        and node.path not in whole
        and node.module is not head
        and node.path.rpartition(".")[2] not in heads
        and not is_read_by_parent(node.module)
    }
    if not chosen:
        if config.target_parameters or config.trainable_token_indices:
            return set()
        raise PlanError(['target_modules="all-linear" finds no linear layer in this model'])
    return shortest_names(chosen, description.nodes)


def shortest_names(chosen: Collection[str], paths: Collection[str]) -> set[str]:
    """The shortest path endings that mean exactly the `chosen` ones of all `paths`.

    "model.layers.0.mlp.up_proj" becomes "up_proj" unless a path that was not chosen ends so too. A config
    written with these names stays readable, and loads into the same modules everywhere.
    """
    others = {ending for path in paths if path not in chosen for ending in suffixes(path)}
    last = {path.rpartition(".")[2] for path in chosen}
    longer = [path for path in chosen if path.rpartition(".")[2] in others]
    return (last - others) | {
        next((name for name in _endings(path) if name not in others), path) for path in longer
    }


def _endings(path: str) -> list[str]:
    """Endings of a path from the shortest to the whole."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def trained_whole(
    description: Description, config: LoraConfig, problems: list[str], loose: list[str]
) -> dict[str, nn.Module]:
    """Modules that `modules_to_save` names, by path; those inside another one are part of it.

    Args:
        description: of the model.
        config: with `modules_to_save`.
        problems: get the modules that cannot be trained whole.
        loose: gets the entries that match nothing.
    """
    found: dict[str, nn.Module] = {}
    candidates = {path: node.module for path, node in description.nodes.items() if path}
    candidates |= {path: wrapper.original_module for path, wrapper in description.saved.items()}
    implicit = IMPLICIT_HEADS.get(config.task_type or "", ())
    for entry in config.modules_to_save or ():
        hits = [path for path in candidates if path.endswith(entry)]  # as PEFT: "norm" means every "...norm"
        if not hits and entry not in implicit:
            loose.append(f"modules_to_save: {entry!r} matches no module" + NearNames(candidates)(entry))
        found.update({path: candidates[path] for path in hits})
    outermost = {
        path: module
        for path, module in found.items()
        if not any(path != other and path.startswith(other + ".") for other in found)
    }
    for path in outermost:
        taken = [node.path for node in description.children_of(path) if node.layer or node.wrappers]
        taken += [saved for saved in description.saved if saved.startswith(f"{path}.")]
        if taken:
            problems.append(
                f"modules_to_save: {path!r} cannot be trained whole, since {taken[:3]} carry another adapter; delete "
                "that one first, or load this adapter onto a model of its own"
            )
    return outermost


def near_targets(config: LoraConfig, description: Description) -> str:
    """A closing half-sentence with names that exist and look like those asked for."""
    wanted = config.target_modules
    entries = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    return "".join(dict.fromkeys(map(NearNames(description.nodes), entries)))
