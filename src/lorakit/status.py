"""Reports on a model that carries adapters, under the field names that users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from lorakit.layers import Conv, ParamWrapper
from lorakit.specs import TOKEN_ROWS
from lorakit.state_dict import registry_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from torch import Tensor

    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry

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
    """The state of every adapted module, in the order of the modules.

    Replaced token rows have a row of their own, named `<module>.token_adapter`, and so have modules that are trained
    whole.

    Raises:
        AdapterNameError: the model carries no adapter.
    """
    registry, prefix = registry_of(model)
    order = {id(module): number for number, module in enumerate(registry.model.modules())}
    rows = sorted(_rows(registry, prefix.removeprefix("base_model.")), key=lambda row: order[id(row[0])])
    return [row for _, row in rows]


def _rows(registry: AdapterRegistry, below: str) -> Iterator[tuple[nn.Module, TunerLayerStatus]]:
    names = registry.names()
    for path, layer in registry.layers.items():
        where = below + names.layer(path)
        rows = layer.token_adapter
        own = {
            name: [item.tensor for item in layer.tensors(name) if item.file_suffix != TOKEN_ROWS]
            for name in layer.r
        }
        if own:
            yield layer, _layer_row(where, f"lora.{_kind(layer)}", layer, layer.active_adapters, own)
        if rows is not None:
            tokens = {name: [rows.rows(name)] for name in rows.adapters}
            active = [name for name in layer.active_adapters if name in tokens]
            yield layer, _layer_row(f"{where}.token_adapter", "TrainableTokensLayer", layer, active, tokens)
    for path, wrapper in registry.saved.items():
        whole = {name: list(module.parameters()) for name, module in wrapper.modules_to_save.items()}
        yield (
            wrapper,
            TunerLayerStatus(
                name=below + path,
                module_type=type(wrapper).__name__,
                enabled=registry.enabled,
                active_adapters=wrapper.active_adapters,
                merged_adapters=[],
                requires_grad=_flags(whole),
                available_adapters=sorted(whole),
                devices=_devices(whole),
                quantization_backend=None,
            ),
        )


def _layer_row(
    where: str,
    kind: str,
    layer: LoraLayer,
    active: list[str],
    tensors: Mapping[str, Sequence[Tensor]],
) -> TunerLayerStatus:
    return TunerLayerStatus(
        name=where,
        module_type=kind,
        enabled=not layer.disable_adapters,
        active_adapters=active,
        merged_adapters=[name for name in layer.merged_adapters if name in tensors],
        requires_grad=_flags(tensors),
        available_adapters=sorted(tensors),
        devices=_devices(tensors),
        quantization_backend=None if layer.codec.name == "dense" else layer.codec.name,
    )


def _kind(layer: LoraLayer) -> str:
    """The name of a layer's type, where one type stands for several of PEFT's."""
    if isinstance(layer, Conv):
        return f"Conv{len(layer.layout.row) - 1}d"
    if isinstance(layer, ParamWrapper) and isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return "MultiheadAttention"
    return type(layer).__name__


def _flags(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, bool | Literal["irregular"]]:
    return {name: _one(tensor.requires_grad for tensor in group) for name, group in tensors.items()}


def _devices(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, list[str]]:
    return {name: sorted({tensor.device.type for tensor in group}) for name, group in tensors.items()}


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model.

    Raises:
        AdapterNameError: the model carries no adapter.
    """
    registry, prefix = registry_of(model)
    layers = get_layer_status(model)
    names = sorted(registry.configs)
    trainable, total = count_parameters(model)
    active = (layer.active_adapters for layer in registry.layers.values())
    return TunerModelStatus(
        base_model_type=type(registry.model).__name__,
        adapter_model_type="LoraModel" if prefix else "None",
        peft_types={name: str(config.peft_type) for name, config in registry.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one((layer.enabled for layer in layers), registry.enabled),
        active_adapters=_one(active, list(registry.active)),
        merged_adapters=_merged(layers),
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


def _merged(layers: Sequence[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    """The adapters that are merged wherever they are; "irregular" if one is merged here and not there."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if merged & (set(layer.available_adapters) - set(layer.merged_adapters)):
            return "irregular"
    return sorted(merged)


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
