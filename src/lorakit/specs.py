"""The rows of a plan: what an adapter puts on one weight of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorakit.layouts import Layout

FILE_NAMES = {
    "": {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
}
"""The names of factors in a file, below the module, by kind of layer; "" is any other kind."""
_WITHOUT_BIAS = {part: name for part, name in FILE_NAMES[""].items() if part != "bias"}
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


class PartName(NamedTuple):
    """What a tensor that an adapter has beside its factors is called.

    Attributes:
        holder: the attribute of a layer that holds it by adapter name, such as "lora_magnitude_vector".
        in_file: its name in a file, below the module.
        in_module: whether it belongs to a module there; parts with one holder share that module.
        attribute: what that module calls it.
    """

    holder: str
    in_file: str
    in_module: bool = False
    attribute: str = "weight"

    def state_suffix(self, adapter: str) -> str:
        """Its name below the layer in a state dict."""
        return f"{self.holder}.{adapter}" + (f".{self.attribute}" if self.in_module else "")


class PlannedVariant(Protocol):
    """What a plan knows of a variant; see `lorakit.variants.Variant`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def parts(self) -> Mapping[str, PartName]: ...  # noqa: D102

    @property
    def frozen(self) -> frozenset[str]: ...  # noqa: D102

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102


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
        variant: what the adapter is more than plain LoRA, or None.
        frozen: which of its tensors are never trained: "A", "B", or parts of the variant.
        init_options: what the config says of the scheme `init`, such as a `LoftQConfig`; None if it has no options.
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
    variant: PlannedVariant | None = None
    frozen: frozenset[str] = frozenset()
    init_options: object = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base weight, or of one expert's."""
        return self.layout.shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's own tensors here: "A", "B", under `lora_bias` "bias", and parts of its variant."""
        A, B = self.layout.factor_shapes(self.r)
        found: dict[str, tuple[int, ...]] = {"A": A, "B": B}
        if self.lora_bias:
            found["bias"] = (self.layout.out,)
        return (
            found
            if self.variant is None
            else {**found, **self.variant.shapes(self.path, self.layout, self.r)}
        )

    @property
    def file_names(self) -> dict[str, str]:
        """The names of those tensors in a file, below the module."""
        names = FILE_NAMES.get(self.kind, FILE_NAMES[""])
        if self.variant is None:
            return names if "bias" not in names or self.lora_bias else _WITHOUT_BIAS
        more = self.variant.parts
        return {part: names[part] if part in names else more[part].in_file for part in self.shapes}

    @property
    def parameters(self) -> int:
        """How many parameters the adapter adds here; none where they are another layer's."""
        return 0 if self.tied_to else sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def trained(self) -> int:
        """How many of those are trained."""
        frozen = [] if self.tied_to else [shape for part, shape in self.shapes.items() if part in self.frozen]
        return self.parameters - sum(map(math.prod, frozen))

    @property
    def bytes(self) -> int:
        """How many bytes all of them take."""
        return self.parameters * self.dtype.itemsize
