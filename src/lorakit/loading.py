"""From an adapter's files to a model. Everything is checked before the model is touched.

Order: config, header of the weights file, plan, comparison of keys and shapes, tensors (digest, finiteness),
and only then the model. No initialiser runs for tensors that the file has, no pass over the other adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.checkpoint.hub import resolve_adapter
from lorakit.checkpoint.keys import to_file_key
from lorakit.checkpoint.reading import open_adapter
from lorakit.config import REQUIRED_KEYS, LoraConfig, check_adapter_name
from lorakit.errors import AdapterNameError, KeyMismatchError
from lorakit.fitting import (
    compare,
    file_keys,
    fill,
    with_base_weights,
    with_ties_as_found,
    without_absent_ties,
    without_base_copies,
    wrong_shapes,
)
from lorakit.surgery import attach, expected_tensors, find_registry, make_plan
from lorakit.surgery.naming import tied_names

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, MutableMapping

    from torch import Tensor, nn

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.surgery import AdapterRegistry, Plan


class LoadReport(NamedTuple):
    """What a load found.

    Attributes:
        missing_keys: keys that the file lacks (only with `strict=False`): their layers begin as no change.
        unexpected_keys: keys of the file that were passed over (only with `strict=False`).
        base_weights: base parameters that the adapter replaces while it acts (only with `allow_base_weights`).
        notes: entries of the config that match nothing in this model.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    base_weights: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class HubOptions:
    """Where to look for an adapter, beyond its path or repository; as in huggingface_hub."""

    subfolder: str | None = None
    revision: str | None = None
    token: bool | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False


@dataclass(frozen=True)
class LoadOptions:
    """How strict a load is, and what becomes of the tensors.

    Attributes:
        config: takes the place of the config file.
        is_trainable: whether the adapter's parameters will want gradients when it is active.
        strict: make missing and unexpected keys an error.
        replace: take the place of an adapter of the same name.
        allow_base_weights: accept embedding weights that PEFT saves with an adapter whose vocabulary grew.
        allow_pickle_bin: accept `adapter_model.bin` (read with `weights_only`).
        key_mapping: regular expressions and replacements for the file's keys, without their prefix.
        autocast_adapter_dtype: keep adapters of a half-precision base in fp32.
    """

    config: LoraConfig | None = None
    is_trainable: bool = False
    strict: bool = True
    replace: bool = False
    allow_base_weights: bool = False
    allow_pickle_bin: bool = False
    key_mapping: Mapping[str, str] | None = None
    autocast_adapter_dtype: bool = True


_ALWAYS_SO = frozenset({"low_cpu_mem_usage"})


def sort_options(options: Mapping[str, Any], **load: Any) -> tuple[LoadOptions, HubOptions]:
    """Keyword arguments by what they say: how to load (`load` does, too), and where from.

    Raises:
        TypeError: an unknown keyword.
    """
    hub = {name: value for name, value in options.items() if name in HubOptions.__dataclass_fields__}
    more = {name: value for name, value in options.items() if name in LoadOptions.__dataclass_fields__}
    unknown = sorted(set(options) - set(hub) - set(more) - _ALWAYS_SO)
    if unknown:
        known = sorted({**HubOptions.__dataclass_fields__, **LoadOptions.__dataclass_fields__})
        raise TypeError(f"unknown arguments {unknown}; known are {known}")
    return LoadOptions(**load, **more), HubOptions(**hub)


def load_onto(
    model: nn.Module, source: str | os.PathLike[str], name: str, options: LoadOptions, hub: HubOptions
) -> tuple[AdapterRegistry, LoadReport]:
    """Load an adapter onto `model`, not active unless it is the first.

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError, PlanError, KeyMismatchError, NonFiniteError,
        AdapterNameError, AdapterStateError: the model is as it was.
    """
    _check_name(model, name, options)
    file, config = read_adapter(source, options, hub)
    plan = make_plan(
        model,
        config,
        source="file",
        autocast_adapter_dtype=options.autocast_adapter_dtype,
        replacing=name if options.replace else None,
    )
    keys: dict[str, str] = file_keys(file, options.key_mapping, plan)
    copies: tuple[str, ...] = ()
    if options.allow_base_weights:
        plan = with_base_weights(plan, keys)
    else:
        keys, copies = without_base_copies(file, plan, keys)
    plan = without_absent_ties(plan, keys)
    missing, unexpected = compare(file, plan, keys, strict=options.strict)
    wanted = {name_: key for name_, key in keys.items() if name_ not in unexpected}
    loaded = file.load(wanted.values())
    tensors = {name_: loaded[key] for name_, key in wanted.items()}
    plan, tensors = with_ties_as_found(plan, tensors, str(file.weights_path))
    if missing:
        tensors = fill(plan, tensors)
    before = find_registry(model)
    is_first = before is None or not before.configs
    registry = put_in_place(model, plan, name, tensors)
    if is_first:
        registry.set_active([name], inference_mode=not options.is_trainable)
    elif name in registry.active and options.is_trainable:  # it took the place of one that was active
        frozen = registry.frozen(name)
        for item in registry.tensors(name):
            item.tensor.requires_grad_(item.tensor.is_floating_point() and id(item.tensor) not in frozen)
    report = LoadReport(
        tuple(map(to_file_key, missing)),
        tuple(keys[key] for key in unexpected),
        plan.base_weights,
        (*plan.notes, *(f"{to_file_key(name)}: the base's own embedding, passed over" for name in copies)),
    )
    return registry, report


