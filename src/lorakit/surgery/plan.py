"""What an adapter will put on a model, found before anything is touched.

Every reason why a config does not fit the model is gathered here and raised at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from lorakit.config import Matcher, NearNames, check_supported
from lorakit.errors import PlanError
from lorakit.init.registry import initialiser_name
from lorakit.surgery.describe import describe, is_read_by_parent
from lorakit.surgery.targets import IMPLICIT_HEADS, resolve_targets
from lorakit.types import AdapterSpec
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from lorakit.config import LoraConfig
    from lorakit.surgery.describe import Description, Node

Source = Literal["user", "file"]


@dataclass(frozen=True)
class Plan:
    """What an adapter puts on a model.

    Attributes:
        config: the config with `target_modules` resolved; a copy, the caller's is never changed.
        specs: one row for each module that gets factors.
        modules_to_save: paths of modules that are trained whole.
        saved_parameters: how many parameters those copies hold.
        saved_bytes: how many bytes they take.
        biases: names of the base parameters trained under `bias`, without copies of tied ones.
        base_weights: names of base parameters that a file brings replacements for (resized embeddings).
        notes: things worth knowing that are no errors.
        description: the model as it was when the plan was made.
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

    def base_parameter(self, name: str) -> torch.nn.Parameter:
        """The parameter of the base model that has this name there."""
        owner, _, attribute = name.rpartition(".")
        parameter = getattr(self.description.nodes[owner].module, attribute)
        assert isinstance(parameter, torch.nn.Parameter)
        return parameter

    def layer_paths(self) -> set[str]:
        """Paths of all modules that are wrapped once the plan is carried out."""
        here = {path for path, node in self.description.nodes.items() if node.layer is not None}
        return here | {spec.path for spec in self.specs}

    @property
    def parameters(self) -> int:
        """How many parameters the adapter trains."""
        return sum(spec.parameters for spec in self.specs) + self.saved_parameters + self.bias_parameters

    @property
    def bytes(self) -> int:
        """How many bytes those take, in memory and (but for the header) on disk."""
        return sum(spec.bytes for spec in self.specs) + self.saved_bytes + self.bias_bytes

    def __str__(self) -> str:
        width = max((len(spec.path) for spec in self.specs), default=0)
        rows = [
            f"{spec.path:<{width}}  {spec.kind:<7} in {spec.shape[1]:>6}  out {spec.shape[0]:>6}  r {spec.r:>4}"
            f"  scaling {spec.scaling:g}  {spec.parameters:>10,} parameters"
            for spec in self.specs
        ]
        rows += [f"{path}  trained whole" for path in self.modules_to_save]
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
) -> Plan:
    """Plan an adapter for `model`, touching nothing.

    Args:
        model: any module; may already carry other adapters.
        config: what to put on it.
        source: "user" makes a pattern or entry that matches nothing an error; "file" makes it a note.
        autocast_adapter_dtype: keep adapters of a half-precision base in fp32.

    Raises:
        PlanError: with every reason at once, each with the module path and near names.
        UnsupportedError: the config asks for a feature that lorakit does not have.
    """
    config.validate()
    check_supported(config, loading=source == "file")
    description = describe(model)
    problems: list[str] = []
    loose: list[str] = []
    whole = _trained_whole(description, config, loose)
    inside = {node.path for path in whole for node in description.children_of(path)}
    resolved = replace(config, target_modules=resolve_targets(description, config, inside))
    matcher = Matcher(resolved)
    specs: list[AdapterSpec] = []
    for node in description.nodes.values():
        if node.path not in inside and matcher.target(node.path):
            specs += _spec(node, resolved, matcher, problems, autocast_adapter_dtype=autocast_adapter_dtype)
    loose += matcher.unused()
    if not specs and not problems:
        problems.append(
            "target_modules matches no module of this model" + near_targets(resolved, description)
        )
    problems += loose if source == "user" else []
    if problems:
        raise PlanError(problems)
    notes = loose if source == "file" else _notes(specs, description, resolved)
    layout = bool(specs) and all(spec.kind == "conv1d" for spec in specs)
    resolved = replace(resolved, fan_in_fan_out=layout)
    biases = _trained_biases(description, resolved, {spec.path for spec in specs}, inside)
    return _plan(resolved, specs, whole, biases, notes, description)


