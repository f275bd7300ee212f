"""Reports on a model that carries adapters, under the field names that users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.state_dict import registry_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeVar

    from torch import nn

    T = TypeVar("T")


@dataclass(frozen=True)
class TunerLayerStatus:
    """One adapted module.

    Attributes:
        name: path of the module, below the outermost wrapper.
        module_type: type of the layer, such as "lora.Linear".
        enabled: whether adapters act.
        active_adapters: names of the active adapters.
        merged_adapters: names merged into the base weight.
        requires_grad: for each adapter, whether all its parameters here want gradients ("irregular": some do).
        available_adapters: names of all adapters here.
        devices: for each adapter, the device types its parameters are on.
        quantization_backend: how the base weight is stored, None for plain floating point.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class TunerModelStatus:
    """A model that carries adapters; "irregular" where its layers differ from each other.

    Attributes:
        base_model_type: class of the base model.
        adapter_model_type: "LoraModel", or "None" for a model with injected layers.
        peft_types: the method of each adapter.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: how many modules are adapted.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices,
            quantization_backend: as of the layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted module.

    Raises:
        AdapterNameError: the model carries no adapter.
    """
    registry, prefix = registry_of(model)
    below = prefix.removeprefix("base_model.")
    rows = []
    names = registry.names()
    for path, layer in registry.layers.items():
        tensors = {name: [item.tensor for item in layer.tensors(name)] for name in layer.adapters}
        # what a tied layer uses may be another one's
        parameters = {name: group for name, group in tensors.items() if group}
        rows.append(
            TunerLayerStatus(
                name=below + names.layer(path),
                module_type=f"lora.{type(layer).__name__}",
                enabled=not layer.disable_adapters,
                active_adapters=layer.active_adapters,
                merged_adapters=list(layer.merged_adapters),
                requires_grad={
                    name: _one(parameter.requires_grad for parameter in group)
                    for name, group in parameters.items()
                },
                available_adapters=sorted(layer.adapters),
                devices={
                    name: sorted({parameter.device.type for parameter in group})
                    for name, group in parameters.items()
                },
                quantization_backend=None if layer.codec.name == "dense" else layer.codec.name,
            )
        )
    return rows


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model.

    Raises:
        AdapterNameError: the model carries no adapter.
    """
    registry, prefix = registry_of(model)
    layers = get_layer_status(model)
    names = sorted(registry.configs)
    trainable, total = count_parameters(model)
    return TunerModelStatus(
        base_model_type=type(registry.model).__name__,
        adapter_model_type="LoraModel" if prefix else "None",
        peft_types={name: str(config.peft_type) for name, config in registry.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one((layer.enabled for layer in layers), registry.enabled),
        active_adapters=_one((layer.active_adapters for layer in layers), list(registry.active)),
        merged_adapters=_one((layer.merged_adapters for layer in layers), []),
        requires_grad={
            name: _one(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())})
            for name in names
        },
        quantization_backend=_one((layer.quantization_backend for layer in layers), None),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model, each counted once."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def _one(values: Iterable[T], default: T | None = None) -> T | Literal["irregular"]:
    """The one value that all are, or "irregular"; `default` when there are none."""
    found = list(values)
    if not found:
        return default  # type: ignore[return-value]
    return found[0] if all(value == found[0] for value in found) else "irregular"
