"""LoRA on a matrix: `nn.Linear` and transformers' `Conv1D`, over whatever its codec can read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from lorakit.layers.base import LoraLayer
from lorakit.layers.factors import acting_rate, bare, let_go, plain_linear
from lorakit.layers.hooks import is_observed, may_keep_output
from lorakit.layers.mixing import BankKeeper, rows_by_sample
from lorakit.layers.together import read_together
from lorakit.layers.varied import (
    add_by_sample,
    add_variants,
    call_of,
    offset_of,
    one_apart,
    parted,
    parted_by_sample,
)
from lorakit.layers.whole import acting_on_all, changed_stand_in
from lorakit.ops import Term, lora_add, lora_grouped, lora_linear
from lorakit.ops.fused import is_frozen_base
from lorakit.weights.dense import conv1d_class

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorakit.layers.chosen import Chosen
    from lorakit.layers.together import Group
    from lorakit.variants import Call, Held
    from lorakit.weights import WeightCodec


@final
class Linear(LoraLayer):
    """y = base(x) + sum over the routed adapters of scaling · B(A · dropout(x)).

    x (..., in) and y (..., out). Adapters may be kept in another dtype than x: A and B are cast for the
    product, never x. A hook on the base or on a factor's module is honoured: the layer then calls the modules.

    Attributes:
        lora_A, lora_B: the factors by adapter name, as bias-free Linears (B has a bias under `lora_bias`).
        is_read: whether the parent may compute with `weight` and `bias` instead of calling the layer.
        group: the layers that are expected to read the same input as this one, or None.
    """

    lora_A: nn.ModuleDict  # noqa: N815 - the names of files
    lora_B: nn.ModuleDict  # noqa: N815
    group: Group | None
    is_read: bool
    _fused_type: type[nn.Module] | None
    _fresh_type: type[nn.Module] | None
    _banks: BankKeeper

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        self._modules.update(lora_A=bare(nn.ModuleDict), lora_B=bare(nn.ModuleDict))
        kind = type(base_layer)
        # a subclass may compute something else, and a wrapper (FSDP) may take the base's place later
        plain = kind is nn.Linear or kind is conv1d_class()
        self.__dict__.update(
            _fused_type=kind if plain else None,
            _fresh_type=kind if codec.gives_fresh(base_layer) else None,
            _banks=BankKeeper(),
            is_read=False,
            group=None,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); further arguments go to the base layer."""
        route, by_sample = self.acting()
        if by_sample is not None:
            return self._forward_mixed(by_sample, route, x, *args, **kwargs)
        if not route:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        factors, varied = parted(self, route)
        finish = self._finish(route) if varied else None
        if finish is not None:
            found = self._finished(route[0], finish, args, kwargs, x)
            if found is not None:
                return found
        terms = self._terms(factors)
        if not varied and self.token_adapter is None and terms is not None:
            return self._base_and(terms, args, kwargs, x)
        y = self._base_and((), args, kwargs, x)
        if self.token_adapter is not None:
            y = self.token_adapter.in_head(y, x, route, getattr(self.base_layer, "bias", None))
        y = self._given_away(y)
        if varied:
            again = partial(self._base_and, (), args, kwargs)
            y = add_variants(self, varied, y, x, again, self._add)
        if terms is not None:
            return lora_add(y, x, terms) if terms else y
        dtype = y.dtype
        for name in factors:
            y = self._add_by_modules(name, y, x)
        return y.to(dtype)

    def _forward_mixed(
        self, chosen: Chosen, present: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Each sample through its own adapter; x (samples, ..., in)."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.token_adapter is not None:
            tokens, bias = self.token_adapter, getattr(self.base_layer, "bias", None)
            y = rows_by_sample(y, chosen, present, x, lambda y, name: tokens.in_head(y, x, [name], bias))
        factors, apart = parted_by_sample(self, present)
        if apart:
            again = partial(self._base_and, (), args, kwargs)
            y = add_by_sample(chosen, apart, y, x, one_apart(self, again, self._add, self._add_plain))
        if not factors:
            return y
        groups = chosen.groups(factors, x.shape[0], x.device)
        bank = self._banks.bank(self, (self.lora_A, self.lora_B), factors, self._terms)
        if bank is not None:
            return lora_grouped(self._given_away(y), x, bank, groups)
        return add_by_sample(chosen, factors, y, x, self._add_by_modules)

    def _base_and(
        self, terms: Sequence[Term], args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor
    ) -> Tensor:
        """The base's output for x, with the further arguments of the running call, and what terms add to it."""
        base = self.base_layer
        if type(base) is self._fused_type and not args and not kwargs and not is_observed(base):
            held = cast("nn.Linear", base)
            shared = None
            if self.group is not None and not torch.compiler.is_compiling():
                shared = read_together(self, x, held, terms)
            if shared is not None:
                return shared
            return lora_linear(x, held.weight, held.bias, terms, transposed=self.layout.transposed)
        y: Tensor = base(x, *args, **kwargs)
        return lora_add(self._given_away(y), x, terms) if terms else y

    def plain_terms(self) -> Sequence[Term] | None:
        """What acts on the layer now, if a sum of terms on a base that may be computed around comes first; else None."""
        route, by_sample = self.acting()
        base = self.base_layer
        if by_sample is not None or self.token_adapter is not None or type(base) is not self._fused_type:
            return None
        factors, varied = parted(self, route)
        if is_observed(base) or is_observed(self) or (varied and self._finish(route) is None):
            return None
        return self._terms(factors or varied)

    def is_frozen(self, x: Tensor) -> bool:
        """Whether the base gets no gradient of its own, and has the dtype of x."""
        base = cast("nn.Linear", self.base_layer)
        return is_frozen_base(x, base.weight, base.bias)

    def _finish(self, route: Sequence[str]) -> Callable[[Tensor, Call], Tensor] | None:
        """What the only acting adapter makes of the plain sum, where its variant is no more than that; else None."""
        if len(route) != 1 or acting_rate(self.lora_dropout[route[0]]):
            return None
        return self.variants[route[0]].finish

    def _finished(
        self,
        name: str,
        finish: Callable[[Tensor, Call], Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        x: Tensor,
    ) -> Tensor | None:
        """The plain sum of one adapter, finished; None if a module of its must be called."""
        terms = self._terms([name])
        if terms is None:
            return None
        y = self._base_and(terms, args, kwargs, x)
        again = partial(self._base_and, (), args, kwargs)
        return finish(y, call_of(self, name, y, x, again, self._add))

    def _add_plain(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """Y, given away, with what one plain adapter adds."""
        terms = self._terms([name])
        return self._add_by_modules(name, y, x) if terms is None else lora_add(y, x, terms)

    def _add(self, y: Tensor, x: Tensor, held: Held) -> Tensor:
        """Y, given away, with what a plain adapter with such tensors adds, without dropout."""
        return lora_add(y, x, [Term(held.A, held.B, held.bias, held.scaling, 0.0)])

    def _given_away(self, y: Tensor) -> Tensor:
        """The base's output as the ops want it: they write into what is no view, and somebody may have kept this one."""
        kept = type(self.base_layer) is not self._fresh_type or may_keep_output(self.base_layer)
        if not kept:
            return y
        # inference mode does not know its views
        return y.view_as(y) if torch.is_grad_enabled() else y.clone()

    @property
    def weight(self) -> Tensor:
        """As `LoraLayer.weight`, but where a parent computes with it instead of calling the layer: the acting weight."""
        return cast("Tensor", self.stand_in().weight) if self.is_read else super().weight

    @property
    def bias(self) -> Tensor | None:
        """As `weight`."""
        return cast("Tensor | None", self.stand_in().bias) if self.is_read else super().bias

    def stand_in(self) -> nn.Module:
        """A plain layer with the weight and bias that act now, for a parent that reads them instead of calling.

        Raises:
            UnsupportedError: the running call chose an adapter for each sample.
        """
        where = (
            "where the parent (nn.MultiheadAttention; nn.TransformerEncoderLayer in eval mode) reads this layer's "
            "weight instead of calling it"
        )
        return changed_stand_in(self, acting_on_all(self, where))

    def _terms(self, names: Sequence[str]) -> list[Term] | None:
        """What the adapters add; None if something hangs on a module of theirs, which must then be called."""
        shrinks, expands = self.lora_A._modules, self.lora_B._modules  # a batch may ask for 32 at every layer
        terms = []
        for name in names:
            offset = offset_of(self, name)
            if offset is not None:
                terms.append(Term(offset.A, offset.B, None, offset.scaling, 0.0))
            if name in self.tied:
                terms.append(self._term(name, *self.stored(name)))
                continue
            shrink, expand = cast("nn.Linear", shrinks[name]), cast("nn.Linear", expands[name])
            if is_observed(shrink) or is_observed(expand):
                return None
            terms.append(self._term(name, shrink.weight, expand.weight, expand.bias))
        return terms

    def _term(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> Term:
        return Term(A, B, bias, self.scaling[name], acting_rate(self.lora_dropout[name]))

    def _add_by_modules(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """Y and what one adapter adds, in the wider of their dtypes; its modules are called, for something hangs on one."""
        if name in self.tied:
            return lora_add(y, x, [self._term(name, *self.stored(name))])
        offset = offset_of(self, name)
        if offset is not None:
            y = self._add(y, x, offset)
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        added: Tensor = B(A(dropout(x.to(next(A.parameters()).dtype)))) * self.scaling[name]
        return y + added

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        held: Any = self._modules  # as attributes they cost a microsecond each
        held["lora_A"]._modules[name] = plain_linear(A)
        held["lora_B"]._modules[name] = plain_linear(B, bias)

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
