"""The adapters that one call of a model chose for itself, and what it carries for their variants.

Both live in context variables, so that threads (and tasks) that use one model at once in different ways never see each
other's. They are read in `forward`, and whatever ends the call ends them.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import ConfigError
from lorakit.ops import Groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

_T = TypeVar("_T")

BASE = "__base__"
"""Stands for the base model where an adapter's name is asked for."""


class Owner:
    """Stands for one model; its layers share it. A copy of the model has a copy of its own."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What one call chose.

    Attributes:
        owner: the model that it is meant for.
        names: the distinct adapters, without the base model.
        ids: for each sample the place of its adapter in `names`, -1 for the base model; None: `names` act together
            on all samples.
        repeats: whether a layer may see each sample several times in a row, as beams and returned sequences are.
        outer: what was chosen around it, for other models.
    """

    owner: Owner
    names: tuple[str, ...]
    ids: tuple[int, ...] | None
    repeats: bool = False
    outer: Chosen | None = None
    _groups: dict[Any, Groups] = field(default_factory=dict, repr=False)

    def groups(self, here: tuple[str, ...], samples: int, device: torch.device) -> Groups:
        """Which of the adapters `here`, on one layer, each sample goes through; made once for all such layers.

        Args:
            here: those of `names` that the layer has, in their order.
            samples: the leading dimension of the layer's input.
            device: of the layer's input.

        Raises:
            ConfigError: the layer's input does not hold one row a sample.
        """
        assert self.ids is not None
        key = (here, samples, device)
        if key not in self._groups:
            places = {self.names.index(name): place for place, name in enumerate(here)}
            ids = [places.get(number, -1) for number in self.ids]
            times, rest = divmod(samples, len(ids))
            if rest or not times or (times > 1 and not self.repeats):
                raise ConfigError(
                    f"adapter_names holds {len(ids)} names, but a layer got an input of leading size {samples}; "
                    "give one name for each sample of the batch"
                )
            ids = [number for number in ids for _ in range(times)]
            self._groups[key] = Groups.make(ids, len(here), device)
        return self._groups[key]


@dataclass(frozen=True, eq=False)
class Carried:
    """What one call hands to the variants of some adapters.

    Attributes:
        owner: the model that it is meant for.
        items: by adapter. Where the call has an adapter for each sample, of an adapter's own samples alone.
        outer: what is carried around it, for other models.
    """

    owner: Owner
    items: Mapping[str, Any]
    outer: Carried | None = None


_CHOSEN: ContextVar[Chosen | None] = ContextVar("lorakit_chosen", default=None)
_CARRIED: ContextVar[Carried | None] = ContextVar("lorakit_carried", default=None)


class Live:
    """Whether any call anywhere chose or carries anything: a plain attribute, which a compiled graph can guard on."""

    any = False
    count = 0
    lock = threading.Lock()


def chosen_by(owner: Owner) -> Chosen | None:
    """What the running call chose for this model, or None."""
    if not Live.any:
        return None
    chosen = _CHOSEN.get()
    while chosen is not None and chosen.owner is not owner:
        chosen = chosen.outer
    return chosen


def carried_by(owner: Owner, name: str) -> Any:
    """What the running call hands to the variant of this model's adapter, or None."""
    if not Live.any:
        return None
    carried = _CARRIED.get()
    while carried is not None and carried.owner is not owner:
        carried = carried.outer
    return None if carried is None else carried.items.get(name)


@contextmanager
def choosing(
    owner: Owner, names: tuple[str, ...], ids: tuple[int, ...] | None, *, repeats: bool = False
) -> Iterator[None]:
    """Within this context calls of the model go through these adapters; see `Chosen`."""
    with _entered(_CHOSEN, Chosen(owner, names, ids, repeats, _CHOSEN.get())):
        yield


@contextmanager
def handing(owner: Owner, items: Mapping[str, Any]) -> Iterator[None]:
    """Within this context calls of the model carry this; see `Carried`."""
    with _entered(_CARRIED, Carried(owner, items, _CARRIED.get())):
        yield


@contextmanager
def _entered(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    with Live.lock:
        Live.count += 1
        Live.any = True
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
        with Live.lock:
            Live.count -= 1
            Live.any = Live.count > 0


def carrying(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient-checkpointing function that runs what it runs again, in backward, as the call that ran it first."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chosen, carried = _CHOSEN.get(), _CARRIED.get()
        if chosen is None and carried is None:
            return checkpoint(function, *args, **kwargs)

        def again(*inner: Any, **more: Any) -> Any:
            with _entered(_CHOSEN, chosen), _entered(_CARRIED, carried):
                return function(*inner, **more)

        return checkpoint(again, *args, **kwargs)

    call.__dict__.update(carries_choice=True, __wrapped__=checkpoint)
    return call
