"""LoRA on a matrix: `nn.Linear` and transformers' `Conv1D`, over whatever its codec can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from lorakit.layers.base import LoraLayer
from lorakit.layers.hooks import is_observed, may_keep_output
from lorakit.ops import Term, lora_add, lora_linear
from lorakit.weights.dense import conv1d_class

if TYPE_CHECKING:
    from lorakit.weights import WeightCodec


@final
class Linear(LoraLayer):
    """y = base(x) + sum over the routed adapters of scaling · B(A · dropout(x)).

    x (..., in) and y (..., out). Adapters may be kept in another dtype than x: A and B are cast for the
    product, never x. A hook on the base or on a factor's module is honoured: the layer then calls the modules.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        # a subclass may compute something else, and a wrapper (FSDP) may take the base's place later
        plain = type(base_layer) is nn.Linear or type(base_layer) is conv1d_class()
        self._fused_type = type(base_layer) if plain else None
        self._transposed = codec.transposed(base_layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); further arguments go to the base layer."""
        route = self._route
        if not route:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if any(is_observed(self.lora_A[name]) or is_observed(self.lora_B[name]) for name in route):
            return self._forward_through_modules(x, *args, **kwargs)
        terms = [self._term(name) for name in route]
        base = self.base_layer
        if type(base) is self._fused_type and not args and not kwargs and not is_observed(base):
            return lora_linear(x, self.weight, self.bias, terms, transposed=self._transposed)
        y = base(x, *args, **kwargs)
        # `lora_add` writes into a fresh y; a hook may have kept it
        return lora_add(y.clone() if may_keep_output(base) else y, x, terms)

    def _term(self, name: str) -> Term:
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        assert isinstance(A, nn.Linear)
        assert isinstance(B, nn.Linear)
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Term(A.weight, B.weight, B.bias, self.scaling[name], p)

    def _forward_through_modules(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same sum by calling the modules, so that whatever hangs on them runs."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name in self._route:
            A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            parameter = next(A.parameters())
            y = y + B(A(dropout(x.to(parameter.dtype)))) * self.scaling[name]
        return y.to(dtype)
