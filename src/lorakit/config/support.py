"""What a config may say and lorakit cannot do yet: refused by name when an adapter is attached or loaded.

A config with such a field can still be built, read, inspected and written back; `check_supported` is asked by the
code that would act on it. No field is ignored.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from lorakit.errors import UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.config.lora import LoraConfig

NOT_YET: dict[str, str] = {
    "megatron_config": "Megatron layers are not available; leave it None",
    "runtime_config": "ephemeral GPU offload is not available; leave ephemeral_gpu_offload False",
}

_READ_BY = {
    "loftq_config": "loftq",
    "eva_config": "eva",
    "corda_config": "corda",
    "lora_ga_config": "lora_ga",
}
_CHANGES_BASE = frozenset({"pissa", "olora", "corda", "lora_ga"})


def check_supported(config: LoraConfig, *, loading: bool = False) -> None:
    """Refuse a config that asks for something lorakit does not do.

    Args:
        config: a valid config.
        loading: the weights come from a file, so that no initialiser runs and its settings do not matter. A file that
            PEFT wrote of a scheme that changes the base weight (PiSSA, OLoRA, CorDA, LoRA-GA) is refused: it fits a base
            that is not there.

    Raises:
        UnsupportedError: names every such field, its value and what to do instead.
    """
    found = [_raw(config)] if loading else list(_unread(config))
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    for name, reason in NOT_YET.items():
        value = getattr(config, name)
        if not _same(value, defaults[name]):
            found.append(f"{name}={value!r}: {reason}")
    lines = [line for line in found if line]
    if lines:
        raise UnsupportedError(bullet_list("the config asks for what lorakit cannot do", lines))


def _same(value: Any, default: Any) -> bool:
    return bool(value == default) or (default is None and value in ([], {}))


def _raw(config: LoraConfig) -> str:
    """Why a file of this config cannot be loaded, as far as its initialiser goes; or an empty text."""
    if str(config.init_lora_weights).partition("_niter_")[0] not in _CHANGES_BASE:
        return ""
    return (
        f"init_lora_weights={config.init_lora_weights!r}: the adapter was saved without being converted, so it belongs "
        "to a base whose weights this scheme changed, not to the original base; save it again as a plain LoRA, which "
        "lorakit does by itself, and PEFT with path_initial_model_for_weight_conversion"
    )


def _unread(config: LoraConfig) -> Iterator[str]:
    """Settings that the initialiser does not read."""
    for name, scheme in _READ_BY.items():
        if getattr(config, name) and config.init_lora_weights != scheme:
            yield (
                f"{name}={getattr(config, name)!r}: only init_lora_weights={scheme!r} reads it, and this config has "
                f"{config.init_lora_weights!r}; leave it out, or ask for that scheme"
            )
