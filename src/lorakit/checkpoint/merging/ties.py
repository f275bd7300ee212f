"""Weights that a model holds once and knows by several names, of which a checkpoint has one.

transformers says of a class which names those are; the class is looked up, never called.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.checkpoint.merging.weight import WeightReader
from lorakit.checkpoint.shards import ShardReader
from lorakit.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lorakit.checkpoint.merging.names import Names
    from lorakit.checkpoint.merging.weight import Weight
    from lorakit.checkpoint.shards import ModelShards

_INPUTS = frozenset({"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings"})
_OUTPUTS = frozenset({"lm_head", "embed_out", "decoder", "output", "head"})
_PLAIN = re.compile(r"[A-Za-z0-9_.]+\.(?:weight|bias)")
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Tie:
    """Two names of one weight.

    Attributes:
        source: the weight under the name whose tensor the checkpoint has.
        target: under the other; the same elements where the checkpoint does not have it.
        is_stored: whether the checkpoint has the target's tensor too.
    """

    source: Weight
    target: Weight
    is_stored: bool


def find_ties(shards: ModelShards, names: Names, wanted: Collection[str]) -> list[Tie]:
    """The ties of a checkpoint's model, where adapters change a weight that may be tied; else none.

    Raises:
        UnsupportedError: the model is an encoder-decoder, which computes otherwise when it is not tied; or it cannot be
            told what is tied.
    """
    suspects = [name for name in wanted if _may_be_tied(shards, names, name)]
    if shards.config.get("tie_word_embeddings") is False or not suspects:
        return []
    declared = _declared(shards.config, names)
    if declared is None:
        alone = [name for name in suspects if _is_alone(names, name)]
        if not alone or "architectures" not in shards.config:
            return []
        raise UnsupportedError(
            f"{alone} may be tied to other weights of this model, which only transformers can tell and does not: it is "
            "not installed, or has no such class; set tie_word_embeddings in the base's config.json to false if they are not"
        )
    found = []
    for target, source in declared.tied.items():
        first, second = declared.find(names, source), declared.find(names, target)
        if first is None:
            first, second, absent = second, None, source
        else:
            absent = target
        if first is not None and (second is None or _are_equal(shards, first, second)):
            found.append(Tie(first, second or replace(first, name=absent), second is not None))
    here = [weight.name if (weight := names.find(name)) else name for name in wanted]
    touched = {weight.name for tie in found for weight in (tie.source, tie.target)}.intersection(here)
    if touched and shards.config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{sorted(touched)} are tied in an encoder-decoder, which computes otherwise when they are not; merge in "
            "memory (merge_and_unload) and save that model"
        )
    return found if touched else []


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose weights are tied no more."""
    parts = {
        key: {**value, "tie_word_embeddings": False}
        for key, value in config.items()
        if isinstance(value, dict) and value.get("tie_word_embeddings")
    }
    return {**config, **parts, "tie_word_embeddings": False}


def _may_be_tied(shards: ModelShards, names: Names, name: str) -> bool:
    """Whether a weight is not there, or is like one that models tie, as far as can be told without transformers."""
    weight = names.find(name)
    if weight is None:
        return True
    parts = [shards.config, *(value for value in shards.config.values() if isinstance(value, dict))]
    sizes = {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}
    return _module(name) in _INPUTS | _OUTPUTS or weight.shape[:1] in {(size,) for size in sizes}


def _module(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def _is_alone(names: Names, name: str) -> bool:
    """Whether a weight is there, and no other one like it, which could be the other end of the model."""
    weight = names.find(name)
    return weight is not None and sum(other.shape == weight.shape for _, other in names.everything()) < 2


class _Declared(NamedTuple):
    """What a class says is tied to what, and the prefix that its base model has in it."""

    tied: dict[str, str]
    prefix: str

    def find(self, names: Names, name: str) -> Weight | None:
        return names.find(name) or names.find(name.removeprefix(f"{self.prefix}."))


def _declared(config: Mapping[str, Any], names: Names) -> _Declared | None:
    """What the model's class says; None where the class is not known."""
    architectures = config.get("architectures")
    try:
        import transformers
    except ImportError:
        return None
    kind = getattr(transformers, str(architectures[0]), None) if isinstance(architectures, list) else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return None
    declared: Any = getattr(kind, "_tied_weights_keys", None) or {}
    prefix = str(getattr(kind, "base_model_prefix", ""))
    if isinstance(declared, dict):
        plain = {t: s for t, s in declared.items() if _PLAIN.fullmatch(t) and _PLAIN.fullmatch(s)}
        return _Declared(plain, prefix)
    # transformers before 5.0 names the targets alone
    inputs = [name for name, _ in names.everything() if _module(name) in _INPUTS]
    if len(inputs) != 1:
        return None
    return _Declared({target: inputs[0] for target in declared if target.endswith(".weight")}, prefix)


def _are_equal(shards: ModelShards, first: Weight, second: Weight) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    with ShardReader(shards) as reader:
        read = WeightReader(shards, reader).elements
        for begin in range(0, first.count, _AT_ONCE):
            count = min(_AT_ONCE, first.count - begin)
            if not torch.equal(read(first, begin, count), read(second, begin, count)):
                return False
    return True
