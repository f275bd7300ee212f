"""Whether a parameter may be written into without anybody else noticing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

_OWN = 2  # the parameter, and the Python object of its storage


def is_owned_alone(weight: nn.Parameter) -> bool:
    """Whether a write into a parameter changes no other tensor.

    False where one lies in its memory (a state dict that somebody keeps, a NumPy array, a buffer that it is a view of),
    where other processes see that memory, and of tensors made in inference mode, which torch lets nobody write into.
    That modules share the parameter object is not seen here.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or weight.is_inference() or (weight.device.type == "cpu" and weight.is_shared()):
        return False
    return bool(count(weight.untyped_storage()._cdata) <= _OWN)