def read_adapter(
    source: str | os.PathLike[str], options: LoadOptions, hub: HubOptions
) -> tuple[AdapterFile, LoraConfig]:
    """Find an adapter, read its header and its config; no tensor is read."""
    folder = resolve_adapter(source, allow_pickle_bin=options.allow_pickle_bin, **hub.__dict__)
    file = open_adapter(folder, allow_pickle_bin=options.allow_pickle_bin)
    config = options.config or LoraConfig.from_dict(file.config, where=str(folder), required=REQUIRED_KEYS)
    return file, replace(config, inference_mode=not options.is_trainable)


def _check_name(model: nn.Module, name: str, options: LoadOptions) -> None:
    check_adapter_name(name)
    registry = find_registry(model)
    if registry is None or name not in registry.configs:
        return
    if not options.replace:
        raise AdapterNameError(
            f"adapter {name!r} exists already; choose another name, delete it first, or pass replace=True"
        )
    registry.check_unmerged("replacing an adapter")


def attach_tensors(
    model: nn.Module, config: LoraConfig, name: str, tensors: Mapping[str, Tensor]
) -> AdapterRegistry:
    """Attach an adapter whose tensors are at hand, by module path.

    Raises:
        KeyMismatchError: they are not the adapter's; the model was not touched.
    """
    plan = without_absent_ties(make_plan(model, config), tensors)
    expected = expected_tensors(plan)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = wrong_shapes(expected, shapes, {key: key for key in tensors})
    missing = expected.keys() - tensors.keys() - tied_names(plan).keys()
    unexpected = tensors.keys() - expected.keys()
    if missing or unexpected or wrong:
        raise KeyMismatchError(
            "state_dict", missing=sorted(missing), unexpected=sorted(unexpected), mismatched=wrong
        )
    copies = {key: tensors[key].clone() for key in expected if key in tensors}
    plan, copies = with_ties_as_found(plan, copies, "state_dict")
    return attach(model, plan, name, tensors=copies)


def put_in_place(model: nn.Module, plan: Plan, name: str, tensors: Mapping[str, Tensor]) -> AdapterRegistry:
    """Attach; an adapter of the same name gives way, and comes back if that fails."""
    registry = find_registry(model)
    if registry is None or name not in registry.configs:
        return attach(model, plan, name, tensors=tensors)
    own = {item.file_name: item.tensor for item in registry.tensors(name)}
    scalings = {path: layer.scaling[name] for path, layer in registry.layers.items() if name in layer.scaling}
    offsets = _offsets(registry, name)
    former = {file_name: tensor.detach() for file_name, tensor in own.items()}
    former_plan = plan_again(registry, name, former, replacing=name)
    active, flags = registry.active, _flags(registry)
    registry.active = tuple(other for other in active if other != name)
    registry.discard(name)
    try:
        attach(model, plan, name, tensors=tensors)
        flags = {key: flag for key, flag in flags.items() if key[0] != name}
    except BaseException:
        attach(model, former_plan, name, tensors=former)
        _bring_back(registry, name, own, scalings)
        for path, offset in offsets.items():
            registry.layers[path].hold_offset(name, offset)
        raise
    finally:
        registry.set_active(active, inference_mode=True)
        for (owner, file_name), tensor in _named(registry).items():
            tensor.requires_grad = flags.get((owner, file_name), False)
    return registry


def _bring_back(
    registry: AdapterRegistry, name: str, own: Mapping[str, Tensor], scalings: Mapping[str, float | Tensor]
) -> None:
    """Give an adapter that was put back its own parameters, which an optimizer holds, and its own scalings."""
    owners = {id(item.tensor): own[item.file_name] for item in registry.tensors(name)}
    holders: list[MutableMapping[str, Any]] = [module._parameters for module in registry.model.modules()]
    for holder in (*holders, *(slot.copies for slot in registry.slots.values())):
        for key, parameter in holder.items():
            former = owners.get(id(parameter))
            if former is not None:
                holder[key] = former
    for path, scaling in scalings.items():
        registry.layers[path].scaling[name] = scaling


def plan_again(
    registry: AdapterRegistry, name: str, tensors: Mapping[str, Tensor], *, replacing: str | None = None
) -> Plan:
    """The plan that puts an adapter of this model on it once more: back in its place, or beside it as another.

    Args:
        registry: of the model.
        name: of the adapter.
        tensors: its tensors by file name.
        replacing: its name, if it is to be gone then.
    """
    began = registry.configs[name]
    # it begins no more: what it takes off the base, if anything, is at hand
    config = replace(began, init_lora_weights=True) if _offsets(registry, name) else began
    plan = make_plan(registry.model, config, source="file", replacing=replacing)
    plan = replace(plan, config=replace(plan.config, init_lora_weights=began.init_lora_weights))
    plan, _ = with_ties_as_found(without_absent_ties(plan, tensors), tensors, "the model")
    replaced = [key for key, slot in registry.slots.items() if name in slot.copies]
    return replace(plan, base_weights=tuple(key for key in replaced if key not in plan.biases))


def _offsets(registry: AdapterRegistry, name: str) -> dict[str, nn.Module]:
    """What an adapter takes off the base, by path of the layer."""
    return {
        path: layer.lora_offset[name]
        for path, layer in registry.layers.items()
        if layer.lora_offset is not None and name in layer.lora_offset
    }


def _named(registry: AdapterRegistry) -> dict[tuple[str, str], Tensor]:
    """Every adapter's tensors, by adapter and file name."""
    return {
        (name, item.file_name): item.tensor for name in registry.configs for item in registry.tensors(name)
    }


def _flags(registry: AdapterRegistry) -> dict[tuple[str, str], bool]:
    return {key: tensor.requires_grad for key, tensor in _named(registry).items()}