def _plan(
    config: LoraConfig,
    specs: list[AdapterSpec],
    whole: dict[str, nn.Module],
    biases: dict[str, nn.Parameter],
    notes: list[str],
    description: Description,
) -> Plan:
    saved = [parameter for module in whole.values() for parameter in module.parameters()]
    return Plan(
        config=config,
        specs=tuple(specs),
        modules_to_save=tuple(whole),
        saved_parameters=sum(parameter.numel() for parameter in saved),
        saved_bytes=sum(parameter.nbytes for parameter in saved),
        biases=tuple(biases),
        bias_parameters=sum(parameter.numel() for parameter in biases.values()),
        bias_bytes=sum(parameter.nbytes for parameter in biases.values()),
        notes=tuple(notes),
        description=description,
    )


def _spec(
    node: Node, config: LoraConfig, matcher: Matcher, problems: list[str], *, autocast_adapter_dtype: bool
) -> list[AdapterSpec]:
    """The row for one targeted module, or none and a problem."""
    codec = find_codec(node.module)
    if is_read_by_parent(node.module):
        problems.append(
            f"{node.path}: nn.MultiheadAttention reads this layer's weight without calling it, so an adapter would "
            "have no effect; exclude it with exclude_modules"
        )
        return []
    if node.kind is None or codec is None:
        problems.append(f"{node.path}: {_why_not(node)}")
        return []
    r, alpha = matcher.rank(node.path), matcher.alpha(node.path)
    weight = node.module.weight
    assert isinstance(weight, torch.Tensor)
    half = weight.dtype in {torch.float16, torch.bfloat16}
    return [
        AdapterSpec(
            path=node.path,
            kind=node.kind.name,
            shape=codec.shape(node.module),
            r=r,
            lora_alpha=alpha,
            scaling=alpha / math.sqrt(r) if config.use_rslora else alpha / r,
            dropout=config.lora_dropout,
            lora_bias=config.lora_bias,
            init=initialiser_name(config.init_lora_weights),
            dtype=torch.float32 if half and autocast_adapter_dtype else weight.dtype,
            device=weight.device,
        )
    ]


def _why_not(node: Node) -> str:
    name = type(node.module).__name__
    if node.kind is None:
        return f"{name} cannot carry an adapter; lorakit adapts nn.Linear and transformers' Conv1D"
    weight = getattr(node.module, "weight", None)
    stored = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
    return (
        f"{name} keeps its weight as {stored}, which lorakit cannot adapt; "
        "it adapts plain fp64, fp32, bf16 and fp16 matrices"
    )


def _trained_whole(description: Description, config: LoraConfig, loose: list[str]) -> dict[str, nn.Module]:
    """Modules that `modules_to_save` names, by path; those inside another one are part of it."""
    found: dict[str, nn.Module] = {}
    candidates = {path: node.module for path, node in description.nodes.items() if path}
    candidates |= {path: wrapper.original_module for path, wrapper in description.saved.items()}
    implicit = IMPLICIT_HEADS.get(config.task_type or "", ())
    for entry in config.modules_to_save or ():
        hits = [path for path in candidates if path.endswith(entry)]  # as PEFT: "norm" means every "...norm"
        if not hits and entry not in implicit:
            loose.append(f"modules_to_save: {entry!r} matches no module" + NearNames(candidates)(entry))
        found.update({path: candidates[path] for path in hits})
    return {
        path: module
        for path, module in found.items()
        if not any(path != other and path.startswith(other + ".") for other in found)
    }


def _trained_biases(
    description: Description, config: LoraConfig, targets: Collection[str], inside: Collection[str]
) -> dict[str, nn.Parameter]:
    """The base parameters that `bias` trains, by name: all with "bias" in it, or those of targeted layers."""
    if config.bias == "none":
        return {}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for node in description.nodes.values():
        if node.path in inside or (config.bias == "lora_only" and node.path not in targets):
            continue
        for attribute, parameter in node.module.named_parameters(recurse=False):
            name = f"{node.path}.{attribute}" if node.path else attribute
            if "bias" in name and id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = parameter
    return found


def _notes(specs: list[AdapterSpec], description: Description, config: LoraConfig) -> list[str]:
    """What a user should know of a config that works."""
    notes = []
    bare = [spec.path for spec in specs if description.nodes[spec.path].module.bias is None]
    if config.lora_bias and bare:
        notes.append(
            f"lora_bias=True, but {len(bare)} targeted layers have no bias ({bare[0]} first): "
            "this adapter cannot be merged into them"
        )
    if config.fan_in_fan_out and any(spec.kind != "conv1d" for spec in specs):
        notes.append("fan_in_fan_out=True does not hold for nn.Linear; the layout is read off each module")
    return notes


def near_targets(config: LoraConfig, description: Description) -> str:
    """A closing half-sentence with names that exist and look like those asked for."""
    wanted = config.target_modules
    entries = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    return "".join(dict.fromkeys(map(NearNames(description.nodes), entries)))
