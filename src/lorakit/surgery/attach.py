"""Putting a planned adapter on a model: build everything first, then commit, undo all of it on any exception."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from tqdm.auto import tqdm

from lorakit.errors import AdapterNameError
from lorakit.init import Misfit, initialise
from lorakit.layers import ModulesToSaveWrapper, ParameterSlot, Place
from lorakit.specs import TOKEN_ROWS
from lorakit.surgery.naming import names_in_file, whole_module
from lorakit.surgery.paths import joined
from lorakit.surgery.registry import AdapterRegistry, find_registry, set_registry
from lorakit.surgery.wrap import group_siblings, wrap_module, wrap_parameter
from lorakit.variants import Start
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorakit.init import InitResult
    from lorakit.layers import LoraLayer, ParamWrapper
    from lorakit.specs import AdapterSpec
    from lorakit.surgery.plan import Plan
    from lorakit.types import Factors
    from lorakit.variants import Variant

_UNTIL_A_BAR = 2.0  # seconds: schemes that look at no weight are done before


class New(NamedTuple):
    """What an adapter is made of on one weight.

    Attributes:
        tensors: as they are stored, by part.
        offset: what is taken off the base for it, for each block; None takes nothing.
        base_weight: what the base is to hold from now on, shaped as a codec reads it, or None.
        misfit: how well that and the adapter stand for the weight that was there, or None.
    """

    tensors: Mapping[str, Tensor]
    offset: tuple[Factors, ...] | None = None
    base_weight: Tensor | None = None
    misfit: Misfit | None = None

    @staticmethod
    def of(spec: AdapterSpec, factors: Sequence[Factors]) -> New:
        """A plain adapter with these factors of each block."""
        return New(_as_stored(spec, factors))


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
    factors: Mapping[str, New],
    tensors: Mapping[str, Tensor] | None = None,
) -> AdapterRegistry:
    """Put an adapter on `model` whose factors are at hand, or nothing of it.

    Args:
        model: the model that the plan was made for.
        plan: what to put where.
        name: a free adapter name.
        factors: by path, of every spec that is not tied to another; they become the adapter's parameters.
        tensors: the rest of the adapter by file name; None takes the base's own values.
    """
    known = find_registry(model)
    registry = known if known is not None else AdapterRegistry(model)
    with ExitStack() as undo:
        if known is None:
            undo.callback(_forget, registry)
            set_registry(model, registry)
        if not registry.configs:
            named = list(model.named_parameters(remove_duplicate=False))
            registry.shared = _shared(named)
            if known is None:
                _freeze(registry, named)
        if plan.replication is not None:
            undo.callback(registry.replicate, None)
            registry.replicate(plan.replication)
        undo.callback(registry.discard, name)
        slots = _slots(registry, plan)
        there = set(registry.layers)
        _add_factors(registry, plan, name, factors)
        _add_rows(registry, plan, name, tensors)
        group_siblings(registry, plan.description, registry.layers.keys() - there)
        _add_whole(registry, plan, name, tensors)
        _add_slots(registry, plan, name, slots, tensors)
        _replace_base(registry, factors, undo)
        registry.configs[name] = plan.config
        registry.board.add(name)
        registry.misfits[name] = {path: new.misfit for path, new in factors.items() if new.misfit is not None}
        undo.pop_all()
    return registry


def _given(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, New]:
    """The file's tensors in the adapter's dtype and on its device."""
    names = names_in_file(plan)
    return {
        spec.path: _from_file(spec, names.layer(spec.path), plan, tensors)
        for spec in plan.specs
        if spec.tied_to is None
    }


def _from_file(spec: AdapterSpec, path: str, plan: Plan, tensors: Mapping[str, Tensor]) -> New:
    device = torch.device("cpu") if spec.device.type == "meta" else spec.device
    own = {part: tensors[joined(path, name)].to(device, spec.dtype) for part, name in spec.file_names.items()}
    return New(own, None if spec.variant is None else _offset(spec, _reader(plan, spec)))


def _initial(plan: Plan) -> dict[str, New]:
    """Begun by the config's scheme: with a bar where it takes long, and a line for each weight that it quantised."""
    own = [spec for spec in plan.specs if spec.tied_to is None]
    scheme = f"init {own[0].init}" if own else ""
    found = {}
    for spec in tqdm(own, desc=scheme, unit="layer", delay=_UNTIL_A_BAR, leave=False):
        found[spec.path] = new = _begun(spec, _reader(plan, spec))
        if new.misfit is not None:
            tqdm.write(f"{spec.path}: {new.misfit}")
    return found


