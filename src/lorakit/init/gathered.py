"""What a run over data found out for the adapters that are to come, kept on the modules until one begins from it.

It is kept in a module's own dictionary, not as a parameter or buffer: no state dict has it, a deep copy of the model
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

    from lorakit.layouts import Layout

_ATTRIBUTE = "_lorakit_gathered"

PREPARED_BY = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}
"""The schemes that begin from such findings, and what makes them."""


class Gathered(Protocol):
    """The findings of one scheme for one linear layer."""

    @property
    def lasting(self) -> bool:
        """Whether they stay after an adapter has begun from them."""

    def why_not(self, layout: Layout, r: int) -> str:
        """Why an adapter of rank r on this weight cannot begin from them, or an empty text."""


def keep(module: nn.Module, scheme: str, found: Gathered) -> None:
    """Keep findings for a scheme, in the place of earlier ones."""
    module.__dict__.setdefault(_ATTRIBUTE, {})[scheme] = found


def gathered(module: nn.Module, scheme: str) -> Gathered | None:
    """What was kept for a scheme, or None."""
    found: Gathered | None = module.__dict__.get(_ATTRIBUTE, {}).get(scheme)
    return found


def use_up(module: nn.Module, scheme: str) -> None:
    """Drop what was kept for a scheme, unless it is lasting."""
    kept = module.__dict__.get(_ATTRIBUTE, {})
    if scheme in kept and not kept[scheme].lasting:
        del kept[scheme]
        if not kept:
            del module.__dict__[_ATTRIBUTE]


def why_not_from_data(module: nn.Module | None, scheme: str, layout: Layout, r: int) -> str:
    """Why a scheme that begins from data cannot begin on a linear layer, or an empty text.

    Args:
        module: the linear layer; None for any other weight.
        scheme: one of `PREPARED_BY`.
        layout: of its weight.
        r: the rank wanted.
    """
    if module is None:
        return (
            f"init_lora_weights={scheme!r} begins linear layers only; leave this one out with exclude_modules"
        )
    found = gathered(module, scheme)
    if found is None:
        return (
            f"init_lora_weights={scheme!r} begins from data, and nothing was gathered for this layer; call "
            f"{PREPARED_BY[scheme]}(model, config, ...) first, with this model and this config"
        )
    return found.why_not(layout, r)
