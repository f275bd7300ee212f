"""A module that is trained whole, with one copy per adapter (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from lorakit.errors import UnsupportedError
from lorakit.layers.chosen import Live, Owner, chosen_by
from lorakit.layers.slot import single_owner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorakit.layers.chosen import Chosen

_AT_ONCE = "have their own copy of the same module (modules_to_save)"


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
        self.owner = Owner()
        self.training = original_module.training

    def add(
        self, name: str, tensors: Mapping[str, Tensor] | None = None, *, tied: nn.Module | None = None
    ) -> None:
        """Make the copy for an adapter.

        Args:
            name: of the adapter.
            tensors: all of its parameters and buffers; None copies the original's.
            tied: another copy whose `weight` is to be this one's too.
        """
        assert name not in self.modules_to_save, f"{name!r} already has a copy"
        original = self.original_module
        # what is replaced at once is not copied before
        kept = {id(original.weight): tied.weight} if tied is not None else {}
        if tensors is not None:
            kept |= {id(value): value for value in original.parameters() if id(value) not in kept}
        duplicate = copy.deepcopy(original, kept)
        if tensors is not None:
            duplicate.load_state_dict(dict(tensors), strict=True, assign=True)
            _share_again(original, duplicate)
        if tied is not None:
            duplicate.weight = tied.weight
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
        self._active = single_owner(names, self.adapters, _AT_ONCE)
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
        """Call the module that acts now, or the one that the running call chose."""
        if Live.any and self._enabled:
            chosen = chosen_by(self.owner)
            if chosen is not None:
                return self._forward_chosen(chosen, *args, **kwargs)
        return self.active_module(*args, **kwargs)

    def _forward_chosen(self, chosen: Chosen, *args: Any, **kwargs: Any) -> Any:
        names = tuple(name for name in chosen.names if name in self.modules_to_save)
        if chosen.ids is None:
            mine = single_owner(names, self.adapters, _AT_ONCE)
            module = self.original_module if mine is None else self.modules_to_save[mine]
            return module(*args, **kwargs)
        if not names:
            return self.original_module(*args, **kwargs)
        return self._by_sample(chosen, names, args, kwargs)

    def _by_sample(
        self, chosen: Chosen, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Each copy on its own samples; the outputs in the order of the samples."""
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None:
            raise UnsupportedError(
                "adapters for each sample need a tensor of samples as the input of a module in modules_to_save"
            )
        samples = len(first)
        ids = chosen.groups(names, samples, first.device).ids

        def only(value: Any, rows: Tensor) -> Any:
            return (
                value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == samples else value
            )

        outputs, places = [], []
        for number in range(-1, len(names)):
            rows = (ids == number).nonzero().squeeze(-1)
            if not len(rows):
                continue
            module = self.original_module if number < 0 else self.modules_to_save[names[number]]
            output = module(*(only(a, rows) for a in args), **{k: only(v, rows) for k, v in kwargs.items()})
            if not isinstance(output, Tensor):
                raise UnsupportedError(
                    f"adapters for each sample need modules that give a tensor; {type(module).__name__} gives a "
                    f"{type(output).__name__}"
                )
            outputs.append(output)
            places.append(rows)
        return torch.cat(outputs)[torch.cat(places).argsort()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"original_module", "modules_to_save", "_active", "_enabled"}:
                raise
            return getattr(self.active_module, name)


def _share_again(original: nn.Module, duplicate: nn.Module) -> None:
    """Let parameters be one inside the copy that are one inside the original."""
    first: dict[int, str] = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            path, _, attribute = name.rpartition(".")
            setattr(duplicate.get_submodule(path), attribute, duplicate.get_parameter(source))
