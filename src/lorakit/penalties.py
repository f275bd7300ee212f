"""What adapters with variants would have a training loop add to its loss."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from typing import TYPE_CHECKING

from lorakit.later import Later

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.layers import varied
    from lorakit.surgery import AdapterRegistry
else:
    varied = Later("lorakit.layers.varied", globals())


def penalty_of(registry: AdapterRegistry, names: Sequence[str], field: str | None = None) -> Tensor | float:
    """The sum of the penalties of some adapters over the layers that they are on.

    Args:
        registry: of the model.
        names: of the adapters; those without such a variant add nothing.
        field: the config's field that asks for the variants to look at; None: all.

    Returns:
        A differentiable 0-d tensor, on the device of the first layer; 0.0 where nothing has a penalty.

    Raises:
        AdapterNameError: a name is unknown.
    """
    registry.check_known(names)
    asked = [
        (layer, name, layer.variants[name])
        for layer in registry.layers.values()
        for name in dict.fromkeys(names)
        if name in layer.variants and field in {None, layer.variants[name].field}
    ]
    counts = Counter(variant.field for _, _, variant in asked)
    total: Tensor | None = None
    for layer, name, variant in asked:
        held, kept = varied.held_by(layer, name), layer.kept.get(name, {})
        found = variant.penalty(held, kept, counts[variant.field], training=layer.training)
        if found is not None:
            total = found if total is None else total + found.to(total.device)
    return 0.0 if total is None else total


class AdapterLosses(ABC):
    """What a model with adapters can say of their penalties.

    Attributes:
        registry: of its adapters.
    """

    registry: AdapterRegistry

    def get_adapter_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What adapters with a penalty of their own (KaSA, MonteCLoRA) want added to the loss of a training step.

        Calling the model does not add it: its loss is the model's. See `lorakit.helpers.MontecloraTrainerMixin` for the
        Trainer.

        Args:
            adapter_names: of the adapters; None: the active ones.

        Returns:
            A differentiable 0-d tensor; 0.0 where no adapter has a penalty.

        Raises:
            AdapterNameError: a name is unknown.
        """
        return self._loss_of(adapter_names, None)

    def _get_kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """`get_adapter_loss` of KaSA alone, under PEFT's name: summed over the layers."""
        return self._loss_of(adapter_names, "kasa_config")

    def _get_monteclora_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """`get_adapter_loss` of MonteCLoRA alone, under PEFT's name: the mean over the layers; 0.0 in eval mode."""
        return self._loss_of(adapter_names, "monteclora_config")

    def _loss_of(self, names: str | Sequence[str] | None, field: str | None) -> Tensor | float:
        asked = [names] if isinstance(names, str) else self.registry.active if names is None else names
        return penalty_of(self.registry, asked, field)
