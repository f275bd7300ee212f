"""How many bytes an optimizer keeps for the parameters that it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

_BLOCK, _SMALLEST = 256, 4096  # bitsandbytes: numbers that share a scale; below this size states stay fp32


def _moments(count: int) -> Callable[[Tensor], int]:
    return lambda parameter: count * parameter.nbytes


def _eight_bit(parameter: Tensor) -> int:
    numbers = parameter.numel()
    if numbers < _SMALLEST:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * math.ceil(numbers / _BLOCK))


def _factored(parameter: Tensor) -> int:
    if parameter.dim() < 2:
        return 4 * parameter.numel()
    *rest, rows, columns = parameter.shape
    return 4 * math.prod(rest) * (rows + columns)


STATES: Mapping[str, Callable[[Tensor], int]] = {
    "adamw": _moments(2),
    "adamw_8bit": _eight_bit,
    "adafactor": _factored,
    "lion": _moments(1),
    "sgd": _moments(0),
    "sgd_momentum": _moments(1),
}
"""Bytes of state for one parameter, by optimizer: moments in the parameter's dtype; of bitsandbytes' 8-bit AdamW one byte
each and a scale for 256; of Adafactor rows and columns (Shazeer & Stern, 2018, arXiv:1804.04235)."""


def state_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """What an optimizer keeps for `parameters`, in bytes.

    Raises:
        ConfigError: nothing is known of this optimizer.
    """
    if optimizer not in STATES:
        raise ConfigError(f"optimizer: got {optimizer!r}, wanted one of {', '.join(map(repr, STATES))}")
    return sum(map(STATES[optimizer], parameters))
