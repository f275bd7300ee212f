"""An adapter's tensors as a dictionary, under the keys that its file has."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lorakit.errors import AdapterNameError, AdapterStateError, KeyMismatchError, NonFiniteError
from lorakit.ops import is_finite
from lorakit.padding import file_entries
from lorakit.surgery import find_registry
from lorakit.tuner import LoraModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lorakit.surgery import AdapterRegistry


class IncompatibleKeys(NamedTuple):
    """What a load with `strict=False` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def registry_of(model: nn.Module) -> tuple[AdapterRegistry, str]:
    """The registry of a model that carries adapters, and the prefix of its state dict's keys.

    Takes a `PeftModel`, a `LoraModel`, a compiled one of these, or a model that adapters were injected into.

    Raises:
        AdapterNameError: the model carries no adapter.
    """
    prefix = ""
    inner = model
    while True:
        inner = inner._modules.get("_orig_mod") or inner
        if isinstance(inner, LoraModel):
            prefix += "model."
            inner = inner.model
        base = inner._modules.get("base_model")
        if not isinstance(base, LoraModel):
            break
        prefix += "base_model."
        inner = base
    registry = find_registry(inner)
    if registry is None:
        raise AdapterNameError(f"this {type(model).__name__} carries no adapter")
    return registry, prefix


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by the keys of its file.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into (keys then have no prefix).
        state_dict: the model's whole state dict where a distributed wrapper gathered it; default: the
            parameters themselves, detached, sharing their memory.
        adapter_name: which adapter.

    Raises:
        AdapterNameError: no such adapter.
        AdapterStateError: numbers were written where a hot-swapped adapter has none; see `lorakit.padding`.
        KeyMismatchError: `state_dict` lacks some of the adapter's tensors.
    """
    registry, prefix = registry_of(model)
    stored = file_entries(registry, adapter_name)
    if state_dict is None:
        return {prefix + item.file_name: item.in_file() for item in stored}
    own = [item for item in stored if item.state_name]
    missing = [prefix + item.state_name for item in own if prefix + item.state_name not in state_dict]
    if missing:
        raise KeyMismatchError("state_dict", missing=missing)
    found = {prefix + item.file_name: item.in_file(state_dict[prefix + item.state_name]) for item in own}
    # what a tied module shows is another tensor of the adapter, transposed
    return found | {prefix + item.file_name: item.in_file() for item in stored if not item.state_name}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    *,
    strict: bool = True,
) -> IncompatibleKeys:
    """Copy values into the tensors of an adapter that the model carries already.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        peft_model_state_dict: values by file key; cast to the adapter's dtype and device.
        adapter_name: which adapter.
        strict: make missing and unexpected keys an error; otherwise they are passed over and returned.

    Raises:
        AdapterNameError: no such adapter.
        AdapterStateError: the adapter is merged.
        KeyMismatchError: keys are missing or unexpected (`strict`); shapes differ, or tied tensors that are one
            parameter here have different values (always).
        NonFiniteError: a value is NaN or infinite. Nothing was changed after any of these.
    """
    registry, prefix = registry_of(model)
    stored = file_entries(registry, adapter_name)
    own = {prefix + item.file_name: item for item in stored if item.state_name}
    tied = {prefix + item.file_name for item in stored if not item.state_name}
    if adapter_name in registry.merged:
        raise AdapterStateError(
            f"adapter {adapter_name!r} is merged; call unmerge_adapter() before changing it"
        )
    given = peft_model_state_dict
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own and key not in tied]
    wrong = [
        f"{key}: found {tuple(given[key].shape)}, expected {item.shape}"
        for key, item in own.items()
        if key in given and tuple(given[key].shape) != item.shape
    ]
    wrong += _contradictions({prefix + item.file_name: item.tensor for item in stored}, given)
    if wrong or (strict and (missing or unexpected)):
        raise KeyMismatchError("state dict", missing=missing, unexpected=unexpected, mismatched=wrong)
    bad = [key for key in own if key in given and not is_finite(given[key])]
    if bad:
        raise NonFiniteError(f"these tensors hold NaN or infinity: {bad}; nothing was changed")
    with torch.no_grad():
        for key, item in own.items():
            if key in given:
                item.tensor.copy_(item.in_model(given[key]))
    return IncompatibleKeys(missing, unexpected)


def _contradictions(here: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """A line for each value that is not what another says of the same parameter."""
    said: dict[int, tuple[str, Tensor]] = {}
    found = []
    for key, tensor in here.items():
        if key not in given:
            continue
        owner = tensor if tensor._base is None else tensor._base  # a tied layer shows a view of another's
        flipped = (owner.shape, owner.stride()) != (tensor.shape, tensor.stride())
        value = given[key].t() if flipped else given[key]
        first, wanted = said.setdefault(id(owner), (key, value))
        if value is not wanted and not torch.equal(value.nan_to_num(), wanted.nan_to_num()):
            found.append(f"{key}: is the same parameter as {first} here, but not the same value")
    return found
