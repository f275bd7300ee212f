"""Putting a planned adapter on a model: build everything first, then commit, undo all of it on any exception."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from lorakit.errors import AdapterNameError
from lorakit.init import InitContext, initialise
from lorakit.layers import ModulesToSaveWrapper, ParameterSlot, Place, kind_of
from lorakit.surgery.registry import AdapterRegistry, base_parameter_file_name, find_registry, set_registry
from lorakit.types import Factors
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lorakit.surgery.plan import Plan
    from lorakit.types import AdapterSpec


def attach(
    model: nn.Module, plan: Plan, name: str, *, tensors: Mapping[str, Tensor] | None = None
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
    factors = {spec.path: _factors(spec, plan, tensors) for spec in plan.specs}
    registry = known if known is not None else AdapterRegistry(model)
    with ExitStack() as undo:
        if known is None:
            undo.callback(_forget, registry)
            _freeze(registry)
            set_registry(model, registry)
        undo.callback(registry.discard, name)
        _commit(registry, plan, name, factors, tensors)
        registry.configs[name] = plan.config
        for item in registry.tensors(name):  # trainable once it is set active
            item.tensor.requires_grad = False
        undo.pop_all()
    return registry


def expected_tensors(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names in a file, and shapes, of every tensor that the planned adapter consists of."""
    expected: dict[str, tuple[int, ...]] = {}
    for spec in plan.specs:
        out_features, in_features = spec.shape
        expected[f"{spec.path}.lora_A.weight"] = (spec.r, in_features)
        expected[f"{spec.path}.lora_B.weight"] = (out_features, spec.r)
        if spec.lora_bias:
            expected[f"{spec.path}.lora_B.bias"] = (out_features,)
    for path in plan.modules_to_save:
        for key, tensor in _whole_module(plan, path).state_dict().items():
            expected[f"{path}.{key}"] = tuple(tensor.shape)
    wrapped = plan.layer_paths()
    for name in (*plan.biases, *plan.base_weights):
        expected[base_parameter_file_name(name, wrapped)] = tuple(plan.base_parameter(name).shape)
    return expected


def _whole_module(plan: Plan, path: str) -> nn.Module:
    wrapper = plan.description.saved.get(path)
    return plan.description.nodes[path].module if wrapper is None else wrapper.original_module


def _factors(spec: AdapterSpec, plan: Plan, tensors: Mapping[str, Tensor] | None) -> Factors:
    """The file's tensors in the adapter's dtype and on its device, or new ones."""
    if tensors is not None:
        device = torch.device("cpu") if spec.device.type == "meta" else spec.device
        A, B = (tensors[f"{spec.path}.lora_{part}.weight"].to(device, spec.dtype) for part in "AB")
        bias = tensors[f"{spec.path}.lora_B.bias"].to(device, spec.dtype) if spec.lora_bias else None
        return Factors(A, B, spec.scaling, bias)
    base = plan.description.nodes[spec.path].module
    codec = find_codec(base)
    assert codec is not None, "the planner let a module through that no codec owns"
    result = initialise(InitContext(spec, lambda dtype: codec.read(base, dtype)))
    assert result.base_weight is None, "no registered initialiser changes the base"
    return result.factors


def _commit(
    registry: AdapterRegistry,
    plan: Plan,
    name: str,
    factors: Mapping[str, Factors],
    tensors: Mapping[str, Tensor] | None,
) -> None:
    slots = _slots(registry, plan)
    for spec in plan.specs:
        _wrap_layer(registry, plan, spec.path)
        registry.layers[spec.path].add(name, factors[spec.path], spec, use_rslora=plan.config.use_rslora)
    for path in plan.modules_to_save:
        whole = _whole_module(plan, path)
        own = None
        if tensors is not None:
            own = {key: tensors[f"{path}.{key}"].to(old) for key, old in whole.state_dict().items()}
        _wrap_saved(registry, plan, path)
        registry.saved[path].add(name, own)
    for parameter, slot in slots.items():
        value = None
        if tensors is not None:
            value = tensors[base_parameter_file_name(parameter, registry.layers)].to(slot.original)
        registry.slots.setdefault(parameter, slot).add(name, value, trainable=parameter in plan.biases)


def _wrap_layer(registry: AdapterRegistry, plan: Plan, path: str) -> None:
    if path in registry.layers:
        return
    node = plan.description.nodes[path]
    kind, codec = kind_of(node.module), find_codec(node.module)
    assert kind is not None
    assert codec is not None
    layer = kind.layer(node.module, codec)
    layer.enable_adapters(registry.enabled)
    layer.set_adapter(registry.active)
    _install(registry, path, node.places, layer)
    registry.layers[path] = layer


def _wrap_saved(registry: AdapterRegistry, plan: Plan, path: str) -> None:
    if path in registry.saved:
        return
    node = plan.description.nodes[path]
    wrapper = ModulesToSaveWrapper(node.module)
    wrapper.enable_adapters(registry.enabled)
    _install(registry, path, node.places, wrapper)
    registry.saved[path] = wrapper


def _install(registry: AdapterRegistry, path: str, places: tuple[Place, ...], wrapper: nn.Module) -> None:
    registry.places[path] = places
    for place in places:
        setattr(place.owner, place.attribute, wrapper)


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


def thaw(registry: AdapterRegistry) -> None:
    """Give the base parameters the flags that they had before the first adapter came.

    By name, since a merge for good puts new parameters in the old places.
    """
    for name, parameter in registry.model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(registry.flags.get(name, parameter.requires_grad))


def _forget(registry: AdapterRegistry) -> None:
    thaw(registry)
    set_registry(registry.model, None)
