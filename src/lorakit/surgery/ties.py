"""Which modules share one weight, and what that means for an adapter on some of them.

Modules are tied when they hold the very same parameter: a fact of the model in hand, whatever its config says.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lorakit.config import ends_in
from lorakit.surgery.describe import embedding_of
from lorakit.surgery.paths import joined

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description, Node
    from lorakit.surgery.tokens import TokenSpec


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


def find_ties(
    description: Description, config: LoraConfig, whole: Collection[str], loose: list[str]
) -> Ties | None:
    """The embedding whose weight other modules share: the model's input embedding, or the first such one.

    Args:
        description: of the model.
        config: says whether ties are to be kept.
        whole: paths of modules trained whole. What is inside them has weights of its own there.
        loose: is told of ties that should be kept and cannot be.
    """
    found = _find(description)
    buried = [path for path in found if any(path.startswith(f"{outer}.") for outer in whole)]
    if buried and config.ensure_weight_tying:
        loose.append(
            f"ensure_weight_tying: {buried} are parts of modules that are trained whole (modules_to_save), which "
            "unties them; name them alone, or set ensure_weight_tying=False"
        )
    source, *others = found or [""]
    others = [path for path in others if path not in buried]
    return (
        Ties(source, tuple(others), config.ensure_weight_tying) if others and source not in buried else None
    )


def _find(description: Description) -> list[str]:
    """The paths of all modules that share the embedding's weight, first the embedding's; none if it is not shared."""
    nodes = [
        node for node in description.nodes.values() if isinstance(node.module, (nn.Embedding, nn.Linear))
    ]
    modules = {node.path: node.module for node in nodes}
    weights = {node.path: _weight(node) for node in nodes}
    for path, wrapper in description.saved.items():
        modules[path] = wrapper.original_module
        weights[path] = wrapper.original_module._parameters.get("weight")
    owners: dict[int, list[str]] = {}
    for path, weight in weights.items():
        if weight is not None and isinstance(modules[path], (nn.Embedding, nn.Linear)):
            owners.setdefault(id(weight), []).append(path)
    named = description.embedding("input")
    for paths in owners.values():
        embeddings = [path for path in paths if isinstance(modules[path], nn.Embedding)]
        if len(paths) < 2 or not embeddings:
            continue
        if named is not None and all(modules[path] is not named for path in embeddings):
            continue
        source = next((path for path in embeddings if modules[path] is named), embeddings[0])
        return [source, *(path for path in paths if path != source)]
    return []


def _weight(node: Node) -> nn.Parameter | None:
    """The weight of a node's module as it was before any merge."""
    merged = {} if node.layer is None else node.layer.unmerged_parameters()
    return merged.get("base_layer.weight", node.module._parameters.get("weight"))


def with_tied(ties: Ties | None, paths: Collection[str]) -> tuple[str, ...]:
    """Those modules that `ensure_weight_tying` adds to the given ones."""
    if ties is None or not ties.ensure or set(ties.paths).isdisjoint(paths):
        return ()
    return tuple(path for path in ties.paths if path not in paths)


def spelled_out(
    config: LoraConfig, targets: Sequence[str], whole: Sequence[str], tokens: Sequence[TokenSpec]
) -> LoraConfig:
    """The config with everything named that ties add to it, so that it means the same where they are not seen.

    PEFT finds tied modules by the last part of a few well-known names, or by whole paths; a file must mean the same
    there.

    Args:
        config: with `target_modules` resolved.
        targets: paths that get factors because of ties.
        whole: paths that are trained whole because of ties.
        tokens: what the tokens are.
    """
    names, saved = config.target_modules, config.modules_to_save
    if targets:
        paths = "|".join(map(re.escape, targets))
        names = f"(?:{names})|{paths}" if isinstance(names, str) else {*(names or ()), *targets}
    if whole:
        saved = [*(saved or ()), *whole]
    rows = config.trainable_token_indices
    if isinstance(rows, dict):
        rows = _spelled_out_rows(rows, {spec.path: spec for spec in tokens})
    return replace(config, target_modules=names, modules_to_save=saved, trainable_token_indices=rows)


