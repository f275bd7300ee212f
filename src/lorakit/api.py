"""The functions that put adapters on a model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.config import LoraConfig, check_adapter_name
from lorakit.errors import AdapterStateError, UnsupportedError
from lorakit.later import Later
from lorakit.putting import prepare_config, put_on
from lorakit.tasks import PeftModel
from lorakit.tuner import check_bare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lorakit import loading, surgery
    from lorakit.surgery import Plan
else:
    loading = Later("lorakit.loading", globals())
    surgery = Later("lorakit.surgery", globals())


def plan(model: nn.Module, config: LoraConfig, *, autocast_adapter_dtype: bool = True) -> Plan:
    """What `get_peft_model` would put on `model`: which modules, shapes, parameters, bytes. Touches nothing.

    Raises:
        ConfigError, UnsupportedError, PlanError: what `get_peft_model` would raise.
    """
    inner = find_inner(model)
    return surgery.make_plan(
        inner, prepare_config(inner, config), autocast_adapter_dtype=autocast_adapter_dtype
    )


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new LoRA adapter on `model` and wrap it; its parameters are the only trainable ones then.

    Args:
        model: any module without adapters; changed in place (`unload()` undoes it).
        peft_config: what to put where; copied, not kept.
        adapter_name: up to 64 letters, digits, "_" and "-".
        mixed: must be False: lorakit has one kind of adapter.
        autocast_adapter_dtype: keep adapters of a half-precision base in fp32.
        revision: of the base model, recorded in the config.
        low_cpu_mem_usage: attaching is lean with and without it. As in PEFT it goes with `init_lora_weights="eva"`:
            without it a warning says that `initialize_lora_eva_weights` must follow.

    Returns:
        The `PeftModel` subclass for `peft_config.task_type`.

    Raises:
        ConfigError, UnsupportedError, PlanError, AdapterNameError, AdapterStateError: the model was not touched.
    """
    if mixed:
        raise UnsupportedError("mixed=True: lorakit has LoRA adapters only, which combine without it")
    if isinstance(model, PeftModel):
        raise AdapterStateError("this is a PeftModel already; call its add_adapter() to add another adapter")
    check_bare(model)
    if revision is not None and isinstance(peft_config, LoraConfig):
        peft_config = replace(peft_config, revision=revision)
    if (
        isinstance(peft_config, LoraConfig)
        and peft_config.init_lora_weights == "eva"
        and not low_cpu_mem_usage
    ):
        warnings.warn(
            "init_lora_weights='eva': the adapter begins as a plain one until initialize_lora_eva_weights(model, "
            "dataloader) is called; low_cpu_mem_usage=True says that you know",
            stacklevel=2,
        )
    registry = put_on(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    return PeftModel.of(registry)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,  # noqa: ARG001 - the signature users know
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on `model` without wrapping it, and make it active. Returns `model`.

    Args:
        peft_config: what to put where; copied, not kept.
        model: any module; may carry other adapters.
        adapter_name: a free name.
        low_cpu_mem_usage: accepted; attaching never builds anything twice.
        state_dict: the adapter's tensors, by module path ("layers.0.q_proj.lora_A.weight"); no initialiser
            runs then.

    Raises:
        ConfigError, UnsupportedError, PlanError, AdapterNameError, KeyMismatchError: the model was not touched.
    """
    if isinstance(model, PeftModel):
        raise AdapterStateError("this is a PeftModel already; call its add_adapter() to add another adapter")
    if state_dict is None:
        registry = put_on(model, peft_config, adapter_name)
    else:
        check_adapter_name(adapter_name)
        registry = loading.attach_tensors(model, prepare_config(model, peft_config), adapter_name, state_dict)
    registry.set_active([adapter_name], inference_mode=peft_config.inference_mode)
    return model


def find_inner(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or `model`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
