"""What an adapter will put on a model, found before anything is touched.

Every reason why a config does not fit the model is gathered here and raised at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from lorakit.config import Matcher, check_supported
from lorakit.errors import PlanError
from lorakit.layers import attention_parts
from lorakit.surgery.describe import describe
from lorakit.surgery.from_data import with_gathered
from lorakit.surgery.registry import find_registry
from lorakit.surgery.replicate import Replication, plan_replication, shown
from lorakit.surgery.rows import Rules, begin_problems, module_rows, parameter_rows, variant_problems
from lorakit.surgery.targets import near_targets, resolve_targets, trained_whole
from lorakit.surgery.ties import Ties, find_ties, spelled_out, tie_notes, with_tied
from lorakit.surgery.tokens import TokenSpec, token_notes, token_specs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn

    from lorakit.config import LoraConfig
    from lorakit.specs import AdapterSpec
    from lorakit.surgery.describe import Description

Source = Literal["user", "file"]


@dataclass(frozen=True)
class Plan:
    """What an adapter puts on a model.

    Attributes:
        config: the config with `target_modules` resolved; a copy, the caller's is never changed.
        specs: one row for each module or bare parameter that gets factors.
        modules_to_save: paths of modules that are trained whole.
        saved_ties: those of them whose weight is another one's, with the path of that one.
        added: paths that the config does not name, with an adapter because they are tied to others that it does.
        saved_parameters: how many parameters those copies hold.
        saved_bytes: how many bytes they take.
        tokens: one row for each module whose token rows are replaced.
        biases: names of the base parameters trained under `bias`, without copies of tied ones.
        base_weights: names of base parameters that a file brings replacements for (resized embeddings).
        replication: the deeper list of layers that the adapter is for, or None.
        notes: things worth knowing that are no errors.
        description: the model as it was when the plan was made, with the deeper list in it.
    """

    config: LoraConfig
    specs: tuple[AdapterSpec, ...]
    modules_to_save: tuple[str, ...]
    saved_parameters: int
    saved_bytes: int
    biases: tuple[str, ...]
    bias_parameters: int
    bias_bytes: int
    notes: tuple[str, ...]
    description: Description
    base_weights: tuple[str, ...] = ()
    saved_ties: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    tokens: tuple[TokenSpec, ...] = ()
    replication: Replication | None = None

    def base_parameter(self, name: str) -> torch.nn.Parameter:
        """The parameter of the base model that has this name there."""
        owner, _, attribute = name.rpartition(".")
        parameter = getattr(self.description.nodes[owner].module, attribute)
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    @property
    def parameters(self) -> int:
        """How many parameters the adapter trains."""
        rows = sum(spec.trained for spec in self.specs) + sum(spec.parameters for spec in self.tokens)
        return rows + self.saved_parameters + self.bias_parameters

    @property
    def bytes(self) -> int:
        """How many bytes the adapter takes, in memory and (but for the header) on disk, with what is never trained."""
        rows = sum(spec.bytes for spec in self.specs) + sum(spec.bytes for spec in self.tokens)
        return rows + self.saved_bytes + self.bias_bytes

    def __str__(self) -> str:
        width = max((len(spec.path) for spec in self.specs), default=0)
        rows = [
            f"{spec.path:<{width}}  {spec.kind:<9} in {spec.shape[1]:>6}  out {spec.shape[0]:>6}  r {spec.r:>4}"
            f"  scaling {spec.scaling:g}  {spec.trained:>10,} parameters"
            for spec in self.specs
        ]
        rows += [f"{path}  trained whole" for path in self.modules_to_save]
        rows += [f"{spec.path}  {len(spec.indices)} tokens trained" for spec in self.tokens]
        rows += [f"{name}  trained bias" for name in self.biases]
        rows += [f"note: {note}" for note in self.notes]
        total = f"{len(self.specs)} modules, {self.parameters:,} parameters, {self.bytes:,} bytes"
        return "\n".join([*rows, total])


def make_plan(
    model: nn.Module,
    config: LoraConfig,
    *,
    source: Source = "user",
    autocast_adapter_dtype: bool = True,
    replacing: str | None = None,
) -> Plan:
    """Plan an adapter for `model`, touching nothing.

    Args:
        model: any module; may already carry other adapters.
        config: what to put on it.
        source: "user" makes a pattern or entry that matches nothing an error; "file" makes it a note.
        autocast_adapter_dtype: keep adapters of a half-precision base in fp32.
        replacing: an adapter of the model that will be gone when this one comes.

    Raises:
        PlanError: with every reason at once, each with the module path and near names.
        UnsupportedError: the config asks for a feature that lorakit does not have.
    """
    config.validate()
    check_supported(config, loading=source == "file")
    problems: list[str] = []
    loose: list[str] = []
    replication = _replication(model, config, problems)
    if problems:
        raise PlanError(problems)
    deeper = {} if replication is None else {id(replication.before): replication.after}
    description = describe(model, deeper, replacing)
    whole = trained_whole(description, config, problems, loose)
    ties = find_ties(description, config, whole, loose)
    more_whole = with_tied(ties, whole)
    saved_ties = _tie_whole(description, ties, whole, more_whole)
    inside = {node.path for path in whole for node in description.children_of(path)}
    resolved = replace(config, target_modules=resolve_targets(description, config, inside))
    matcher = Matcher(resolved)
    rules = Rules.of(resolved, matcher, problems, from_file=source == "file", widen=autocast_adapter_dtype)
    hit = _targets(description, matcher, inside)
    more = with_tied(ties, hit)
    specs = _specs(description, rules, (*hit, *more), ties, loose)
    tokens = token_specs(
        description,
        resolved,
        ties,
        inside | whole.keys(),
        problems,
        widen=autocast_adapter_dtype,
        from_file=source == "file",
    )
    problems += variant_problems(specs, tokens)
    if source == "user":
        problems += begin_problems(specs, ties, description)
    loose += matcher.unused()
    if not (specs or tokens or problems):
        problems.append(
            "target_modules matches no module of this model" + near_targets(resolved, description)
            if resolved.target_modules or not resolved.target_parameters
            else "target_parameters matches no parameter of this model"
        )
    problems += loose if source == "user" else []
    if problems:
        raise PlanError(problems)
    targets = {spec.path for spec in specs}
    notes = loose if source == "file" else _notes(specs, description, resolved)
    if source == "user":
        notes += tie_notes(ties, resolved, targets, whole) + token_notes(tokens, description)
        resolved = spelled_out(resolved, more, more_whole, tokens)
    resolved = replace(resolved, fan_in_fan_out=_stored_in_out(specs))
    biases = _trained_biases(description, resolved, targets, inside)
    plan = _plan(resolved, specs, whole, saved_ties, biases, notes, description)
    added = (*more, *more_whole)
    return replace(plan, added=added, tokens=tokens, replication=replication)


def _plan(
    config: LoraConfig,
    specs: Sequence[AdapterSpec],
    whole: Mapping[str, nn.Module],
    saved_ties: Mapping[str, str],
    biases: Mapping[str, nn.Parameter],
    notes: Sequence[str],
    description: Description,
) -> Plan:
    saved = [
        parameter
        for path, module in whole.items()
        for parameter in module.parameters()
        if path not in saved_ties or parameter is not module.weight  # which is another copy's
    ]
    return Plan(
        config=config,
        specs=tuple(specs),
        modules_to_save=tuple(whole),
        saved_ties=saved_ties,
        saved_parameters=sum(parameter.numel() for parameter in saved),
        saved_bytes=sum(parameter.nbytes for parameter in saved),
        biases=tuple(biases),
        bias_parameters=sum(parameter.numel() for parameter in biases.values()),
        bias_bytes=sum(parameter.nbytes for parameter in biases.values()),
        notes=tuple(notes),
        description=description,
    )


def _replication(model: nn.Module, config: LoraConfig, problems: list[str]) -> Replication | None:
    """The deeper list of layers that the config asks for: one to be made, or the one that is there."""
    wanted = tuple((start, end) for start, end in config.layer_replication or ())
    registry = find_registry(model)
    here = None if registry is None else registry.replication
    if registry is None or not registry.configs:
        return plan_replication(model, wanted, problems) if wanted else None
    if wanted != (() if here is None else here.ranges):
        there = () if here is None else here.ranges
        problems.append(
            f"layer_replication: got {shown(wanted)}, but the adapters on this model have {shown(there)}; adapters of "
            "one model share its layers, so unload() first, or use the same value"
        )
    return None


def _tie_whole(
    description: Description, ties: Ties | None, whole: dict[str, nn.Module], more: Sequence[str]
) -> dict[str, str]:
    """Add `more`, the tied modules of those trained whole, to these; gives whose weight is whose."""
    for path in more:
        wrapper = description.saved.get(path)
        whole[path] = description.nodes[path].module if wrapper is None else wrapper.original_module
    if ties is None or not ties.ensure or ties.source not in whole:
        return {}
    return {path: ties.source for path in ties.others if path in whole}


def _targets(description: Description, matcher: Matcher, inside: Collection[str]) -> list[str]:
    """The paths of the modules that the config names."""
    hit = [path for path in description.nodes if path not in inside and matcher.target(path)]
    parts = {f"{path}.{name}" for path in hit for name, _ in attention_parts(description.nodes[path].module)}
    return [path for path in hit if path not in parts]  # the attention module itself takes care of them


def _specs(
    description: Description, rules: Rules, hit: Sequence[str], ties: Ties | None, loose: list[str]
) -> list[AdapterSpec]:
    """The rows of these modules, and of all bare parameters that the config names."""
    specs = [spec for path in hit for spec in module_rows(description.nodes[path], rules, description)]
    if ties is not None and ties.ensure and ties.source in {spec.path for spec in specs}:
        source = next(spec for spec in specs if spec.path == ties.source)
        loose += [
            f"{spec.path}: has the rank and the alpha of {source.path}, to which it is tied; make rank_pattern and "
            "alpha_pattern say the same of both"
            for spec in specs
            if spec.path in ties.others and (spec.r, spec.lora_alpha) != (source.r, source.lora_alpha)
        ]
        specs = [_tied_row(spec, source) if spec.path in ties.others else spec for spec in specs]
    order = {path: number for number, path in enumerate(description.nodes)}
    specs += parameter_rows(description, rules, loose)
    specs = sorted(specs, key=lambda spec: order.get(spec.path, order.get(spec.path.rpartition(".")[0], 0)))
    return specs if rules.from_file else with_gathered(specs, description, rules.problems)


def _tied_row(spec: AdapterSpec, source: AdapterSpec) -> AdapterSpec:
    """The row of a module that takes its factors from another one."""
    return replace(
        spec,
        tied_to=source.path,
        r=source.r,
        lora_alpha=source.lora_alpha,
        scaling=source.scaling,
        lora_bias=False,
    )


def _stored_in_out(specs: Sequence[AdapterSpec]) -> bool:
    """`fan_in_fan_out` as it holds for all the linear layers of a plan."""
    kinds = {spec.kind for spec in specs} & {"linear", "conv1d"}
    return kinds == {"conv1d"}


def _trained_biases(
    description: Description, config: LoraConfig, targets: Collection[str], inside: Collection[str]
) -> dict[str, nn.Parameter]:
    """The base parameters that `bias` trains, by name: all named "bias", or those of targeted layers."""
    if config.bias == "none":
        return {}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for node in description.nodes.values():
        if node.path in inside or (config.bias == "lora_only" and node.path not in targets):
            continue
        for attribute, parameter in node.module.named_parameters(recurse=False):
            name = f"{node.path}.{attribute}" if node.path else attribute
            if attribute == "bias" and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = parameter
    return found


def _notes(specs: Sequence[AdapterSpec], description: Description, config: LoraConfig) -> list[str]:
    """What a user should know of a config that works."""
    notes = []
    bare = [
        spec.path
        for spec in specs
        if config.lora_bias and getattr(description.nodes[spec.path].module, "bias", None) is None
    ]
    if bare:
        notes.append(
            f"lora_bias=True, but {len(bare)} targeted layers have no bias ({bare[0]} first): "
            "this adapter cannot be merged into them"
        )
    if config.fan_in_fan_out and any(spec.kind == "linear" for spec in specs):
        notes.append("fan_in_fan_out=True does not hold for nn.Linear; the layout is read off each module")
    grouped = [spec.path for spec in specs if spec.layout.groups > 1]
    if grouped:
        notes.append(
            f"{len(grouped)} targeted convolutions are grouped ({grouped[0]} first): the adapter mixes the channels "
            "of all groups, so merging it makes them ungrouped"
        )
    return notes
