"""Does a file fit the adapter that is planned for a model? Keys, shapes, and what a file holds beside its adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import apply_key_mapping, from_file_key, to_file_key
from lorakit.errors import AdapterFormatError, KeyMismatchError, bullet_list
from lorakit.init import initialise
from lorakit.specs import TOKEN_ROWS
from lorakit.surgery import expected_tensors
from lorakit.surgery.describe import embedding_of
from lorakit.surgery.naming import names_in_file, tied_names, whole_module

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from typing import TypeVar

    from torch import Tensor, nn

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.specs import AdapterSpec
    from lorakit.surgery import Plan
    from lorakit.surgery.naming import SameAs
    from lorakit.surgery.tokens import TokenSpec

    Spec = TypeVar("Spec", AdapterSpec, TokenSpec)


def file_keys(file: AdapterFile, key_mapping: Mapping[str, str] | None, plan: Plan) -> dict[str, str]:
    """The file's keys by the name that they have in the model."""
    # PEFT calls an embedding with token rows the base of those; here it is that of the one layer around it
    found = {
        from_file_key(key).replace(".token_adapter.base_layer.", ".base_layer."): key for key in file.tensors
    }
    names = {new: found[old] for old, new in apply_key_mapping(found, key_mapping or {}).items()}
    # PEFT writes each bias of a wholly trained module twice more under bias="all"; they say nothing new.
    doubles = tuple(
        f"{path}.{part}." for path in plan.modules_to_save for part in ("original_module", "modules_to_save")
    )
    return {name: key for name, key in names.items() if not (doubles and name.startswith(doubles))}


def with_base_weights(plan: Plan, keys: Mapping[str, str]) -> Plan:
    """Let the file replace the input and output embeddings, and nothing else of the base."""
    names: dict[int, str] = {}  # a tied one has several
    for name in _embeddings_in(plan, keys).values():
        names.setdefault(id(plan.base_parameter(name)), name)
    return replace(plan, base_weights=tuple(names.values()))


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
        own, found = _original(plan, name).detach(), loaded[keys[key]]
        # the base may have been loaded in another precision than it was trained in
        if not own.is_meta and (torch.equal(found.to(own), own) or torch.equal(own.to(found), found)):
            same.append(key)
    return {key: value for key, value in keys.items() if key not in same}, tuple(same)


