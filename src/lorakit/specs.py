"""The rows of a plan: what an adapter puts on one weight of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorakit.layouts import Layout

FILE_NAMES = {
    "": {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}
"""The names of factors in a file, below the module, by kind of layer; "" is any other kind."""
FACTOR_OF = {name: part for names in FILE_NAMES.values() for part, name in names.items()}
"""Which factor is called so."""
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # noqa: S105 - a name, not a secret
"""The name of token rows in a file, below the module."""


def scaling_of(r: int, alpha: float, *, rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` under rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(r) if rslora else r)


def adapter_dtype(base: torch.dtype, *, widen: bool) -> torch.dtype:
    """The dtype of an adapter's parameters on a weight of some dtype: fp32 on half precisions if `widen`."""
    return torch.float32 if widen and base in {torch.float16, torch.bfloat16} else base


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One row of a plan: what an adapter puts on one weight.

    Attributes:
        path: dotted path of the module inside the model; of the parameter, where the adapter is on a bare one.
        kind: name of the layer type, such as "linear" or "conv2d".
        layout: shapes of the base weight and of the factors.
        r: rank.
        lora_alpha: numerator of the scaling.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732).
        dropout: probability of zeroing an element of the adapter's input in training.
        lora_bias: whether B has a bias.
        init: name of the initialiser in the registry.
        dtype: dtype of the adapter's parameters.
        device: where the base weight lives.
        tied_to: path of the embedding whose factors, transposed, are also this layer's; None for own factors.
    """

    path: str
    kind: str
    layout: Layout
    r: int
    lora_alpha: float
    scaling: float
    dropout: float
    lora_bias: bool
    init: str
    dtype: torch.dtype
    device: torch.device
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base weight, or of one expert's."""
        return self.layout.shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's own tensors here: "A", "B" and, under `lora_bias`, "bias"."""
        A, B = self.layout.factor_shapes(self.r)
        found = {"A": A, "B": B}
        return {**found, "bias": (self.layout.out,)} if self.lora_bias else found

    @property
    def file_names(self) -> dict[str, str]:
        """The names of those tensors in a file, below the module."""
        names = FILE_NAMES.get(self.kind, FILE_NAMES[""])
        return {part: names[part] for part in self.shapes}

    @property
    def parameters(self) -> int:
        """How many parameters the adapter adds here; none where they are another layer's."""
        return 0 if self.tied_to else sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """How many bytes those parameters take."""
        return self.parameters * self.dtype.itemsize
