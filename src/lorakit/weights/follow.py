"""Parameters that wait outside the module tree, where `model.to(...)` does not reach them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def follow(waiting: nn.Parameter, acting: Tensor) -> None:
    """Bring a waiting parameter to the device and dtype that the one in its place was moved to meanwhile.

    Nothing happens, and its bits stay, where the model was not moved. A weight offloaded to meta moves nobody.
    """
    if not acting.is_meta and (waiting.device, waiting.dtype) != (acting.device, acting.dtype):
        waiting.data = waiting.data.to(acting.device, acting.dtype)
