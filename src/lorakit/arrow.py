"""`create_arrow_model`: several saved adapters on one model, and a router that chooses among them for each token."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, PlanError
from lorakit.layers import Linear
from lorakit.layers.varied import plain_on
from lorakit.peft_model import PeftModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from lorakit.config import ArrowConfig
    from lorakit.surgery import AdapterRegistry

ROUTER = "arrow_router"
"""The adapter that routes."""


class _Source(NamedTuple):
    """Where one adapter is."""

    model_id: str
    subfolder: str | None

    @staticmethod
    def of(path: str | os.PathLike[str]) -> _Source:
        """A local folder, or "user/repository", or "user/repository/a/folder/in/it"."""
        name = os.fspath(path)
        parts = name.rstrip("/").split("/")
        is_local = Path(name).exists() or parts[0] in {"", ".", "..", "~"}
        if is_local or len(parts) < 3:
            return _Source(name, None)
        return _Source("/".join(parts[:2]), "/".join(parts[2:]))


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters onto a model, and route each token through the `top_k` that fit it best.

    The adapters are loaded as "task_0", "task_1" ... and "gks_0" ..., the router is "arrow_router" and active. It has
    nothing to train. A plain adapter that is added later is chosen from too, and one that is deleted no more. The
    adapters stay what they are: under `use_gks` the mean of the general ones is taken off where the router computes.

    Args:
        base_model: without adapters; changed in place.
        task_specific_adapter_paths: folders, or hub repositories with a folder behind their name, of plain LoRA
            adapters for the same linear layers; their ranks may differ.
        arrow_config: how to route; it is copied, not changed.
        general_adapter_paths: adapters of general knowledge, needed under `use_gks` and of the rank of the others.
        **adapter_kwargs: as of `PeftModel.from_pretrained`, for every adapter.

    Returns:
        The model with the router active.

    Raises:
        ConfigError: no adapters to choose from, or `use_gks` and `general_adapter_paths` do not go together.
        PlanError: the adapters do not go together; lists every reason.
        As `PeftModel.load_adapter`. The model is as it was.

    Source: Ostapenko et al., 2024, arXiv:2405.11157; GenKnowSub: arXiv:2505.10939.
    """
    general = general_adapter_paths or ()
    if not task_specific_adapter_paths:
        raise ConfigError("task_specific_adapter_paths: got none, wanted at least one adapter to choose from")
    if arrow_config.use_gks and not general:
        raise ConfigError("general_adapter_paths: got none, and arrow_config.use_gks=True needs at least one")
    if general and not arrow_config.use_gks:
        raise ConfigError(
            "general_adapter_paths: given, but arrow_config.use_gks is False; set it, or leave them out"
        )
    tasks = {f"task_{number}": _Source.of(path) for number, path in enumerate(task_specific_adapter_paths)}
    generals = {f"gks_{number}": _Source.of(path) for number, path in enumerate(general)}
    options = replace(arrow_config, task_adapter_names=[*tasks], gks_adapter_names=[*generals])
    modes = {module: module.training for module in base_model.modules()}
    model: PeftModel | None = None
    try:
        for name, source in {**tasks, **generals}.items():
            found = {"subfolder": source.subfolder, **adapter_kwargs} if source.subfolder else adapter_kwargs
            if model is None:
                model = PeftModel.from_pretrained(base_model, source.model_id, name, **found)
            else:
                model.load_adapter(source.model_id, name, **found)
        assert model is not None
        _route(model, options)
    except BaseException:
        if model is not None:
            model.unload()
            for module, training in modes.items():
                module.training = training
        raise
    return model


def _route(model: PeftModel, options: ArrowConfig) -> None:
    """Put the router on the layers that all adapters are on, and make it active."""
    registry = model.base_model.registry
    problems = [*_problems(registry), *_rank_problems(registry, options)]
    if options.top_k > len(options.task_adapter_names or ()):
        problems.append(
            f"arrow_config.top_k: got {options.top_k}, and there are {options.task_adapter_names} to choose from"
        )
    if problems:
        raise PlanError(problems)
    first = next(iter(registry.configs.values()))
    config = LoraConfig(
        task_type=first.task_type,
        r=first.r,
        target_modules=first.target_modules,
        exclude_modules=first.exclude_modules,
        layers_to_transform=first.layers_to_transform,
        layers_pattern=first.layers_pattern,
        fan_in_fan_out=first.fan_in_fan_out,
        arrow_config=options,
    )
    model.add_adapter(ROUTER, config)
    model.set_adapter(ROUTER)


def _problems(registry: AdapterRegistry) -> Iterator[str]:
    """Why some adapters cannot be chosen from."""
    paths = {
        name: {p for p, layer in registry.layers.items() if name in layer.r} for name in registry.configs
    }
    first, wanted = next(iter(paths.items()))
    for name, mine in paths.items():
        if mine != wanted:
            more, fewer = sorted(mine - wanted), sorted(wanted - mine)
            yield f"{name}: is on other modules than {first}: also on {more[:3]}, not on {fewer[:3]}"
        more_than_factors = sorted(
            {
                *(path for path, wrapper in registry.saved.items() if name in wrapper.adapters),
                *(parameter for parameter, slot in registry.slots.items() if name in slot.adapters),
                *(
                    path
                    for path in registry.layers
                    if name in registry.layers[path].adapters and path not in mine
                ),
            }
        )
        if more_than_factors:
            yield f"{name}: trained {more_than_factors[:3]} whole, which cannot be chosen for each token"
        for path in sorted(mine):
            layer = registry.layers[path]
            if not isinstance(layer, Linear):
                yield f"{path}: {name} is on a {type(layer.get_base_layer()).__name__}; Arrow routes linear layers"
            elif name not in plain_on(layer) or layer.lora_bias[name] or layer.token_adapter is not None:
                yield f"{path}: {name} is more than plain LoRA there; Arrow chooses among plain products"


def _rank_problems(registry: AdapterRegistry, options: ArrowConfig) -> Iterator[str]:
    """Where general adapters have not the rank of those that their mean is taken off."""
    if not options.use_gks:
        return
    for path, layer in registry.layers.items():
        if len(set(layer.r.values())) > 1:
            yield f"{path}: general adapters are taken off adapters of their rank, and ranks are {layer.r}"
