"""Which modules share one weight, and what that means for an adapter on some of them.

Modules are tied when they hold the very same parameter: a fact of the model in hand, whatever its config says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description


class Ties(NamedTuple):
    """An embedding and the modules that share its weight.

    Attributes:
        source: path of the embedding.
        others: paths of the modules tied to it.
        ensure: whether adapters on one of them are to be on all, with the same parameters.
    """

    source: str
    others: tuple[str, ...]
    ensure: bool

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (self.source, *self.others)


def find_ties(description: Description, config: LoraConfig) -> Ties | None:
    """The embedding whose weight other modules share: the model's input embedding, or the first such one."""
    modules = {path: node.module for path, node in description.nodes.items()}
    modules |= {path: wrapper.original_module for path, wrapper in description.saved.items()}
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and isinstance(module, (nn.Embedding, nn.Linear)):
            owners.setdefault(id(weight), []).append(path)
    named = description.embedding("input")
    for paths in owners.values():
        embeddings = [path for path in paths if isinstance(modules[path], nn.Embedding)]
        if len(paths) < 2 or not embeddings:
            continue
        if named is not None and all(modules[path] is not named for path in embeddings):
            continue
        source = next((path for path in embeddings if modules[path] is named), embeddings[0])
        return Ties(source, tuple(path for path in paths if path != source), config.ensure_weight_tying)
    return None


def with_tied(ties: Ties | None, paths: Collection[str]) -> tuple[str, ...]:
    """Those modules that `ensure_weight_tying` adds to the given ones."""
    if ties is None or not ties.ensure or set(ties.paths).isdisjoint(paths):
        return ()
    return tuple(path for path in ties.paths if path not in paths)


def tie_notes(
    ties: Ties | None, config: LoraConfig, targets: Collection[str], whole: Collection[str]
) -> list[str]:
    """What a user should know of tied weights that the config touches."""
    if ties is None:
        asked = config.ensure_weight_tying
        return (
            ["ensure_weight_tying=True, but no weights of this model are tied; it has no effect"]
            if asked
            else []
        )
    touched = [path for path in ties.paths if path in targets or path in whole]
    if ties.ensure:
        if touched or config.trainable_token_indices is not None:
            return []
        return ["ensure_weight_tying=True, but the config names none of the tied modules; it has no effect"]
    if not touched:
        return []
    note = (
        f"{touched} of the tied modules {list(ties.paths)} get adapters of their own, so what they compute no longer "
        "goes together, and merging unties them; pass ensure_weight_tying=True to keep them tied"
    )
    return [note]