def _begun(spec: AdapterSpec, read: Callable[[torch.dtype], Tensor]) -> New:
    """A new adapter on one weight, as its initialiser and its variant say."""
    results = initialise(spec, read)
    if spec.variant is None and not any(map(_is_more_than_factors, results)):
        return New.of(spec, [result.factors for result in results])
    tensors = _as_stored(spec, [result.factors for result in results])
    offset = tuple(result.offset for result in results if result.offset is not None) or _offset(spec, read)
    weights = [result.base_weight for result in results if result.base_weight is not None]
    weight = None
    if weights:
        weight = torch.stack(weights) if spec.layout.experts else torch.cat(weights)
        read = partial(weight.to, copy=True)
    if spec.variant is not None:
        variant = cast("Variant", spec.variant)
        tensors |= variant.start(Start(spec, tensors["A"], tensors["B"], read))
    misfits = [result.misfit for result in results if result.misfit is not None]
    return New(tensors, offset, weight, Misfit.total(misfits) if misfits else None)


def _is_more_than_factors(result: InitResult) -> bool:
    return result.offset is not None or result.base_weight is not None


def _as_stored(spec: AdapterSpec, factors: Sequence[Factors]) -> dict[str, Tensor]:
    A, B, bias = spec.layout.join(factors)
    return {"A": A, "B": B} if bias is None else {"A": A, "B": B, "bias": bias}


def _offset(spec: AdapterSpec, read: Callable[[torch.dtype], Tensor]) -> tuple[Factors, ...] | None:
    """What the variant takes off the base."""
    if spec.variant is None:
        return None
    with torch.no_grad():
        return cast("Variant", spec.variant).offset(spec, read)


def _reader(plan: Plan, spec: AdapterSpec) -> Callable[[torch.dtype], Tensor]:
    """Gives the unmerged base weight, which is not to be written into."""
    is_parameter = spec.kind == "parameter"
    path, _, attribute = spec.path.rpartition(".")
    node = plan.description.nodes[path if is_parameter else spec.path]
    layer = _wrapper(node.wrappers, attribute) if is_parameter else node.layer
    if layer is not None:
        return layer.peek_weight
    codec = find_codec(node.module, attribute) if is_parameter else node.codec
    assert codec is not None, "the planner let a module through that no codec owns"
    return partial(codec.peek, node.module)


def _wrapper(wrappers: Sequence[ParamWrapper], attribute: str) -> LoraLayer | None:
    return next((wrapper for wrapper in wrappers if wrapper.parameter_name == attribute), None)


def _replace_base(registry: AdapterRegistry, factors: Mapping[str, New], undo: ExitStack) -> None:
    """Let the base hold other weights from now on, where a scheme is meant to change it."""
    for path, new in factors.items():
        if new.base_weight is not None:
            former = registry.layers[path].replace_base(new.base_weight)
            undo.callback(registry.layers[path].restore_base, former)


def _add_factors(registry: AdapterRegistry, plan: Plan, name: str, factors: Mapping[str, New]) -> None:
    rslora = plan.config.use_rslora
    for spec in sorted(plan.specs, key=lambda spec: spec.tied_to is not None):
        if spec.kind == "parameter":
            wrap_parameter(registry, plan.description, spec.path)
        else:
            wrap_module(registry, plan.description, spec.path)
        layer = registry.layers[spec.path]
        if spec.tied_to is None:
            new = factors[spec.path]
            layer.add_stored(name, new.tensors, spec, use_rslora=rslora, offset=new.offset)
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


def _freeze(registry: AdapterRegistry, named: Sequence[tuple[str, torch.nn.Parameter]]) -> None:
    registry.flags = {name: parameter.requires_grad for name, parameter in named}
    for _, parameter in named:
        parameter.requires_grad = False


def _shared(named: Sequence[tuple[str, torch.nn.Parameter]]) -> tuple[tuple[str, ...], ...]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def thaw(registry: AdapterRegistry) -> None:
    """Give the base parameters the flags that they had before the first adapter came.

    By name, since a merge for good puts new parameters in the old places. Those made in inference mode cannot be
    trained, and torch refuses to flag them.
    """
    for name, parameter in registry.model.named_parameters(remove_duplicate=False):
        if not parameter.is_inference():
            parameter.requires_grad_(registry.flags.get(name, parameter.requires_grad))


def _forget(registry: AdapterRegistry) -> None:
    thaw(registry)
    set_registry(registry.model, None)
