"""LoRA on a matrix: `nn.Linear` and transformers' `Conv1D`, over whatever its codec can read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from lorakit.errors import UnsupportedError
from lorakit.layers.base import LoraLayer
from lorakit.layers.chosen import Live
from lorakit.layers.factors import let_go, plain_linear
from lorakit.layers.hooks import is_observed, may_keep_output
from lorakit.layers.mixing import BankKeeper, rows_by_sample
from lorakit.layers.standin import stand_in
from lorakit.ops import Term, lora_add, lora_linear
from lorakit.weights.dense import conv1d_class

if TYPE_CHECKING:
    from lorakit.layers.chosen import Chosen
    from lorakit.weights import WeightCodec


@final
class Linear(LoraLayer):
    """y = base(x) + sum over the routed adapters of scaling · B(A · dropout(x)).

    x (..., in) and y (..., out). Adapters may be kept in another dtype than x: A and B are cast for the
    product, never x. A hook on the base or on a factor's module is honoured: the layer then calls the modules.

    Attributes:
        lora_A, lora_B: the factors by adapter name, as bias-free Linears (B has a bias under `lora_bias`).
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        # a subclass may compute something else, and a wrapper (FSDP) may take the base's place later
        plain = type(base_layer) is nn.Linear or type(base_layer) is conv1d_class()
        self._fused_type = type(base_layer) if plain else None
        self._banks = BankKeeper()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); further arguments go to the base layer."""
        route = self._route
        if Live.any:
            chosen = self._chosen()
            if chosen is not None and chosen.ids is not None:
                return self._forward_mixed(chosen, x, *args, **kwargs)
            route = route if chosen is None else self._present(chosen.names)
        if not route:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        factors = [name for name in route if name in self.r]
        if any(self._is_observed(name) for name in factors):
            return self._forward_through_modules(factors, route, x, *args, **kwargs)
        terms = [self._term(name) for name in factors]
        base = self.base_layer
        plain = type(base) is self._fused_type and not args and not kwargs and not is_observed(base)
        if plain and self.token_adapter is None:
            return lora_linear(x, self.weight, self.bias, terms, transposed=self.layout.transposed)
        y: Tensor = base(x, *args, **kwargs)
        if self.token_adapter is not None:
            y = self.token_adapter.in_head(y, x, route, self.bias)
        return lora_add(self._given_away(y), x, terms)

    def _forward_mixed(self, chosen: Chosen, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each sample through its own adapter; x (samples, ..., in)."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        present = self._present(chosen.names)
        if self.token_adapter is not None:
            tokens = self.token_adapter
            y = rows_by_sample(y, chosen, present, x, lambda y, name: tokens.in_head(y, x, [name], self.bias))
        factors = tuple(name for name in present if name in self.r)
        if not factors:
            return y
        groups = chosen.groups(factors, x.shape[0], x.device)
        from lorakit.ops.grouped import lora_grouped

        bank = self._banks.bank(factors, [self._term(name) for name in factors])
        return lora_grouped(self._given_away(y), x, bank, groups)

    def _given_away(self, y: Tensor) -> Tensor:
        """The base's output as the ops want it: they write into what is no view, and somebody may have kept this one."""
        kept = type(self.base_layer) is not self._fused_type or may_keep_output(self.base_layer)
        if not kept:
            return y
        return (
            y.view_as(y) if torch.is_grad_enabled() else y.clone()
        )  # inference mode does not know its views

    def stand_in(self) -> nn.Module:
        """A plain layer with the weight and bias that act now, for a parent that reads them instead of calling.

        Raises:
            UnsupportedError: the running call chose an adapter for each sample.
        """
        route = self._route
        chosen = self._chosen() if Live.any else None
        if chosen is not None:
            route = self._present(chosen.names)
            if route and chosen.ids is not None:
                raise UnsupportedError(
                    "adapters for each sample do not work inside nn.MultiheadAttention, which reads this layer's "
                    "weight; choose one adapter for the whole batch"
                )
        base = self.get_base_layer()
        weight, bias = self.weight, self.bias
        for name in route:
            A, B, own = self.stored(name)
            weight = weight + (B @ A * self.scaling[name]).to(weight.dtype)
            if own is not None and bias is not None:
                bias = bias + (own * self.scaling[name]).to(bias.dtype)
        return stand_in(base, {"weight": weight, "bias": bias})

    def _term(self, name: str) -> Term:
        A, B, bias = self.stored(name)
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return Term(A, B, bias, self.scaling[name], p)

    def _is_observed(self, name: str) -> bool:
        return any(is_observed(module) for module in self.modules_of(name))

    def _forward_through_modules(
        self, factors: list[str], route: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The same sum by calling the modules, so that whatever hangs on them runs."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        if self.token_adapter is not None:
            y = self.token_adapter.in_head(y, x, route, self.bias)
        for name in factors:
            if name in self.tied:
                y = lora_add(y, x, [self._term(name)])
                continue
            A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            parameter = next(A.parameters())
            y = y + B(A(dropout(x.to(parameter.dtype)))) * self.scaling[name]
        return y.to(dtype)

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        self.lora_A[name] = plain_linear(A)
        self.lora_B[name] = plain_linear(B, bias)

    def _let_go(self, name: str) -> None:
        self._banks.clear()
        let_go(name, self.lora_A, self.lora_B)

    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        return held_by_modules(self.lora_A, self.lora_B, name)


def held_by_modules(
    lora_A: nn.ModuleDict, lora_B: nn.ModuleDict, name: str
) -> dict[str, tuple[str, nn.Parameter]]:
    """The parameters of an adapter that two dictionaries of modules hold; see `LoraLayer._held`."""
    A, B = lora_A[name], lora_B[name]
    held = {"A": (f"lora_A.{name}.weight", A.weight), "B": (f"lora_B.{name}.weight", B.weight)}
    if B.bias is not None:
        held["bias"] = (f"lora_B.{name}.bias", B.bias)
    return held  # type: ignore[return-value]  # the weights of these modules are parameters
