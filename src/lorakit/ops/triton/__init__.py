"""GPU kernels under the names of the ops. Nothing imports this package before a tensor on a GPU asks for it."""

from __future__ import annotations

from lorakit.ops.triton.grouped import add_grouped_, lora_grouped

__all__ = ["add_grouped_", "lora_grouped"]
