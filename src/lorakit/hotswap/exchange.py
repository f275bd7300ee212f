"""Writing other numbers and settings into an adapter that is in use: all of them, or none.

The parameters stay the same objects. One of the same shape is written in place, so that whoever holds its memory (a
compiled graph, a captured CUDA graph, an optimiser) sees the new numbers; only a larger one gets other memory.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from lorakit.layers import LoraLayer
    from lorakit.specs import AdapterSpec


class Setting(NamedTuple):
    """What an adapter is made with on one layer; see `LoraLayer`."""

    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: float
    dropout: float

    @classmethod
    def of(cls, spec: AdapterSpec, *, use_rslora: bool) -> Setting:
        """What was planned for a layer."""
        return cls(spec.r, spec.lora_alpha, use_rslora, spec.scaling, spec.dropout)


@dataclass
class Exchange:
    """What an adapter is to become, gathered before any of it is written.

    Attributes:
        name: of the adapter.
        copies: tensors, and what is to be in them, of the same shape.
        zeros: tensors that are to hold zeros, but for their `parts`.
        parts: views of those, and what is to be in them.
        larger: parameters, and what is to take the place of their data.
        settings: layers, and what the adapter is made with there.
    """

    name: str
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    zeros: list[Tensor] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    larger: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    settings: list[tuple[LoraLayer, Setting]] = field(default_factory=list)

    @contextmanager
    def written(self) -> Iterator[Callable[..., Any]]:
        """Write everything; what was there comes back if anything fails, or the context is left by an exception.

        Gives what `all_or_nothing` gives.
        """
        targets = [tensor for tensor, _ in self.copies] + self.zeros
        layers = [(layer, self.name) for layer, _ in self.settings]
        with (
            quietly([*targets, *(parameter for parameter, _ in self.larger)]),
            all_or_nothing(layers) as undo,
        ):
            undo(_copy, targets, [tensor.clone() for tensor in targets])
            _zero(self.zeros)
            pairs = self.copies + self.parts
            _copy([target for target, _ in pairs], [value for _, value in pairs])
            for parameter, value in self.larger:
                enlarge(parameter, value, undo)
            for layer, setting in self.settings:
                _set(layer, self.name, setting)
            if self.larger:
                match_sizes(layers)
            yield undo


@contextmanager
def all_or_nothing(adapters: Sequence[tuple[LoraLayer, str]]) -> Iterator[Callable[..., Any]]:
    """Within this context settings of adapters on layers may change; leaving it by an exception brings them back.

    Gives a function that takes what else is to be called then: `undo(function, *arguments)`, the last one first.
    """
    with ExitStack() as undo:
        undo.callback(_put_back, [_Kept.of(layer, name) for layer, name in adapters])
        yield undo.callback
        undo.pop_all()


def enlarge(parameter: Tensor, value: Tensor, undo: Callable[..., Any]) -> None:
    """Give a parameter data of another shape, which its gradient does not fit: that goes."""
    undo(_replace_data, parameter, parameter.data, parameter.grad)
    _replace_data(parameter, value.clone() if parameter.is_inference() else value, None)


def _replace_data(parameter: Tensor, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = grad


def match_sizes(adapters: Iterable[tuple[LoraLayer, str]]) -> None:
    """Let the modules that hold factors say the sizes that those have."""
    for layer, name in adapters:
        for module in layer.modules_of(name):
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                out, inner = module.weight.shape[:2]
                module.out_channels, module.in_channels = out, inner * module.groups


class _Kept(NamedTuple):
    """What an adapter was made with on one layer, to the object."""

    layer: LoraLayer
    name: str
    r: int
    lora_alpha: float
    use_rslora: bool
    scaling: Any
    number: float
    dropout: nn.Module
    rate: float

    @classmethod
    def of(cls, layer: LoraLayer, name: str) -> _Kept:
        scaling, dropout = layer.scaling[name], layer.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        settings = layer.r[name], layer.lora_alpha[name], layer.use_rslora[name]
        return cls(layer, name, *settings, scaling, float(scaling), dropout, rate)


def _put_back(kept: Iterable[_Kept]) -> None:
    for layer, name, r, lora_alpha, use_rslora, scaling, number, dropout, rate in kept:
        layer.r[name], layer.lora_alpha[name], layer.use_rslora[name] = r, lora_alpha, use_rslora
        layer.scaling[name], layer.lora_dropout[name] = scaling, dropout
        if isinstance(scaling, torch.Tensor):
            scaling.fill_(number)
        if isinstance(dropout, nn.Dropout):
            dropout.p = rate
        match_sizes([(layer, name)])


def _set(layer: LoraLayer, name: str, new: Setting) -> None:
    layer.r[name], layer.lora_alpha[name], layer.use_rslora[name] = new.r, new.lora_alpha, new.use_rslora
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):  # a compiled graph holds this very tensor
        scaling.fill_(new.scaling)
    else:
        layer.scaling[name] = new.scaling
    dropout = layer.lora_dropout[name]
    if isinstance(dropout, nn.Dropout):
        dropout.p = new.dropout
    elif new.dropout:
        layer.lora_dropout[name] = nn.Dropout(new.dropout).train(layer.training)


def _zero(targets: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_zero_(list(targets))


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(values))


@contextmanager
def quietly(written: Sequence[Tensor] = ()) -> Iterator[None]:
    """Without a graph, whatever the caller is in. What was made in inference mode can be written to only in it."""
    with torch.inference_mode(mode=any(tensor.is_inference() for tensor in written)), torch.no_grad():
        yield
