"""Which variant a config asks for. A new one is one file and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import UnsupportedError
from lorakit.variants import alora, arrow, bdlora, dora, kasa, monteclora, qalora, velora

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.config import LoraConfig
    from lorakit.variants.variant import Variant

VARIANTS: tuple[Callable[[LoraConfig], Variant | None], ...] = (
    dora.from_config,
    alora.from_config,
    arrow.from_config,
    velora.from_config,
    kasa.from_config,
    bdlora.from_config,
    qalora.from_config,
    monteclora.from_config,
)
"""Each gives the variant where the config asks for it, else None."""


def variant_of(config: LoraConfig) -> Variant | None:
    """The variant that a config asks for; None for plain LoRA.

    Raises:
        UnsupportedError: it asks for several.
    """
    found = [variant for variant in (make(config) for make in VARIANTS) if variant is not None]
    if len(found) > 1:
        fields = [variant.field for variant in found]
        raise UnsupportedError(f"{fields} ask for different kinds of adapter; set one of them")
    return found[0] if found else None
