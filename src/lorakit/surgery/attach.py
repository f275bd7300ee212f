"""Putting a planned adapter on a model: build everything first, then commit, undo all of it on any exception."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch

from lorakit.errors import AdapterNameError
from lorakit.init import initialise
from lorakit.layers import ModulesToSaveWrapper, ParameterSlot, Place
from lorakit.specs import TOKEN_ROWS
from lorakit.surgery.naming import names_in_file, whole_module
from lorakit.surgery.paths import joined
from lorakit.surgery.registry import AdapterRegistry, find_registry, set_registry
from lorakit.surgery.wrap import wrap_module, wrap_parameter
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lorakit.specs import AdapterSpec
    from lorakit.surgery.plan import Plan
    from lorakit.types import Factors

    New = Mapping[str, tuple[Factors, ...]]
    """The factors of each weight's blocks, by the spec's path."""


def attach(
    model: torch.nn.Module, plan: Plan, name: str, *, tensors: Mapping[str, Tensor] | None = None
) -> AdapterRegistry:
    """Put the planned adapter on `model` under `name`, not active unless it is the first.

    Args:
        model: the model that the plan was made for.
        plan: what to put where.
        name: a free adapter name.
        tensors: the adapter's tensors by file name (`expected_tensors` says which); no initialiser runs then.

    Raises:
        AdapterNameError: the name is taken.
    """
    known = find_registry(model)
    if known is not None and name in known.configs:
        raise AdapterNameError(f"adapter {name!r} exists already; choose another name or delete it first")
    for note in plan.notes:
        warnings.warn(note, stacklevel=4)
    factors = _given(plan, tensors) if tensors is not None else _initial(plan)
    return put(model, plan, name, factors, tensors)


def put(
    model: torch.nn.Module,
    plan: Plan,
    name: str,
    factors: New,
    tensors: Mapping[str, Tensor] | None = None,
) -> AdapterRegistry:
    """Put an adapter on `model` whose factors are at hand, or nothing of it.

    Args:
        model: the model that the plan was made for.
        plan: what to put where.
        name: a free adapter name.
        factors: of every spec that is not tied to another; they become the adapter's parameters.
        tensors: the rest of the adapter by file name; None takes the base's own values.
    """
    known = find_registry(model)
    registry = known if known is not None else AdapterRegistry(model)
    with ExitStack() as undo:
        if known is None:
            undo.callback(_forget, registry)
            _freeze(registry)
            set_registry(model, registry)
        if not registry.configs:
            registry.shared = _shared(model)
        if plan.replication is not None:
            undo.callback(registry.replicate, None)
            registry.replicate(plan.replication)
        undo.callback(registry.discard, name)
        slots = _slots(registry, plan)
        _add_factors(registry, plan, name, factors)
        _add_rows(registry, plan, name, tensors)
        _add_whole(registry, plan, name, tensors)
        _add_slots(registry, plan, name, slots, tensors)
        registry.configs[name] = plan.config
        for item in registry.tensors(name):  # trainable once it is set active
            if item.tensor.is_leaf:
                item.tensor.requires_grad = False
        undo.pop_all()
    return registry


def _given(plan: Plan, tensors: Mapping[str, Tensor]) -> New:
    """The file's tensors in the adapter's dtype and on its device."""
    names = names_in_file(plan)
    return {
        spec.path: _from_file(spec, names.layer(spec.path), tensors)
        for spec in plan.specs
        if spec.tied_to is None
    }


def _from_file(spec: AdapterSpec, path: str, tensors: Mapping[str, Tensor]) -> tuple[Factors, ...]:
    device = torch.device("cpu") if spec.device.type == "meta" else spec.device
    own = {part: tensors[joined(path, name)].to(device, spec.dtype) for part, name in spec.file_names.items()}
    return spec.layout.split(own["A"], own["B"], spec.scaling, own.get("bias"))


def _initial(plan: Plan) -> New:
    found = {}
    for spec in plan.specs:
        if spec.tied_to is not None:
            continue
        is_parameter = spec.kind == "parameter"
        path, _, attribute = spec.path.rpartition(".")
        base = plan.description.nodes[path if is_parameter else spec.path].module
        codec = find_codec(base, attribute if is_parameter else None)
        assert codec is not None, "the planner let a module through that no codec owns"
        results = initialise(spec, partial(codec.read, base))
        assert all(result.base_weight is None for result in results), "no initialiser changes the base"
        found[spec.path] = tuple(result.factors for result in results)
    return found


def _add_factors(registry: AdapterRegistry, plan: Plan, name: str, factors: New) -> None:
    rslora = plan.config.use_rslora
    for spec in sorted(plan.specs, key=lambda spec: spec.tied_to is not None):
        if spec.kind == "parameter":
            wrap_parameter(registry, plan.description, spec.path)
        else:
            wrap_module(registry, plan.description, spec.path)
        layer = registry.layers[spec.path]
        if spec.tied_to is None:
            layer.add(name, factors[spec.path], spec, use_rslora=rslora)
        else:
            layer.add_tied(name, registry.layers[spec.tied_to], spec, use_rslora=rslora)


def _add_rows(registry: AdapterRegistry, plan: Plan, name: str, tensors: Mapping[str, Tensor] | None) -> None:
    for token in plan.tokens:  # those with rows of their own come first
        wrap_module(registry, plan.description, token.path)
        layer = registry.layers[token.path]
        source = None if token.tied_to is None else registry.layers[token.tied_to]
        rows = None
        if source is None:
            given = (
                layer.original_rows(token.indices)
                if tensors is None
                else tensors[f"{token.path}.{TOKEN_ROWS}"]
            )
            device = torch.device("cpu") if token.device.type == "meta" else token.device
            rows = given.to(device, token.dtype)
        layer.add_rows(name, token.indices, rows, source)


def _add_whole(
    registry: AdapterRegistry, plan: Plan, name: str, tensors: Mapping[str, Tensor] | None
) -> None:
    for path in sorted(plan.modules_to_save, key=lambda path: path in plan.saved_ties):
        whole = whole_module(plan, path)
        own = None
        if tensors is not None:
            own = {key: tensors[f"{path}.{key}"].to(old) for key, old in whole.state_dict().items()}
        if path not in registry.saved:
            wrapper = ModulesToSaveWrapper(whole)
            wrapper.enable_adapters(registry.enabled)
            wrapper.owner = registry.owner
            registry.install(path, plan.description.nodes[path].places, wrapper)
            registry.saved[path] = wrapper
        source = plan.saved_ties.get(path)
        tied = None if source is None else registry.saved[source].modules_to_save[name]
        registry.saved[path].add(name, own, tied=tied)


def _add_slots(
    registry: AdapterRegistry,
    plan: Plan,
    name: str,
    slots: Mapping[str, ParameterSlot],
    tensors: Mapping[str, Tensor] | None,
) -> None:
    names = names_in_file(plan)
    for parameter, slot in slots.items():
        value = None if tensors is None else tensors[names.parameter(parameter)].to(slot.original)
        registry.slots.setdefault(parameter, slot).add(name, value, trainable=parameter in plan.biases)


def _slots(registry: AdapterRegistry, plan: Plan) -> dict[str, ParameterSlot]:
    """The slot of every base parameter that the plan replaces: the one that is there, or a new one.

    A tied parameter is replaced in all its places, but for those that the plan names on their own.
    """
    names = (*plan.biases, *plan.base_weights)
    if not names:
        return {}
    places: dict[int, dict[str, Place]] = {}
    for node in plan.description.nodes.values():
        for attribute, parameter in node.module.named_parameters(recurse=False):
            own = {f"{node.path}.{attribute}" if node.path else attribute: Place(node.module, attribute)}
            places.setdefault(id(parameter), {}).update(own)
    slots = {}
    for name in names:
        shared = places[id(plan.base_parameter(name))]
        mine = [place for key, place in shared.items() if key == name or key not in names]
        slots[name] = registry.slots.get(name) or ParameterSlot(mine)
    return slots


def _freeze(registry: AdapterRegistry) -> None:
    named = list(registry.model.named_parameters(remove_duplicate=False))
    registry.flags = {name: parameter.requires_grad for name, parameter in named}
    for _, parameter in named:
        parameter.requires_grad = False


def _shared(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def thaw(registry: AdapterRegistry) -> None:
    """Give the base parameters the flags that they had before the first adapter came.

    By name, since a merge for good puts new parameters in the old places.
    """
    for name, parameter in registry.model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(registry.flags.get(name, parameter.requires_grad))


def _forget(registry: AdapterRegistry) -> None:
    thaw(registry)
    set_registry(registry.model, None)