def _spelled_out_rows(rows: dict[str, list[int]], specs: dict[str, TokenSpec]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, indices in rows.items():
        paths = [path for path in specs if ends_in(path, name)]
        tied = any(specs[path].tied_to for path in paths)
        found.update({path: list(indices) for path in (paths if tied else [name])})
    sources = {spec.tied_to for spec in specs.values() if spec.tied_to in specs}
    for source in sources:  # asked for only by way of a module that is tied to it
        if source is not None and not any(ends_in(source, name) for name in found):
            found[source] = list(specs[source].indices)
    return found


def tie_notes(
    ties: Ties | None, config: LoraConfig, targets: AbstractSet[str], whole: Collection[str]
) -> list[str]:
    """What a user should know of tied weights that the config touches."""
    if ties is None:
        asked = config.ensure_weight_tying
        return (
            ["ensure_weight_tying=True, but no weights of this model are tied; it has no effect"]
            if asked
            else []
        )
    touched = [
        path for path in ties.paths if path in whole or not targets.isdisjoint({path, f"{path}.weight"})
    ]
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


def settle_ties(model: nn.Module, shared: Sequence[Sequence[str]]) -> None:
    """After a merge for good: what is no longer shared must come back from a file as it is now.

    transformers ties again whatever its config says is tied. Where the config can say no, all that it speaks of gets
    a parameter of its own. Encoder-decoders cannot: some compute otherwise then, and what still is shared would be
    lost. transformers (5.0) leaves apart what a file holds apart, so there each parameter that left the embedding's
    gets a place of its own in the file.

    Args:
        model: the plain model.
        shared: names of parameters that were one before, for each such parameter.
    """
    parted = [names for names in shared if len({id(model.get_parameter(name)) for name in names}) > 1]
    if not parted:
        return
    config = getattr(model, "config", None)
    embedding = next((names for names in parted if _input_name(model, names)), None)
    says_tied = [item for item in _configs(config) if getattr(item, "tie_word_embeddings", False)]
    what = "; ".join(_shown(model, names) for names in parted)
    note = f"{what} shared a weight, and merging gave them different ones"
    if embedding is not None and says_tied:
        if getattr(config, "is_encoder_decoder", False):
            _part(model, embedding, keep=_input_name(model, embedding))
            note += "; config.tie_word_embeddings stays True, since it also says how this model computes. "
            note += "transformers before 5.0 ties them again when it loads a file"
        else:
            for names in shared:
                if any(_is_tied_by_transformers(model, name) for name in names):
                    _part(model, names)
            for item in says_tied:
                item.tie_word_embeddings = False
            note += "; config.tie_word_embeddings was set to False so that a file keeps both"
    warnings.warn(note, stacklevel=4)


def _shown(model: nn.Module, names: Sequence[str]) -> str:
    """Names of parameters, those that still are one together."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(model.get_parameter(name)), []).append(name)
    return " and ".join(" = ".join(group) for group in groups.values())


def _configs(config: Any) -> Iterator[Any]:
    """A model's config and that of its language part."""
    yield config
    part = getattr(config, "get_text_config", None)
    text = part() if callable(part) else None
    if text is not None and text is not config:
        yield text


def _input_name(model: nn.Module, names: Sequence[str]) -> str | None:
    """The one of these parameters that is the weight of the model's input embedding."""
    embedding = embedding_of(model, "input")
    return next((name for name in names if model.get_submodule(name.rpartition(".")[0]) is embedding), None)


def _is_tied_by_transformers(model: nn.Module, name: str) -> bool:
    """Whether a class of transformers declares that it ties this parameter to another one."""
    return any(
        re.search(f"^{re.escape(joined(prefix, ''))}{key}", name)
        for prefix, module in model.named_modules()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    )


def _part(model: nn.Module, names: Sequence[str], keep: str | None = None) -> None:
    """Give each of these places a parameter of its own, but for those that still hold the one of `keep`."""
    taken = set() if keep is None else {id(model.get_parameter(keep))}
    done: set[tuple[int, str]] = set()
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner, parameter = model.get_submodule(path), model.get_parameter(name)
        if keep is not None and parameter is model.get_parameter(keep):
            continue
        if (id(owner), attribute) not in done and id(parameter) in taken:
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(owner, attribute, copy)
            parameter = copy
        done.add((id(owner), attribute))
        taken.add(id(parameter))
