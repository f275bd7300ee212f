"""Putting a new adapter on a model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.config import LoraConfig, check_adapter_name
from lorakit.errors import ConfigError
from lorakit.later import Later

if TYPE_CHECKING:
    from torch import nn

    from lorakit import surgery
    from lorakit.surgery import AdapterRegistry, targets
else:
    surgery = Later("lorakit.surgery", globals())
    targets = Later("lorakit.surgery.targets", globals())


def prepare_config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config as it will be stored: with the task's head in `modules_to_save` and the base's name.

    Raises:
        ConfigError: `config` is no `LoraConfig`.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"expected a LoraConfig, got {type(config).__name__}")
    heads = targets.IMPLICIT_HEADS.get(config.task_type or "", ())
    extra = [head for head in heads if head not in (config.modules_to_save or ())]
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    return replace(
        config,
        modules_to_save=[*(config.modules_to_save or ()), *extra] or config.modules_to_save,
        base_model_name_or_path=name or None,
    )


def put_on(
    model: nn.Module, config: LoraConfig, name: str, *, autocast_adapter_dtype: bool = True
) -> AdapterRegistry:
    """Plan a new adapter and attach it; the first one becomes active.

    Raises:
        ConfigError, UnsupportedError, PlanError, AdapterNameError: the model was not touched.
    """
    check_adapter_name(name)
    prepared = prepare_config(model, config)
    plan = surgery.make_plan(model, prepared, autocast_adapter_dtype=autocast_adapter_dtype)
    registry = surgery.attach(model, plan, name)
    surgery.use_up_gathered(plan)
    if len(registry.configs) == 1:
        registry.set_active([name], inference_mode=prepared.inference_mode)
    return registry
