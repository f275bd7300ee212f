"""What a config may say and lorakit cannot do yet: refused by name when an adapter is attached or loaded.

A config with such a field can still be built, read, inspected and written back; `check_supported` is asked by the
code that would act on it. No field is ignored.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from lorakit.errors import UnsupportedError, bullet_list

if TYPE_CHECKING:
    from lorakit.config.lora import LoraConfig

_PLAIN_INIT = "use init_lora_weights=True, False, 'gaussian' or 'orthogonal'"
_OTHER_INIT = f"it is read by an initialiser that is not available; leave it out and {_PLAIN_INIT}"

NOT_YET: dict[str, str] = {
    "init_lora_weights=pissa": _PLAIN_INIT,
    "init_lora_weights=olora": _PLAIN_INIT,
    "init_lora_weights=corda": _PLAIN_INIT,
    "init_lora_weights=lora_ga": _PLAIN_INIT,
    "init_lora_weights=loftq": _PLAIN_INIT,
    "init_lora_weights=mica": _PLAIN_INIT,
    "loftq_config": _OTHER_INIT,
    "corda_config": _OTHER_INIT,
    "lora_ga_config": _OTHER_INIT,
    "megatron_config": "Megatron layers are not available; leave it None",
    "runtime_config": "ephemeral GPU offload is not available; leave ephemeral_gpu_offload False",
}

_INIT_ONLY = frozenset({"loftq_config", "eva_config", "corda_config", "lora_ga_config"})
_CHANGES_BASE = frozenset({"pissa", "olora", "corda", "lora_ga"})


def check_supported(config: LoraConfig, *, loading: bool = False) -> None:
    """Refuse a config that asks for something lorakit does not do.

    Args:
        config: a valid config.
        loading: the weights come from a file, so that no initialiser runs and its settings do not matter. Schemes
            that change the base weight (PiSSA, OLoRA, CorDA, LoRA-GA) stay refused: the file fits a base that is not
            there.

    Raises:
        UnsupportedError: names every such field, its value and what to do instead.
    """
    found = [_init_refusal(config, loading=loading)]
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    for name, reason in NOT_YET.items():
        if name not in defaults or (loading and name in _INIT_ONLY):
            continue
        value = getattr(config, name)
        if not _same(value, defaults[name]):
            found.append(f"{name}={value!r}: {reason}")
    lines = [line for line in found if line]
    if lines:
        raise UnsupportedError(bullet_list("the config asks for what lorakit cannot do", lines))


def _same(value: Any, default: Any) -> bool:
    return bool(value == default) or (default is None and value in ([], {}))


def _init_refusal(config: LoraConfig, *, loading: bool) -> str:
    scheme = str(config.init_lora_weights).partition("_niter_")[0]
    reason = NOT_YET.get(f"init_lora_weights={scheme}", "")
    if loading and scheme in _CHANGES_BASE:
        reason = (
            "the adapter was saved without being converted, so it belongs to a base whose weights this scheme "
            "changed, not to the original base; save it again as a plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    elif loading:
        reason = ""
    return reason and f"init_lora_weights={config.init_lora_weights!r}: {reason}"
