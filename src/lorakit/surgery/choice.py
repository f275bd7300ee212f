"""Letting one call of a model choose its adapters: checked here once, looked up by every layer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError
from lorakit.layers import BASE, carrying, choosing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorakit.surgery.registry import AdapterRegistry


@contextmanager
def for_the_call(registry: AdapterRegistry, names: str | Sequence[str]) -> Iterator[None]:
    """Within this context, in this thread or task, calls of the model go through these adapters together.

    Args:
        registry: the model's adapters.
        names: one or several, whose contributions add up; "__base__" or none stands for the base model.

    Raises:
        AdapterNameError, AdapterStateError: see `_check`; two of them own the same whole module.
    """
    given = [names] if isinstance(names, str) else list(names)
    distinct = tuple(name for name in dict.fromkeys(given) if name != BASE)
    _check(registry, distinct)
    registry.check_owners(distinct)
    carry_checkpoints(registry)
    with choosing(registry.owner, distinct, None):
        yield


@contextmanager
def for_each_sample(
    registry: AdapterRegistry, names: Sequence[str], *, repeats: bool = False
) -> Iterator[None]:
    """Within this context each sample of a batch goes through its own adapter.

    Args:
        registry: the model's adapters.
        names: one for each sample; "__base__" for the base model.
        repeats: whether the model may repeat samples, each several times in a row, as `generate` does.

    Raises:
        ConfigError: no names.
        AdapterNameError, AdapterStateError: see `_check`.
    """
    if not len(names) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"adapter_names: got {list(names)!r}, wanted one name for each sample of the batch ({BASE!r} for the base)"
        )
    distinct = tuple(name for name in dict.fromkeys(names) if name != BASE)
    _check(registry, distinct)
    places = {name: number for number, name in enumerate(distinct)}
    ids = tuple(places.get(name, -1) for name in names)
    carry_checkpoints(registry)
    with choosing(registry.owner, distinct, ids, repeats=repeats):
        yield


def carry_checkpoints(registry: AdapterRegistry) -> None:
    """Let transformers' gradient checkpointing run a layer again with the choice of the call that ran it first.

    The second run comes in backward, when the call and its choice are over.
    """
    if not torch.is_grad_enabled():
        return
    if registry.checkpointing is None:
        registry.checkpointing = [
            module for module in registry.model.modules() if hasattr(module, "gradient_checkpointing")
        ]
    for module in registry.checkpointing:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and "carries_choice" not in getattr(function, "__dict__", ()):
            module.__dict__["_gradient_checkpointing_func"] = carrying(function)


def drop_checkpoints(registry: AdapterRegistry) -> None:
    """Give the modules their own checkpointing functions back."""
    for module in registry.checkpointing or ():
        known = getattr(module.__dict__.get("_gradient_checkpointing_func"), "__dict__", {})
        if "carries_choice" in known:
            module.__dict__["_gradient_checkpointing_func"] = known["__wrapped__"]
    registry.checkpointing = None


def _check(registry: AdapterRegistry, names: Sequence[str]) -> None:
    """Refuse what a call cannot choose.

    Raises:
        AdapterNameError: an unknown name.
        AdapterStateError: adapters are merged, or replace parameters inside the base's own modules.
    """
    unknown = [name for name in names if name not in registry.configs]
    if unknown:
        raise AdapterNameError(
            f"no adapter named {unknown}; this model has {list(registry.configs)}, and {BASE!r} for the base model"
        )
    if registry.merged:
        raise AdapterStateError(
            f"{list(registry.merged)} are merged; call unmerge_adapter() before choosing adapters for a call"
        )
    acting = [
        name for name in (*names, *registry.active) if any(name in s.copies for s in registry.slots.values())
    ]
    if acting:
        raise AdapterStateError(
            f"adapters {list(dict.fromkeys(acting))} hold trained biases or embeddings, which sit in the base's own "
            "modules and cannot change from call to call; set_adapter() switches them for all calls"
        )
