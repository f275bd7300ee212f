"""Giving an adapter that is on a model what EVA found: A, ranks and alphas. All of it, or nothing."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.calibration.eva import (
    eva_layers,
    forward_fn_dict,
    get_eva_state_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from lorakit.config import EvaConfig
from lorakit.errors import ConfigError, KeyMismatchError, NonFiniteError
from lorakit.fitting import with_ties_as_found, without_absent_ties
from lorakit.layers import ParamWrapper, attention_parts
from lorakit.loading import put_in_place
from lorakit.ops import is_finite
from lorakit.specs import FILE_NAMES
from lorakit.state_dict import registry_of
from lorakit.surgery import describe, make_plan
from lorakit.surgery.naming import names_in_file
from lorakit.surgery.paths import joined
from lorakit.surgery.targets import shortest_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from lorakit.calibration.eva import PrepareLayer
    from lorakit.config import LoraConfig
    from lorakit.surgery import AdapterRegistry, Description


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer
    | Mapping[str, PrepareLayer]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Begin an adapter by EVA (Paischer et al., 2024, arXiv:2410.07170): A from the data, B zero, ranks spread.

    The adapter gets new parameters and, in its config, the layers, `rank_pattern` and `alpha_pattern` that say so;
    layers whose rank is 0 lose it. Make the optimiser afterwards.

    Args:
        model: a `PeftModel` whose adapter has `init_lora_weights="eva"`, or a model that it was injected into.
        dataloader: as for `get_eva_state_dict`; not looked at with `eva_state_dict`.
        eva_state_dict: what `get_eva_state_dict` gave, for this model with or without its wrappers.
        forward_fn: as for `get_eva_state_dict`, like all that follow.
        prepare_model_inputs_fn: see there.
        prepare_layer_inputs_fn: see there.
        adapter_name: which adapter.
        gather_distributed_inputs: see there.
        show_progress_bar: see there.

    Raises:
        ConfigError: the adapter is for another scheme; there is neither data nor a state dict; what
            `get_eva_state_dict` raises.
        AdapterNameError, AdapterStateError: no such adapter; or adapters are merged.
        KeyMismatchError: the state dict has tensors for layers that are not there, or of another shape.
        NonFiniteError: it holds NaN or infinity. After any of these the model is as it was.
    """
    registry, prefix = registry_of(model)
    registry.check_known([adapter_name])
    registry.check_unmerged("beginning an adapter anew")
    init = registry.configs[adapter_name].init_lora_weights
    if init != "eva":
        raise ConfigError(f"init_lora_weights: adapter {adapter_name!r} has {init!r}, wanted 'eva'")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader: None, and no eva_state_dict either; EVA needs one of the two")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {key.removeprefix(prefix): tensor for key, tensor in eva_state_dict.items()}
    layers = eva_layers(registry, adapter_name)
    _check(found, layers, registry)
    with torch.no_grad():
        _renew(registry, adapter_name, found)
    left = sorted({path for path, layer in registry.layers.items() if adapter_name in layer.r} - found.keys())
    if left:
        warnings.warn(
            f"EVA has nothing for {left}, which keep the start that they had; it begins linear layers that the "
            "forward calls",
            stacklevel=2,
        )


def _check(found: Mapping[str, Tensor], layers: Mapping[str, nn.Module], registry: AdapterRegistry) -> None:
    unexpected = sorted(found.keys() - layers.keys())
    wrong = []
    for path in found.keys() & layers.keys():
        shape, width = tuple(found[path].shape), registry.layers[path].layout.shape[1]
        if len(shape) != 2 or shape[1] != width:
            wrong.append(f"{path}: found {shape}, expected (rank, {width})")
    if unexpected or wrong:
        raise KeyMismatchError("eva_state_dict", unexpected=unexpected, mismatched=sorted(wrong))
    bad = [path for path, tensor in found.items() if not is_finite(tensor)]
    if bad:
        raise NonFiniteError(f"eva_state_dict: {bad} hold NaN or infinity")
    if layers and layers.keys() == found.keys() and not any(len(tensor) for tensor in found.values()):
        raise ConfigError("eva_state_dict: every rank is 0, which leaves no adapter")


