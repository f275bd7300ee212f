"""The config classes as users get them: able to read from the hub, which floor 0 does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.hub import resolve_adapter
from lorakit.config import LoraConfig, PeftConfig, set_resolver

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["LoraConfig", "PeftConfig"]


def _resolve(repo_id: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    return resolve_adapter(repo_id, subfolder=subfolder, config_only=True, **options)


set_resolver(_resolve)
