"""Small helpers around a model that carries adapters."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, final

import torch

from lorakit.configs import PeftConfig
from lorakit.errors import AdapterError, ConfigError
from lorakit.state_dict import registry_of
from lorakit.tuner import LoraModel

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import nn

    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a hub repository, holds the config of an adapter that lorakit can read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (AdapterError, OSError, TypeError, ValueError):
        return False
    return True


@final
class DoraCaching:
    """Does nothing, so that code that asks PEFT to keep DoRA's norms runs as it is.

    lorakit keeps them always and safely: whatever an evaluation computed from weights, factors and magnitudes is used
    again for as long as these are the same. It can neither be asked for nor be turned off.

    Args:
        enabled: not looked at.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """As `DoraCaching(enabled)`, for good."""
        self.enabled = enabled

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this context every adapter acts `multiplier` times as much; with 0 to 1 this is WiSE-FT (arXiv:2109.01903).

    However the context is left, each scaling is the very number it was, but for adapters that were replaced within it.

    Args:
        model: a `PeftModel`, a model that adapters were injected into, or either compiled.
        multiplier: any finite number.

    Raises:
        TypeError: the multiplier is no number.
        ConfigError: it is not finite.
        AdapterNameError: the model carries no adapter.
        AdapterStateError: adapters are merged; a merged weight does not know its scaling.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier: got a {type(multiplier).__name__}, wanted a number")
    if not math.isfinite(multiplier):
        raise ConfigError(f"multiplier: got {multiplier!r}, wanted a finite number")
    registry, _ = registry_of(model)
    registry.check_unmerged("scaling an adapter")
    with ExitStack() as undo:
        for layer in registry.layers.values():
            for name, scaling in layer.scaling.items():
                number = float(scaling)
                undo.callback(_put_back, registry, layer, name, registry.configs[name], number)
                _put(layer, name, number * multiplier)
        yield


class MontecloraTrainerMixin:
    """Put before a transformers Trainer, it adds what the active adapters have a training step add to its loss.

    `class MyTrainer(MontecloraTrainerMixin, Trainer)`. MonteCLoRA's and KaSA's penalties are added (see
    `LoraModel.get_adapter_loss`); PEFT's class of this name adds MonteCLoRA's alone.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The Trainer's loss, plus the penalties; with the outputs if asked for."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        penalty = sum(part.get_adapter_loss() for part in model.modules() if isinstance(part, LoraModel))
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty


def _put(layer: LoraLayer, name: str, number: float) -> None:
    scaling: Any = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):  # a compiled graph holds this very tensor
        scaling.fill_(number)
    else:
        layer.scaling[name] = number


def _put_back(registry: AdapterRegistry, layer: LoraLayer, name: str, config: object, number: float) -> None:
    if registry.configs.get(name) is config and name in layer.scaling:
        _put(layer, name, number)
