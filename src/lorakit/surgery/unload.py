"""Giving the base model back: as it was, or with adapters merged into it."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from lorakit.surgery.attach import thaw
from lorakit.surgery.registry import at_path, set_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from lorakit.layers import LoraLayer
    from lorakit.surgery.registry import AdapterRegistry

    Progress = Callable[[Iterable[tuple[str, LoraLayer]]], Iterable[tuple[str, LoraLayer]]]


def unload(registry: AdapterRegistry) -> nn.Module:
    """Take every adapter off: modules, biases, weights and `requires_grad` flags as before the first one.

    Raises:
        AdapterStateError: `merge_and_unload` was begun and interrupted, so no original weights are left.
    """
    registry.unmerge()
    for slot in registry.slots.values():
        slot.restore()
    return _take_off(registry, {path: wrapper.original_module for path, wrapper in registry.saved.items()})


def merge_and_unload(
    registry: AdapterRegistry, names: Sequence[str] | None = None, *, progress: Progress = iter
) -> nn.Module:
    """Merge adapters (default: the active ones) for good and give the plain model back.

    First every layer is checked, then each is merged in turn and its former weight let go, so no more than one
    layer's weight is held twice. Interrupted in between, the model computes the same and the call can be
    repeated.

    Raises:
        AdapterNameError, AdapterStateError, UnsupportedError, NonFiniteError: nothing was changed.
    """
    registry.check_known(list(names or ()))
    wanted = list(registry.active if names is None else dict.fromkeys(names))
    registry.check_owners(wanted)
    for path, layer in registry.layers.items():
        with at_path(path):
            layer.check_merge(wanted)
    if not registry.enabled:
        registry.set_enabled(enabled=True)
    for wrapper in registry.saved.values():
        wrapper.set_adapter(wanted, inference_mode=True)
    for slot in registry.slots.values():  # before the merge: it adds lora_B's bias to the adapter's own
        slot.set_adapter(wanted, inference_mode=True)
    tied = _tied_weights(registry)
    for path, layer in progress(registry.layers.items()):
        with at_path(path):
            prepared = layer.prepare_merge(wanted)
        if prepared is not None:
            layer.commit_merge_for_good(prepared)
    _untie(registry, [path for path in tied if registry.layers[path].merged])
    return _take_off(registry, {path: wrapper.active_module for path, wrapper in registry.saved.items()})


def _take_off(registry: AdapterRegistry, whole: dict[str, nn.Module]) -> nn.Module:
    for path, layer in registry.layers.items():
        registry.unwrap(path, layer.base_layer)
    for path, module in whole.items():
        registry.unwrap(path, module)
    thaw(registry)
    set_registry(registry.model, None)
    return registry.model


def _tied_weights(registry: AdapterRegistry) -> list[str]:
    """Paths of layers whose weight is also that of another module, such as a head tied to the embedding."""
    uses = Counter(id(parameter) for _, parameter in registry.model.named_parameters(remove_duplicate=False))
    return [path for path, layer in registry.layers.items() if uses[id(layer.weight)] > 1]


def _untie(registry: AdapterRegistry, paths: list[str]) -> None:
    """Record in the model's config that a merged weight is no longer shared."""
    if not paths:
        return
    config = getattr(registry.model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        warnings.warn(
            f"{paths} shared a weight with another module; the merged weight is its own now, and "
            "config.tie_word_embeddings was set to False so that a saved model keeps it",
            stacklevel=4,
        )