class _Renewed(NamedTuple):
    """What an adapter is to be on the layers that keep it.

    Attributes:
        ranks: by the name that a config has for a module or a parameter.
        alphas: likewise.
        parameters: which of these names are of parameters.
        tensors: by file name, those of the former adapter among them.
    """

    ranks: dict[str, int]
    alphas: dict[str, float]
    parameters: set[str]
    tensors: dict[str, Tensor]


def _renew(registry: AdapterRegistry, name: str, found: Mapping[str, Tensor]) -> None:
    former = {item.file_name: item.tensor for item in registry.tensors(name)}
    description = describe(registry.model)
    new = _renewed(registry, name, found, description)
    config = _config(registry.configs[name], new, description)
    wide = not any(tensor.dtype in {torch.float16, torch.bfloat16} for tensor in former.values())
    plan = make_plan(registry.model, config, source="file", autocast_adapter_dtype=wide, replacing=name)
    slots = {key: slot for key, slot in registry.slots.items() if name in slot.copies}
    plan = replace(
        plan, base_weights=tuple(key for key, slot in slots.items() if name not in slot._trainable)
    )
    tensors = {**{key: tensor.detach() for key, tensor in former.items()}, **new.tensors}
    in_file = names_in_file(plan)  # a base parameter is called otherwise once its module carries no adapter
    tensors |= {in_file.parameter(key): slot.copies[name].detach() for key, slot in slots.items()}
    plan, tensors = with_ties_as_found(without_absent_ties(plan, tensors), tensors, "the model")
    flags = {key: tensor.requires_grad for key, tensor in former.items()}
    put_in_place(registry.model, plan, name, tensors)
    for item in registry.tensors(name):
        if item.tensor.is_leaf:
            item.tensor.requires_grad = flags.get(item.file_name, name in registry.active)


def _renewed(
    registry: AdapterRegistry, name: str, found: Mapping[str, Tensor], description: Description
) -> _Renewed:
    options = registry.configs[name].eva_config or EvaConfig()
    in_file, new = registry.names(name), _Renewed({}, {}, set(), {})
    for path, layer in registry.layers.items():
        start = found.get(path)
        if name not in layer.r or (start is not None and not len(start)):
            continue
        key = path
        if isinstance(layer, ParamWrapper):
            module = path.rpartition(".")[0]
            if attention_parts(description.nodes[module].module):
                key = module
            else:
                new.parameters.add(path)
        elif _in_attention(path, description):
            key = path.rpartition(".")[0]
        rank = layer.r[name] if start is None else len(start)
        grown = rank / layer.r[name] if options.adjust_scaling_factors else 1.0
        new.ranks[key], new.alphas[key] = rank, layer.lora_alpha[name] * grown
        if start is not None:
            own, names = layer.stored(name), FILE_NAMES[""]
            new.tensors[joined(in_file.layer(path), names["A"])] = start.to(own.A)
            new.tensors[joined(in_file.layer(path), names["B"])] = own.B.new_zeros(own.B.shape[0], rank)
    return new


def _in_attention(path: str, description: Description) -> bool:
    """Whether a layer is part of an attention module, which a config names in its stead."""
    owner = description.nodes.get(path.rpartition(".")[0])
    return owner is not None and path.rpartition(".")[2] in dict(attention_parts(owner.module))


def _config(config: LoraConfig, new: _Renewed, description: Description) -> LoraConfig:
    """A config that describes exactly the new adapter."""
    keys = {path: "^" + path.replace(".", r"\.") for path in new.ranks}
    return replace(
        config,
        target_modules=shortest_names(new.ranks.keys() - new.parameters, description.nodes),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={keys[path]: rank for path, rank in new.ranks.items() if rank != config.r},
        alpha_pattern={keys[path]: alpha for path, alpha in new.alphas.items() if alpha != config.lora_alpha},
    )
