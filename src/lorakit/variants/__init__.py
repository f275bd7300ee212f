"""Floor 3: adapters that are more than `y + scaling * B(A(x))`. One file each, behind one contract."""

from lorakit.variants.registry import VARIANTS, variant_of
from lorakit.variants.variant import Call, Effect, Held, Start, Variant

__all__ = [
    "VARIANTS",
    "Call",
    "Effect",
    "Held",
    "Start",
    "Variant",
    "variant_of",
]
