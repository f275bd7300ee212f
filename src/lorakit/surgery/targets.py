"""Which modules `target_modules` means when it is None or "all-linear", and how to write the answer down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.config import SEQ_CLS_HEADS, TARGET_MODULES, TaskType
from lorakit.errors import PlanError
from lorakit.surgery.describe import is_read_by_parent

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description

ALL_LINEAR = "all-linear"

IMPLICIT_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS.value: SEQ_CLS_HEADS,
    TaskType.TOKEN_CLS.value: SEQ_CLS_HEADS,
    TaskType.QUESTION_ANS.value: ("qa_outputs",),
}
"""Heads that a task's model begins with untrained: trained whole and saved, whichever of them it has."""


def resolve_targets(
    description: Description, config: LoraConfig, trained_whole: Collection[str]
) -> set[str] | str:
    """`target_modules` as a set of names or a regular expression, with None and "all-linear" resolved.

    Raises:
        PlanError: None, and there is no default for this kind of model; or "all-linear" finds nothing.
    """
    targets = config.target_modules
    if targets == ALL_LINEAR:
        return _all_linear(description, config, trained_whole)
    if targets is not None:
        return targets if isinstance(targets, str) else set(targets)
    model_type = description.model_type()
    known = TARGET_MODULES.get(model_type or "")
    if known is None:
        names = sorted({node.path.rpartition(".")[2] for node in description.nodes.values() if node.kind})
        why = f"target_modules is None and there is no default for model type {model_type!r}"
        raise PlanError([f'{why}; pass target_modules="all-linear" or some of these names: {names}'])
    return known if isinstance(known, str) else set(known)


def _all_linear(description: Description, config: LoraConfig, trained_whole: Collection[str]) -> set[str]:
    """Every linear layer but the head that makes the model's output."""
    head = description.output_embedding()
    heads = SEQ_CLS_HEADS if head is None and config.task_type == TaskType.SEQ_CLS else ()
    chosen = {
        node.path
        for node in description.nodes.values()
        if node.kind is not None
        and node.path not in trained_whole
        and node.module is not head
        and node.path.rpartition(".")[2] not in heads
        and not is_read_by_parent(node.module)
    }
    if not chosen:
        raise PlanError(['target_modules="all-linear" finds no linear layer in this model'])
    return shortest_names(chosen, description.nodes)


def shortest_names(chosen: Collection[str], paths: Collection[str]) -> set[str]:
    """The shortest path endings that mean exactly the `chosen` ones of all `paths`.

    "model.layers.0.mlp.up_proj" becomes "up_proj" unless a path that was not chosen ends so too. A config
    written with these names stays readable, and loads into the same modules everywhere.
    """
    others = {ending for path in paths if path not in chosen for ending in _endings(path)}
    return {next((name for name in _endings(path) if name not in others), path) for path in chosen}


def _endings(path: str) -> list[str]:
    """Endings of a path from the shortest to the whole."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
