"""Whether an adapter fits a base, of which only the config is needed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.keys import PREFIX, to_file_key
from lorakit.diagnosis.finding import Finding, some
from lorakit.errors import AdapterError, ConfigError, KeyMismatchError, PlanError
from lorakit.fitting import compare, file_keys, without_absent_ties
from lorakit.skeleton import build_skeleton, read_model_config
from lorakit.surgery import describe, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.config import LoraConfig
    from lorakit.surgery import Plan

_OTHER_BASE = "Is this the base that the adapter was made for?"
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def fit_findings(file: AdapterFile, config: LoraConfig, base: Any) -> Iterator[Finding]:
    """What is wrong between an adapter and a base.

    Args:
        file: the adapter's.
        config: the adapter's.
        base: as `build_skeleton` takes it.

    Raises:
        AdapterNotFoundError, AdapterFormatError, UnsupportedError: there is no such base.
    """
    base_config = _prepared(read_model_config(base), file, config)
    yield from _name_findings(config, base_config)
    try:
        model = build_skeleton(base_config, config.task_type)
    except ConfigError as error:
        yield Finding("error", "wrong-base", type(base_config).__name__, str(error), _OTHER_BASE)
        return
    where = type(model).__name__
    try:
        plan = make_plan(model, replace(config, inference_mode=True), source="file")
    except PlanError as error:
        for problem in error.problems:
            yield Finding("error", "plan", where, problem, _OTHER_BASE)
        return
    except AdapterError as error:
        yield Finding("error", "plan", where, str(error), _OTHER_BASE)
        return
    kinds = sorted({spec.kind for spec in plan.specs})
    yield Finding(
        "note", "fits", where, f"{len(plan.specs)} adapted weights of kinds {', '.join(kinds) or 'none'}"
    )
    yield from (Finding("warning", "base-note", where, note) for note in plan.notes)
    yield from _key_findings(file, plan, model)
    yield from _tie_findings(plan, base_config)


def _prepared(found: Any, file: AdapterFile, config: LoraConfig) -> Any:
    """The base's config with the class that the adapter names, and with as many labels as its head has."""
    prepared = copy.deepcopy(found)
    named = (config.auto_mapping or {}).get("base_model_class")
    if config.task_type is None and isinstance(named, str):
        prepared.architectures = [named]
    heads = [
        info.shape[0]
        for key, info in file.tensors.items()
        if key.removeprefix(PREFIX) in _HEADS and len(info.shape) == 2 and info.shape[0]
    ]
    if heads and config.task_type in {"SEQ_CLS", "TOKEN_CLS"}:
        prepared.num_labels = heads[0]
    return prepared


def _name_findings(config: LoraConfig, base_config: Any) -> Iterator[Finding]:
    wanted, found = config.base_model_name_or_path, getattr(base_config, "_name_or_path", "")
    if wanted and found and _last(wanted) != _last(found):
        yield Finding(
            "warning",
            "base-name",
            "base_model_name_or_path",
            f"the adapter was made for {wanted!r}, the base is {found!r}",
            "Harmless if they are the same model under two names; another model of the same shapes gives wrong outputs, "
            "and nothing else would tell.",
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _key_findings(file: AdapterFile, plan: Plan, model: nn.Module) -> Iterator[Finding]:
    keys = file_keys(file, None, plan)
    plan = without_absent_ties(plan, keys)
    try:
        compare(file, plan, keys, strict=True)
    except KeyMismatchError as error:
        where = str(file.weights_path)
        if error.mismatched:
            yield _shapes(error.mismatched, len(file.tensors), where, model)
        missing, unexpected = list(error.missing), list(error.unexpected)
        embeddings = [key for key in unexpected if _is_embedding(key, model)]
        if embeddings:
            yield Finding(
                "error",
                "base-weights",
                where,
                f"the file holds weights of the base's embeddings: {some(embeddings)}. PEFT writes them when the vocabulary "
                "grew, or when one of them is adapted",
                "Load with allow_base_weights=True, onto a base whose embeddings were resized as in the training; equal "
                "ones are passed over anyway.",
            )
        unexpected = [key for key in unexpected if key not in embeddings]
        for check, names, what in (
            ("missing-keys", missing, "the base has places for which the file has no tensor"),
            ("unexpected-keys", unexpected, "the file has tensors for which the base has no place"),
        ):
            if names:
                yield Finding(
                    "error",
                    check,
                    where,
                    f"{len(names)}: {what}: {some(names)}",
                    "Is this the base, and the class of model, that the adapter was made for? strict=False passes over them.",
                )


def _shapes(lines: Sequence[str], count: int, where: str, model: nn.Module) -> Finding:
    all_wrong = 2 * len(lines) >= count
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    return Finding(
        "error",
        "wrong-base" if all_wrong else "wrong-shapes",
        where,
        f"{len(lines)} of {count} tensors have other shapes than the base needs: {some(lines)}",
        f"This is another base than the adapter's; the hidden size of the one given is {size}."
        if all_wrong
        else "If they are embeddings: resize those of the base with resize_token_embeddings() first.",
    )


def _is_embedding(key: str, model: nn.Module) -> bool:
    found = describe(model)
    paths = [found.path_of(found.embedding(side)) for side in ("input", "output")]
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name in {f"{path}.weight" for path in paths if path is not None}


def _tie_findings(plan: Plan, base_config: Any) -> Iterator[Finding]:
    """An adapter on one of two tied modules."""
    found = plan.description
    sides = {side: found.embedding(side) for side in ("input", "output")}
    weights = {side: getattr(module, "weight", None) for side, module in sides.items()}
    if weights["input"] is None or weights["input"] is not weights["output"]:
        return
    paths = {side: found.path_of(module) for side, module in sides.items()}
    touched = (
        {spec.path for spec in plan.specs} | set(plan.modules_to_save) | {spec.path for spec in plan.tokens}
    )
    hit = [path for path in paths.values() if path in touched]
    if len(hit) == 1:
        other = next(path for path in paths.values() if path not in touched)
        yield Finding(
            "warning",
            "tied-embeddings",
            to_file_key(str(hit[0])),
            f"{hit[0]} has an adapter, and {other} shares its weight (tie_word_embeddings"
            f"={getattr(base_config.get_text_config(), 'tie_word_embeddings', True)}) and has none: merging gives the two "
            "weights of their own, and a tool that ties them again loses the change",
            "Merge with lorakit, which sets tie_word_embeddings to False; to train both as one use "
            "ensure_weight_tying=True.",
        )
