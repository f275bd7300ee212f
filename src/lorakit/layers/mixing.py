"""What layers share for batches whose samples go through different adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _module

from lorakit.ops import Bank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorakit.layers.base import LoraLayer
    from lorakit.layers.chosen import Chosen
    from lorakit.ops import Term

    Names = tuple[str, ...]


class _Holders:
    """Who holds the factors of some adapters: one look tells whether they, and what hangs on them, are as they were.

    A decode step may ask this of 32 adapters at every layer, where gathering their factors anew costs more than the
    products: hence no call per adapter.
    """

    def __init__(self, layer: LoraLayer, parts: tuple[nn.ModuleDict, nn.ModuleDict], names: Names) -> None:
        self.found = [
            (holder._modules, _values(holder._modules, names)) for holder in (*parts, layer.lora_dropout)
        ]
        factors = [module for _, modules in self.found[:2] for module in modules]
        self.parameters = [(module._parameters, module._parameters.copy()) for module in factors]
        self.own = [module.__dict__ for module in factors]
        self.extras = [
            extra
            for module in factors
            for extra in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
                module._modules,
            )
        ]
        self.scalings = _values(layer.scaling, names)
        self.drops = [module for module in self.found[2][1] if isinstance(module, nn.Dropout)]
        self.drop_state = self._drop_state()

    def _drop_state(self) -> list[tuple[bool, float]]:
        return [(module.training, module.p) for module in self.drops]

    def are_same(self, layer: LoraLayer, names: Names) -> bool:
        """Whether gathering the factors again would give the very same tensors and numbers."""
        return not (
            any(self.extras)
            or any("forward" in own for own in self.own)
            or _module._has_any_global_hook()
            or any(_values(holder, names) != modules for holder, modules in self.found)
            or any(now.get(key) is not it for now, then in self.parameters for key, it in then.items())
            or _values(layer.scaling, names) != self.scalings
            or self._drop_state() != self.drop_state
        )


def _values(holder: Mapping[str, Any], names: Names) -> list[Any]:
    return list(map(holder.get, names))


class _Kept(NamedTuple):
    names: Names
    bank: Bank
    holders: _Holders | None  # None where tensors are another layer's, or a scaling is one

    def is_same(self, layer: LoraLayer) -> bool:
        holders = self.holders
        return holders is not None and holders.are_same(layer, self.names) and self.bank.is_current()


class BankKeeper:
    """Keeps the stacked factors of the last mixed batch, while nobody trains or changes them."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def bank(
        self,
        layer: LoraLayer,
        parts: tuple[nn.ModuleDict, nn.ModuleDict],
        names: Names,
        gather: Callable[[Names], list[Term] | None],
    ) -> Bank | None:
        """The factors of these adapters, stacked; None if `gather` gives none, for something hangs on their modules.

        Args:
            layer: whose adapters they are.
            parts: its modules that hold A and B.
            names: the adapters.
            gather: gives what they add.
        """
        keeps = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        kept = self._kept if keeps else None
        if kept is not None and kept.names != names:
            kept = None
        if kept is not None and kept.is_same(layer):
            return kept.bank
        terms = gather(names)
        if terms is None:
            return None
        if kept is not None and kept.bank.is_current(terms):
            return kept.bank
        bank = Bank.stack(terms)
        if keeps:
            is_plain = layer.tied.keys().isdisjoint(names) and not any(
                isinstance(term.scaling, torch.Tensor) for term in terms
            )
            self._kept = _Kept(names, bank, _Holders(layer, parts, names) if is_plain else None)
        return bank

    def clear(self) -> None:
        """Let the kept factors go."""
        self._kept = None

    def __reduce__(self) -> tuple[type[BankKeeper], tuple[()]]:
        return BankKeeper, ()  # copies and pickles of a layer begin without any


def then_zeros(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors stacked, and zeros of the same shape after them: what -1, the base alone, picks."""
    return torch.stack([*tensors, torch.zeros_like(tensors[0])])


def scaling_by_sample(layer: LoraLayer, names: Names, ids: Tensor, y: Tensor) -> Tensor:
    """(samples,), the scaling of each sample's adapter in fp32 at least; 0 for the base alone.

    Args:
        layer: that the adapters are on.
        names: the adapters.
        ids: (samples,), the place of each sample's adapter in `names`, or -1.
        y: the layer's output.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    scalings = [*(float(layer.scaling[name]) for name in names), 0.0]
    return torch.tensor(scalings, device=y.device, dtype=wide)[ids]


def rows_by_sample(
    y: Tensor,
    chosen: Chosen,
    names: tuple[str, ...],
    x: Tensor,
    replace: Callable[[Tensor, str], Tensor],
) -> Tensor:
    """Y with the token rows of each sample's own adapter in place.

    Args:
        y: (samples, ..., out), what the base gave.
        chosen: who goes through what.
        names: the chosen adapters that the layer has.
        x: (samples, ...), the layer's input.
        replace: y with the rows of one adapter in place, for all samples.
    """
    groups = chosen.groups(names, x.shape[0], x.device)
    for number, name in enumerate(names):
        mine = (groups.ids == number).view(-1, *(1,) * (y.ndim - 1))
        y = torch.where(mine, replace(y, name), y)
    return y
