"""A module that is trained whole, with one copy per adapter (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from lorakit.layers.slot import single_owner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@final
class ModulesToSaveWrapper(nn.Module):
    """Holds the original module and a trainable copy for each adapter; calls the one that is active.

    Attributes:
        original_module: the base model's own module, never trained nor changed.
        modules_to_save: the copies by adapter name.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self._active: str | None = None
        self._enabled = True
        self.training = original_module.training

    def add(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Make the copy for an adapter, from the original or from `tensors` (all of its parameters and buffers)."""
        assert name not in self.modules_to_save, f"{name!r} already has a copy"
        duplicate = copy.deepcopy(self.original_module)
        if tensors is not None:
            duplicate.load_state_dict(dict(tensors), strict=True, assign=True)
        duplicate.requires_grad_(requires_grad=False)
        self.modules_to_save[name] = duplicate

    def remove(self, name: str) -> None:
        """Let the copy go."""
        del self.modules_to_save[name]
        if self._active == name:
            self._active = None

    def set_adapter(self, names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Call the copy of the one adapter among `names` that has one, else the original.

        Raises:
            AdapterStateError: more than one of them has a copy: two whole modules cannot act at once.
        """
        self._active = single_owner(
            names, self.adapters, "have their own copy of the same module (modules_to_save)"
        )
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                trainable = name == self._active and not inference_mode and parameter.is_floating_point()
                parameter.requires_grad_(trainable)

    def enable_adapters(self, enabled: bool) -> None:
        """Call the active copy, or the original."""
        self._enabled = enabled

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The state of an adapter's copy, by name inside the module."""
        if name in self.modules_to_save:
            yield from self.modules_to_save[name].state_dict(keep_vars=True).items()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have a copy."""
        return tuple(self.modules_to_save.keys())

    @property
    def active_module(self) -> nn.Module:
        """The module that acts now."""
        if self._enabled and self._active is not None:
            return self.modules_to_save[self._active]
        return self.original_module

    @property
    def active_adapters(self) -> list[str]:
        """The adapter whose copy acts, if any."""
        return [] if self._active is None else [self._active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module that acts now."""
        return self.active_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"original_module", "modules_to_save", "_active", "_enabled"}:
                raise
            return getattr(self.active_module, name)
