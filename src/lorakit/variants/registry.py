"""Which variant a config asks for. A new one is one file and one row here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lorakit.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorakit.config import LoraConfig
    from lorakit.variants.variant import Variant

VARIANTS: Mapping[str, str] = {
    "use_dora": "dora",
    "alora_invocation_tokens": "alora",
    "arrow_config": "arrow",
    "velora_config": "velora",
    "kasa_config": "kasa",
    "use_bdlora": "bdlora",
    "use_qalora": "qalora",
    "monteclora_config": "monteclora",
}
"""The file of each, by the field of the config that asks for it; its `from_config` gives the variant, or None."""


def variant_of(config: LoraConfig) -> Variant | None:
    """The variant that a config asks for; None for plain LoRA.

    Raises:
        UnsupportedError: it asks for several.
    """
    asked = [file for field, file in VARIANTS.items() if getattr(config, field)]
    made = [import_module(f"lorakit.variants.{file}").from_config(config) for file in asked]
    found: list[Variant] = [variant for variant in made if variant is not None]
    if len(found) > 1:
        fields = [variant.field for variant in found]
        raise UnsupportedError(f"{fields} ask for different kinds of adapter; set one of them")
    return found[0] if found else None
