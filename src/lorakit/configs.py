"""The config classes as users get them: able to read from the hub, which floor 0 does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.config import LoraConfig, PeftConfig, set_resolver
from lorakit.later import Later

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorakit.checkpoint import hub
else:
    hub = Later("lorakit.checkpoint.hub", globals())

__all__ = ["LoraConfig", "PeftConfig"]


def _resolve(repo_id: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    return hub.resolve_adapter(repo_id, subfolder=subfolder, config_only=True, **options)


set_resolver(_resolve)
