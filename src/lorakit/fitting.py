"""Does a file fit the adapter that is planned for a model? Keys, shapes, and what a file holds beside its adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import apply_key_mapping, from_file_key, to_file_key
from lorakit.errors import AdapterFormatError, KeyMismatchError, bullet_list
from lorakit.init import initialise
from lorakit.surgery import expected_tensors
from lorakit.surgery.naming import TOKENS, names_in_file, tied_names, whole_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.surgery import Plan


def file_keys(file: AdapterFile, key_mapping: Mapping[str, str] | None, plan: Plan) -> dict[str, str]:
    """The file's keys by the name that they have in the model."""
    found = {from_file_key(key): key for key in file.tensors}
    names = {new: found[old] for old, new in apply_key_mapping(found, key_mapping or {}).items()}
    # PEFT writes each bias of a wholly trained module twice more under bias="all"; they say nothing new.
    doubles = tuple(
        f"{path}.{part}." for path in plan.modules_to_save for part in ("original_module", "modules_to_save")
    )
    return {name: key for name, key in names.items() if not (doubles and name.startswith(doubles))}


def with_base_weights(plan: Plan, keys: Mapping[str, str]) -> Plan:
    """Let the file replace the input and output embeddings, and nothing else of the base."""
    return replace(plan, base_weights=tuple(_embeddings_in(plan, keys).values()))


def without_base_copies(
    file: AdapterFile, plan: Plan, keys: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The keys without those of base embeddings that are this model's own, number for number; and these.

    PEFT puts the base's embeddings into a file whose adapter is on one of them.
    """
    names = {
        key: name
        for key, name in _embeddings_in(plan, keys).items()
        if tuple(file.tensors[keys[key]].shape) == tuple(plan.base_parameter(name).shape)
    }
    loaded = file.load([keys[key] for key in names], check_digest=False) if names else {}
    same = []
    for key, name in names.items():
        own, found = plan.base_parameter(name).detach(), loaded[keys[key]]
        if not own.is_meta and torch.equal(found.to(own), own):
            same.append(key)
    return {key: value for key, value in keys.items() if key not in same}, tuple(same)


def _embeddings_in(plan: Plan, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys of a file that are the base's embeddings, with the names of those."""
    expected = expected_tensors(plan)
    embeddings = {id(weight) for weight in embedding_weights(plan.description.model)}
    found = {}
    for key in keys:
        name = key.replace(".base_layer.", ".")
        owner, _, attribute = name.rpartition(".")
        if key in expected or owner not in plan.description.nodes:
            continue
        parameter = plan.description.nodes[owner].module._parameters.get(attribute)
        if parameter is not None and id(parameter) in embeddings:
            found[key] = name
    return found


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The weights of a transformers model's input and output embeddings."""
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    modules = [getter() for getter in getters if callable(getter)]
    weights = [getattr(module, "weight", None) for module in modules]
    return [weight for weight in weights if isinstance(weight, torch.Tensor)]


def compare(
    file: AdapterFile, plan: Plan, keys: Mapping[str, str], *, strict: bool
) -> tuple[list[str], list[str]]:
    """Names missing from the file and names in it that have no place.

    Raises:
        KeyMismatchError: shapes differ, or there are such names and `strict`.
    """
    expected = expected_tensors(plan)
    tied = tied_names(plan)
    missing = [name for name in expected if name not in keys and name not in tied]
    unexpected = [name for name in keys if name not in expected]
    shapes = {name: tuple(file.tensors[key].shape) for name, key in keys.items()}
    wrong = wrong_shapes(expected, shapes, keys)
    if wrong or (strict and (missing or unexpected)):
        raise KeyMismatchError(
            str(file.weights_path),
            missing=map(to_file_key, missing),
            unexpected=[keys[name] for name in unexpected],
            mismatched=wrong,
            hint=_hint(plan, missing, unexpected, wrong),
        )
    return missing, unexpected


def wrong_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]
) -> list[str]:
    """A line for each tensor of another shape, under the key that its owner knows it by."""
    return [
        f"{keys[name]}: found {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def check_ties(plan: Plan, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a file that holds two things where the plan has one: its tied modules were not trained as tied.

    Raises:
        AdapterFormatError: listing the tensors that differ.
    """
    problems = []
    for name, (source, transposed) in tied_names(plan).items():
        if name not in tensors or source not in tensors:
            continue
        wanted = tensors[source].t() if transposed else tensors[source]
        if not torch.equal(tensors[name], wanted):
            problems.append(f"{to_file_key(name)} is not {to_file_key(source)}" + ", transposed" * transposed)
    if problems:
        hint = "Set ensure_weight_tying=false in its config to load them apart."
        raise AdapterFormatError(
            bullet_list(f"{where}: ensure_weight_tying, but tied modules differ", problems, hint)
        )


def _hint(plan: Plan, missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    hints = []
    if wrong:
        hints.append("Was the adapter made for a model of another size, or its config changed since?")
    if _embeddings_in(plan, dict.fromkeys(unexpected, "")):
        hints.append("Pass allow_base_weights=True to take the embeddings that came with the adapter.")
    if missing and unexpected:
        hints.append("If only the names differ, pass key_mapping={regular expression: replacement}.")
    if not wrong and (missing or unexpected):
        hints.append("Pass strict=False to load what fits and have the rest listed.")
    return " ".join(hints)


def fill(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete an incomplete adapter: a layer that lacks a factor begins as no change, the rest as the base."""
    filled = dict(tensors)
    paths = names_in_file(plan)
    for spec in plan.specs:
        names = {part: f"{paths.layer(spec.path)}.{name}" for part, name in spec.file_names.items()}
        if spec.tied_to is not None or all(name in tensors for name in names.values()):
            continue
        device = torch.device("cpu") if spec.device.type == "meta" else spec.device
        results = initialise(replace(spec, init="default", device=device), _unread)
        A, B, bias = spec.layout.join([result.factors for result in results])
        fresh = {"A": A, "B": B, "bias": bias}
        filled.update({name: fresh[part] for part, name in names.items()})  # type: ignore[misc]
    for name, value in _base_values(plan):
        if name not in filled:
            filled[name] = value.detach().clone()
    return filled


def _base_values(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """What the base itself has for each tensor of an adapter that is no factor."""
    for path in plan.modules_to_save:
        yield from ((f"{path}.{key}", value) for key, value in whole_module(plan, path).state_dict().items())
    for token in plan.tokens:
        weight = plan.base_parameter(f"{token.path}.weight")
        yield f"{token.path}.{TOKENS}", weight[torch.tensor(token.indices, device=weight.device)]
    names = names_in_file(plan)
    for name in (*plan.biases, *plan.base_weights):
        yield names.parameter(name), plan.base_parameter(name)


def _unread(dtype: torch.dtype) -> Tensor:
    raise AssertionError(f"the default initialiser read the base weight as {dtype}")
