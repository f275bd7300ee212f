"""Giving the base model back: as it was, or with adapters merged into it."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from lorakit.errors import at_path
from lorakit.layers.tied import merged_with
from lorakit.report import MergeReport
from lorakit.surgery.attach import thaw
from lorakit.surgery.choice import drop_checkpoints
from lorakit.surgery.registry import set_registry
from lorakit.surgery.ties import settle_ties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from lorakit.layers import LoraLayer, MergingLayer, PreparedMerge
    from lorakit.surgery.registry import AdapterRegistry

    Progress = Callable[[Iterable[tuple[str, LoraLayer]]], Iterable[tuple[str, LoraLayer]]]


def unload(registry: AdapterRegistry) -> nn.Module:
    """Take every adapter off: modules, biases, weights, layers and `requires_grad` flags as before the first one.

    Raises:
        AdapterStateError: `merge_and_unload` was begun and interrupted, so no original weights are left.
    """
    registry.unmerge()
    for slot in registry.slots.values():
        slot.restore()
    return _take_off(registry, {path: wrapper.original_module for path, wrapper in registry.saved.items()})


def merge_and_unload(
    registry: AdapterRegistry,
    names: Sequence[str] | None = None,
    *,
    progress: Progress = iter,
    force: bool = False,
    dequantize: bool = False,
) -> nn.Module:
    """Merge adapters (default: the active ones) for good and give the plain model back.

    First every layer is checked, then each is merged in turn, into its own weight where nobody else would see that.
    Interrupted in between, the model computes the same and the call can be repeated.

    Args:
        registry: of the model.
        names: of the adapters.
        progress: wraps the layers that are gone through.
        force: accept whatever quantising again loses.
        dequantize: leave quantised layers in full precision instead.

    Raises:
        LossyMergeError: a quantised layer would lose too much; nothing was changed.
        AdapterNameError, AdapterStateError, UnsupportedError, NonFiniteError: nothing was changed.
    """
    registry.check_known(list(names or ()))
    wanted = list(registry.active if names is None else dict.fromkeys(names))
    registry.check_owners(wanted)
    registry.check_can_merge(wanted)
    order = registry.in_merge_order()
    full = {layer: registry.full_dtype(layer) for _, layer in order if dequantize}
    registry.merge_report = _check(order, wanted, full, force=force)
    if not registry.enabled:
        registry.set_enabled(enabled=True)
    for wrapper in registry.saved.values():
        wrapper.set_adapter(wanted, inference_mode=True)
    for slot in registry.slots.values():  # before the merge: it adds lora_B's bias to the adapter's own
        slot.set_adapter(wanted, inference_mode=True)
    _merge_for_good(registry, order, wanted, full, progress)
    model = _take_off(registry, {path: wrapper.active_module for path, wrapper in registry.saved.items()})
    settle_ties(model, registry.shared)
    return model


def _check(
    order: list[tuple[str, LoraLayer]],
    names: list[str],
    full: Mapping[LoraLayer, torch.dtype],
    *,
    force: bool,
) -> MergeReport:
    """Everything that merging would refuse."""
    errors: dict[str, float] = {}
    for path, layer in order:
        with at_path(path):
            lost = layer.check_merge(names, full.get(layer))
        if lost is not None:
            errors[path] = lost
    report = MergeReport(errors)
    if not force:
        report.check()
    return report


def _merge_for_good(
    registry: AdapterRegistry,
    order: list[tuple[str, LoraLayer]],
    names: list[str],
    full: Mapping[LoraLayer, torch.dtype],
    progress: Progress,
) -> None:
    # which layers share a weight has to be known before the first of them gets another
    everything = [*registry.merged, *names]
    sources = {layer: merged_with(layer, everything) for _, layer in order}
    holders = _holders(registry.model, [layer for _, layer in order])
    kept: dict[MergingLayer, PreparedMerge] = {}
    for path, layer in progress(order):
        source = sources[layer]
        done = None if source is None else kept.get(source)
        with at_path(path):
            if done is None:
                spent = holders[id(layer.original_weight)] == 1
                prepared = layer.prepare_merge(names, full.get(layer), spent=spent)
            else:
                prepared = layer.prepare_alike(done) if layer.mergeable(names) else None
        if prepared is not None:
            layer.commit_merge_for_good(prepared)
            if layer in sources.values():
                kept[layer] = prepared


def _holders(model: nn.Module, layers: Iterable[LoraLayer]) -> Counter[int]:
    """How many need each parameter: modules that hold it, and merged layers that keep it aside."""
    held = (parameter for module in model.modules() for parameter in module._parameters.values())
    aside = (layer.original_weight for layer in layers if layer.merged)
    return Counter(id(parameter) for parameter in chain(held, aside))


def _take_off(registry: AdapterRegistry, whole: dict[str, nn.Module]) -> nn.Module:
    for path in list(registry.layers):
        registry.unwrap(path)
        del registry.layers[path]
    for path, module in whole.items():
        registry.put(registry.places.pop(path, ()), module)
    registry.replicate(None)
    drop_checkpoints(registry)
    thaw(registry)
    set_registry(registry.model, None)
    return registry.model
