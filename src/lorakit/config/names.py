"""Names with a fixed meaning: task types, PEFT types, and the rule for adapter names.

An accepted adapter name is a safe folder name, a legal key of `nn.ModuleDict` and `nn.ParameterDict`, and holds
no dot, so it cannot be mistaken for a part of a module path.
"""

from __future__ import annotations

import re
from enum import Enum

from torch import nn

from lorakit.errors import AdapterNameError

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())
_RESERVED = "__base__"


class TaskType(str, Enum):
    """What the adapted model is used for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105 - a task, not a secret
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


class PeftType(str, Enum):
    """The adapter family that a config describes; lorakit has LoRA alone."""

    LORA = "LORA"

    def __str__(self) -> str:
        return self.value


def check_adapter_name(name: object) -> None:
    """Accept or refuse the name of an adapter.

    Args:
        name: the name to check; whether it is already taken is the caller's question.

    Raises:
        AdapterNameError: it is not 1 to 64 of `A-Z a-z 0-9 _ -`, it is `__base__`, or it is an attribute of the
            torch containers that hold the adapters, such as `keys`, `training` or `forward`.
    """
    if not isinstance(name, str):
        raise AdapterNameError(f"adapter name: got {name!r} ({type(name).__name__}), wanted a string")
    if not _ADAPTER_NAME.fullmatch(name):
        raise AdapterNameError(
            f"adapter name: got {name[:80]!r}, wanted 1 to 64 characters out of A-Z, a-z, 0-9, '_' and '-'"
        )
    if name == _RESERVED:
        raise AdapterNameError(f"adapter name: {name!r} stands for the base model; choose another name")
    if any(hasattr(container, name) for container in _CONTAINERS):
        raise AdapterNameError(
            f"adapter name: {name!r} is an attribute of the torch containers that hold adapters; choose another name"
        )
