"""Room for adapters to come, made before a model is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.errors import AdapterStateError, ConfigError, bullet_list
from lorakit.hotswap.exchange import all_or_nothing, enlarge, match_sizes, quietly
from lorakit.padding import FACTORS, fitted, rank_of
from lorakit.state_dict import registry_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for other adapters, so that swapping them in compiles nothing again.

    Every adapter that is on the model now gets parameters of rank `target_rank`, filled up with zeros, and its scalings
    become 0-d tensors (in fp64, so that nothing is rounded). What the model computes and what is saved stays the same.
    Gradients are dropped, and an optimiser should be made afterwards. `load_adapter(replace=True)` makes an adapter an
    ordinary one again.

    Args:
        model: a `PeftModel` or a model that adapters were injected into, on its device and not yet compiled.
        target_rank: the largest rank among the adapters to come; None leaves the parameters as they are.
        config: configs of adapters to come, whose `r` and `rank_pattern` become `target_rank`. One of an adapter that is
            on the model is left alone: it says what that adapter is, not what it has room for.
        check_compiled: what to do if the model is compiled already, which means that it is compiled again.

    Raises:
        AdapterNameError: the model carries no adapter.
        AdapterStateError: the model is compiled, or an adapter's rank is larger than `target_rank`, or it is more than
            plain LoRA.
        ConfigError: an argument is not what it should be. Nothing was changed after any of these.
    """
    registry, _ = registry_of(model)
    _check_arguments(target_rank, check_compiled)
    to_come = _to_come(registry, config)
    places = [
        (path, layer, name)
        for path, layer in registry.layers.items()
        for name in layer.adapters
        if name in layer.r
    ]
    if target_rank is not None:
        _check_rank(places, target_rank)
    _check_not_compiled(model, check_compiled)
    adapters = [(layer, name) for _, layer, name in places]
    held = [parameter for layer, name in adapters for parameter in layer.parameters_of(name)]
    with quietly(held), all_or_nothing(adapters) as undo:
        for layer, name in adapters:
            _make_room(layer, name, target_rank, undo)
        match_sizes(adapters)
        if target_rank is not None:
            for item in to_come:
                item.r, item.rank_pattern = target_rank, dict.fromkeys(item.rank_pattern, target_rank)


def _check_arguments(target_rank: object, check_compiled: object) -> None:
    if target_rank is not None and (type(target_rank) is not int or target_rank < 1):
        raise ConfigError(f"target_rank: got {target_rank!r}, wanted a positive integer or None")
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled: got {check_compiled!r}, wanted 'error', 'warn' or 'ignore'")


def _to_come(registry: AdapterRegistry, config: object) -> list[LoraConfig]:
    given: list[Any] = (
        list(config.values()) if isinstance(config, Mapping) else [] if config is None else [config]
    )
    wrong = [type(item).__name__ for item in given if not isinstance(item, LoraConfig)]
    if wrong:
        raise ConfigError(f"config: got {wrong}, wanted a LoraConfig or a dict of them")
    live = {id(item) for item in registry.configs.values()}
    return [item for item in given if id(item) not in live]


def _check_rank(places: Sequence[tuple[str, LoraLayer, str]], rank: int) -> None:
    problems = []
    for path, layer, name in places:
        if layer.r[name] > rank:
            problems.append(f"{path}: adapter {name!r} has rank {layer.r[name]}")
        if name in layer.variants:
            problems.append(
                f"{path}: adapter {name!r} is {layer.variants[name].name}, which cannot be exchanged in place"
            )
        if rank % layer.layout.groups:
            problems.append(f"{path}: a rank must be divisible by the {layer.layout.groups} groups there")
    if problems:
        raise AdapterStateError(bullet_list(f"there cannot be room for rank {rank} alone", problems))


def _check_not_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled == "ignore" or not is_compiled(model):
        return
    text = (
        "this model is compiled already and would be compiled again; make room for adapters before compiling"
    )
    if check_compiled == "error":
        raise AdapterStateError(text)
    warnings.warn(text, stacklevel=3)


def _make_room(layer: LoraLayer, name: str, rank: int | None, undo: Any) -> None:
    """Enlarge an adapter's factors on a layer, and let its settings be such that a graph need not know them."""
    for item in layer.tensors(name):
        factor = FACTORS.get(item.file_suffix)
        if rank is None or factor is None or not item.state_suffix:
            continue
        if 0 < rank_of(layer.layout, factor, item.tensor) < rank:
            enlarge(item.tensor, fitted(layer.layout, factor, item.tensor, rank), undo)
    if not isinstance(layer.scaling[name], torch.Tensor):
        device = layer.stored(name).B.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.inference_mode(mode=False):  # so that it can be written to anywhere
            layer.scaling[name] = torch.tensor(layer.scaling[name], dtype=dtype, device=device)
    if not isinstance(layer.lora_dropout[name], nn.Dropout):
        layer.lora_dropout[name] = nn.Dropout(0.0).train(layer.training)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or one that it wraps, was compiled."""
    inner: nn.Module | None = model
    while inner is not None:
        if inner._modules.get("_orig_mod") is not None or inner._compiled_call_impl is not None:
            return True
        inner = inner._modules.get("base_model") or inner._modules.get("model")
    return False
