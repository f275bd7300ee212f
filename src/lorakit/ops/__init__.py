"""Tensor maths of LoRA: pure functions on tensors, which know of no module and no file.

The specification of a forward is `lora_reference`; `lora_add` and `lora_linear` equal it and cost less.
Where each sample of a batch has its own adapter, it is `lora_grouped_reference` and `lora_grouped`.
"""

from __future__ import annotations

from lorakit.ops.bank import Bank
from lorakit.ops.finite import is_finite
from lorakit.ops.fused import lora_add, lora_linear
from lorakit.ops.grouped import lora_grouped
from lorakit.ops.grouped_reference import lora_grouped_reference
from lorakit.ops.groups import Groups
from lorakit.ops.merge import MergeInPlace, merge_delta, tile_rows
from lorakit.ops.norms import delta_bound, frobenius_norm
from lorakit.ops.reference import lora_reference
from lorakit.ops.terms import Term

__all__ = [
    "Bank",
    "Groups",
    "MergeInPlace",
    "Term",
    "delta_bound",
    "frobenius_norm",
    "is_finite",
    "lora_add",
    "lora_grouped",
    "lora_grouped_reference",
    "lora_linear",
    "lora_reference",
    "merge_delta",
    "tile_rows",
]
