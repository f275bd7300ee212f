"""What the optimizers check before they touch a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorakit.errors import AdapterStateError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.surgery import AdapterRegistry


def check_number(name: str, value: float, *, least: float = 0.0, above: bool = False) -> None:
    """Refuse what is no finite number from `least` on, or `above` it.

    Raises:
        TypeError: it is no number.
        ConfigError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got a {type(value).__name__}, wanted a number")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ConfigError(f"{name}: got {value!r}, wanted a finite number {'>' if above else '>='} {least:g}")


def trained_of(registry: AdapterRegistry) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each adapter that has some.

    Raises:
        AdapterStateError: no adapter has any.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name in registry.configs:
        own = [
            item.tensor for item in registry.tensors(name) if item.state_name and item.tensor.requires_grad
        ]
        if own:
            found[name] = own  # type: ignore[assignment]  # under names of the state dict there are parameters only
    if not found:
        raise AdapterStateError(
            f"none of the adapters {list(registry.configs)} is trainable; make one so with set_adapter(), or load it "
            "with is_trainable=True"
        )
    return found
