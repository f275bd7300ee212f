"""A parameter of the base model that an adapter replaces by its own.

Biases trained under `bias="all"` or `"lora_only"` are such, and so are resized embeddings that a file brings.
Each adapter has its own Parameter and the modules hold the one that acts, so disabling gives the base's output
bit for bit, and unloading gives the base's own Parameter back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from torch import nn

from lorakit.errors import AdapterStateError
from lorakit.weights.follow import follow

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from torch import Tensor


class Place(NamedTuple):
    """An attribute of a module."""

    owner: nn.Module
    attribute: str

    def put(self, module: nn.Module) -> None:
        """Let the owner hold a module there."""
        modules, kind = self.owner._modules, type(self.owner)
        if self.attribute in modules and kind.__setattr__ is nn.Module.__setattr__:
            # setting the attribute would look through all else that it might be
            modules[self.attribute] = module
        else:
            setattr(self.owner, self.attribute, module)


@final
class ParameterSlot:
    """One parameter of the base model, and the copies that adapters put in its place.

    Attributes:
        places: every module attribute that holds this very Parameter (a tied one has several).
        original: the base model's own Parameter.
        copies: each adapter's Parameter, by adapter name.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        original = getattr(*places[0])
        assert isinstance(original, nn.Parameter)
        self.original = original
        self.copies: dict[str, nn.Parameter] = {}
        self._trainable: set[str] = set()
        self._active: str | None = None
        self._enabled = True

    def add(self, name: str, value: Tensor | None = None, *, trainable: bool = True) -> None:
        """Make an adapter's copy, from the original or from `value`."""
        start = self.original.detach().clone() if value is None else value
        self.copies[name] = nn.Parameter(start, requires_grad=False)
        if trainable:
            self._trainable.add(name)

    def remove(self, name: str) -> None:
        """Let an adapter's copy go."""
        del self.copies[name]
        self._trainable.discard(name)
        if self._active == name:
            self._active = None
        self._install()

    def set_adapter(self, names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Install the copy of the one adapter among `names` that has one, else the original.

        Raises:
            AdapterStateError: more than one of them replaces this parameter.
        """
        self._active = single_owner(names, self.copies, "replace the same parameter of the base model")
        for name, copy in self.copies.items():
            trainable = name in self._trainable and name == self._active and not inference_mode
            copy.requires_grad_(trainable)
        self._install()

    def enable_adapters(self, enabled: bool) -> None:
        """Install the active copy, or the original."""
        self._enabled = enabled
        self._install()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have a copy."""
        return tuple(self.copies)

    def restore(self) -> None:
        """Give the modules their own parameter back."""
        self._put(self.original)

    def _install(self) -> None:
        acting = self._enabled and self._active is not None
        self._put(self.copies[self._active] if acting and self._active else self.original)

    def _put(self, parameter: nn.Parameter) -> None:
        for owner, attribute in self.places:
            follow(parameter, getattr(owner, attribute))
            setattr(owner, attribute, parameter)


def single_owner(names: Sequence[str], owners: Container[str], what: str) -> str | None:
    """The one of `names` that is in `owners`, or None.

    Raises:
        AdapterStateError: several are; `what` says what they would do at once.
    """
    found = [name for name in dict.fromkeys(names) if name in owners]
    if len(found) > 1:
        raise AdapterStateError(f"adapters {found} each {what}; only one of them can be active at a time")
    return found[0] if found else None