def _embeddings_in(plan: Plan, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys of a file that are the base's embeddings, with the names of those."""
    embeddings = {id(weight) for weight in embedding_weights(plan.description.model)}
    nodes, found = plan.description.nodes, {}
    for key in keys:
        owner, _, attribute = key.replace(".base_layer.", ".").rpartition(".")
        node = nodes.get(owner)
        parameter = None if node is None else node.module._parameters.get(attribute)
        if parameter is not None and id(parameter) in embeddings:
            found[key] = f"{owner}.{attribute}"
    expected = expected_tensors(plan) if found else {}
    return {key: name for key, name in found.items() if key not in expected}


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The base's own weights of a transformers model's input and output embeddings."""
    weights = [getattr(embedding_of(model, side), "weight", None) for side in ("input", "output")]
    return [weight for weight in weights if isinstance(weight, torch.Tensor)]


def _original(plan: Plan, name: str) -> Tensor:
    """A parameter of the base by its name there, as it was before any merge."""
    owner, _, attribute = name.rpartition(".")
    layer = plan.description.nodes[owner].layer
    if layer is not None and attribute == layer.codec.names[0]:
        return layer.original_weight
    return plan.base_parameter(name)


def compare(
    file: AdapterFile, plan: Plan, keys: Mapping[str, str], *, strict: bool
) -> tuple[list[str], list[str]]:
    """Names missing from the file and names in it that have no place.

    Raises:
        KeyMismatchError: shapes differ, or there are such names and `strict`.
    """
    tied = tied_names(plan)
    expected = {**{name: same.shape for name, same in tied.items()}, **expected_tensors(plan)}
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
    problems = [
        f"{to_file_key(name)} is not {to_file_key(same.source)}" + ", transposed" * same.transposed
        for name, same in _parted(plan, tensors).items()
    ]
    if problems:
        hint = "Set ensure_weight_tying=false in its config to load them apart."
        raise AdapterFormatError(
            bullet_list(f"{where}: ensure_weight_tying, but tied modules differ", problems, hint)
        )


def _parted(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, SameAs]:
    """The tensors that are not what others say they should be, or of which those others are not there."""
    found = {}
    for name, same in tied_names(plan).items():
        wanted = tensors.get(same.source)
        if name in tensors and (wanted is None or not torch.equal(tensors[name], _seen(wanted, same))):
            found[name] = same
    return found


def _seen(tensor: Tensor, same: SameAs) -> Tensor:
    return tensor.t() if same.transposed else tensor


def without_absent_ties(plan: Plan, names: Collection[str]) -> Plan:
    """Leave out modules that are in the plan by ties alone, and of which a file holds nothing.

    PEFT does not know every tie that a model has; where it does not, `ensure_weight_tying` has no effect. Said in the
    plan's notes, for a damaged file may look like that.

    Args:
        plan: with `ensure_weight_tying`.
        names: of the file's tensors.
    """
    if not plan.added:
        return plan
    layers = names_in_file(plan)
    theirs = {
        spec.path: {f"{layers.layer(spec.path)}.{name}" for name in spec.file_names.values()}
        for spec in plan.specs
    }
    theirs |= {path: {f"{path}.weight"} for path in plan.modules_to_save}
    absent = {path for path in plan.added if theirs[path].isdisjoint(names)}
    notes = [
        f"{path}: is tied to what this adapter changes, but the file has nothing for it; it carries no adapter"
        for path in sorted(absent)
    ]
    return _apart(
        replace(
            plan,
            notes=(*plan.notes, *notes),
            specs=tuple(spec for spec in plan.specs if spec.path not in absent),
            modules_to_save=tuple(path for path in plan.modules_to_save if path not in absent),
            added=tuple(path for path in plan.added if path not in absent),
        ),
        absent,
    )


def _apart(plan: Plan, paths: Collection[str]) -> Plan:
    """The plan with modules that are no longer tied, or whose source is not."""

    def own(spec: Spec) -> Spec:
        return replace(spec, tied_to=None) if {spec.path, spec.tied_to} & set(paths) else spec

    ties = {path: source for path, source in plan.saved_ties.items() if not {path, source} & set(paths)}
    return replace(
        plan, specs=tuple(map(own, plan.specs)), tokens=tuple(map(own, plan.tokens)), saved_ties=ties
    )


def with_ties_as_found(
    plan: Plan, tensors: Mapping[str, Tensor], where: str
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan with only those modules tied whose tensors are the same, and these with all that ties determine.

    Raises:
        AdapterFormatError: one parameter of the base is there twice, with different numbers.
    """
    if not tied_names(plan):
        return plan, dict(tensors)
    parted = _parted(plan, tensors)
    names = names_in_file(plan)
    replaced = {names.parameter(name) for name in (*plan.biases, *plan.base_weights)}
    problems = [
        f"{to_file_key(name)} is not {to_file_key(same.source)}"
        for name, same in parted.items()
        if same.source in replaced
    ]
    if problems:
        what = "one parameter of the model, but two in the file"
        raise AdapterFormatError(bullet_list(f"{where}: {what}", problems))
    paths = dict.fromkeys(same.path for same in parted.values())
    notes = [
        f"{path}: is tied in this model, but was trained apart; it is loaded so, whatever ensure_weight_tying says"
        for path in paths
    ]
    plan = replace(_apart(plan, paths), notes=(*plan.notes, *notes))
    given, expected = dict(tensors), expected_tensors(plan)
    for name, same in tied_names(plan).items():
        if same.source in tensors and name in expected:
            given.setdefault(name, _seen(tensors[same.source], same))
    return plan, given


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
        weight = _original(plan, f"{token.path}.weight")
        yield f"{token.path}.{TOKEN_ROWS}", weight[torch.tensor(token.indices, device=weight.device)]
    names = names_in_file(plan)
    for name in (*plan.biases, *plan.base_weights):
        yield names.parameter(name), plan.base_parameter(name)


def _unread(dtype: torch.dtype) -> Tensor:
    raise AssertionError(f"the default initialiser read the base weight as {dtype}")
