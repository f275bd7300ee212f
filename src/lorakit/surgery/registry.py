"""Which adapters a model carries and where: written once at attach time, read by every later operation.

No operation walks the model again to find its layers, so none grows with the size of the rest of the model.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from lorakit.errors import AdapterError, AdapterNameError, AdapterStateError
from lorakit.layers.slot import single_owner

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from torch import Tensor, nn

    from lorakit.config import LoraConfig
    from lorakit.layers import LoraLayer, ModulesToSaveWrapper, ParameterSlot
    from lorakit.layers.slot import Place

_ATTRIBUTE = "_lorakit_registry"


class StoredTensor(NamedTuple):
    """One tensor of an adapter, under the names it has in a file and in the model's state dict."""

    file_name: str
    state_name: str
    tensor: Tensor


class AdapterRegistry:
    """The adapters of one model.

    Attributes:
        model: the model whose modules were wrapped.
        configs: the config of each adapter, by name.
        layers: every `LoraLayer`, by the path of the module it wraps.
        saved: every `ModulesToSaveWrapper`, by path.
        slots: every base parameter that an adapter replaces, by its name in the base model.
        places: where each wrapper sits, by path.
        flags: the `requires_grad` flag that each base parameter had before the first adapter came.
        active: names of the active adapters.
        enabled: whether adapters act at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.configs: dict[str, LoraConfig] = {}
        self.layers: dict[str, LoraLayer] = {}
        self.saved: dict[str, ModulesToSaveWrapper] = {}
        self.slots: dict[str, ParameterSlot] = {}
        self.places: dict[str, tuple[Place, ...]] = {}
        self.flags: dict[str, bool] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True

    # ---- names --------------------------------------------------------------------------------------

    def check_known(self, names: Sequence[str]) -> None:
        """Refuse names that are not adapters of this model.

        Raises:
            AdapterNameError: listing the unknown names and the known ones.
        """
        unknown = [name for name in names if name not in self.configs]
        if unknown:
            raise AdapterNameError(f"no adapter named {unknown}; this model has {list(self.configs)}")

    def check_owners(self, names: Sequence[str]) -> None:
        """Refuse adapters that cannot act together.

        Raises:
            AdapterStateError: two of them own the same whole module or bias.
        """
        owners: tuple[ModulesToSaveWrapper | ParameterSlot, ...] = (
            *self.saved.values(),
            *self.slots.values(),
        )
        for owner in owners:
            single_owner(names, owner.adapters, "own the same module or parameter of the base model")

    def check_unmerged(self, what: str) -> None:
        """Refuse `what`, which would change or misread merged weights.

        Raises:
            AdapterStateError: adapters are merged.
        """
        if self.merged:
            raise AdapterStateError(f"{list(self.merged)} are merged; call unmerge_adapter() before {what}")

    @property
    def merged(self) -> tuple[str, ...]:
        """Names merged into at least one layer."""
        return tuple(dict.fromkeys(name for layer in self.layers.values() for name in layer.merged_adapters))

    # ---- active and enabled -------------------------------------------------------------------------

    def set_active(self, names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Make exactly these adapters act, and train unless `inference_mode`. Unmerges first if need be.

        Raises:
            AdapterNameError: a name is unknown.
            AdapterStateError: two of them own the same whole module or bias.
        """
        names = tuple(dict.fromkeys(names))
        self.check_known(names)
        self.check_owners(names)
        if self.merged:
            warnings.warn(f"unmerging {list(self.merged)} to change the active adapters", stacklevel=3)
            self.unmerge()
        self.active = names
        for layer in self.layers.values():
            layer.set_adapter(names, inference_mode=inference_mode)
        for wrapper in self.saved.values():
            wrapper.set_adapter(names, inference_mode=inference_mode)
        for slot in self.slots.values():
            slot.set_adapter(names, inference_mode=inference_mode)

    def set_enabled(self, *, enabled: bool) -> None:
        """Let the adapters act, or the base alone."""
        self.enabled = enabled
        for wrapper in self.saved.values():
            wrapper.enable_adapters(enabled)
        # A merged layer's state includes its bias: whoever goes back to the base's own must come last.
        owners = (self.slots.values(), self.layers.values())
        for group in owners if enabled else reversed(owners):
            for owner in group:
                owner.enable_adapters(enabled)

    # ---- merging ------------------------------------------------------------------------------------

    def merge(self, names: Sequence[str] | None = None) -> None:
        """Merge adapters (default: the active ones) in every layer, or in none.

        Raises:
            AdapterNameError, UnsupportedError, NonFiniteError: with the module path; nothing was changed.
        """
        names = self.mergeable(names)
        prepared = []
        for path, layer in self.layers.items():
            with at_path(path):
                prepared.append(layer.prepare_merge(names))
        for merge in prepared:
            if merge is not None:
                merge.layer.commit_merge(merge)

    def mergeable(self, names: Sequence[str] | None) -> list[str]:
        """The adapters to merge, with those that are merged already left out, and said so."""
        wanted = list(self.active if names is None else dict.fromkeys(names))
        self.check_known(wanted)
        already = [name for name in wanted if name in self.merged]
        if already:
            warnings.warn(f"{already} are merged already", stacklevel=4)
        return [name for name in wanted if name not in already]

    def unmerge(self) -> None:
        """Give every layer its original weight back, bit for bit."""
        for path, layer in self.layers.items():
            with at_path(path):
                layer.unmerge()

    # ---- tensors ------------------------------------------------------------------------------------

    def tensors(self, name: str) -> Iterator[StoredTensor]:
        """Every tensor that belongs to an adapter and to nothing else, under its names."""
        self.check_known([name])
        for path, layer in self.layers.items():
            for item in layer.tensors(name):
                yield StoredTensor(
                    _join(path, item.file_suffix), _join(path, item.state_suffix), item.parameter
                )
        for path, wrapper in self.saved.items():
            for key, tensor in wrapper.tensors(name):
                yield StoredTensor(_join(path, key), _join(path, f"modules_to_save.{name}.{key}"), tensor)
        for parameter_name, slot in self.slots.items():
            if name in slot.copies:
                file_name = base_parameter_file_name(parameter_name, self.layers)
                yield StoredTensor(file_name, file_name, slot.copies[name])

    # ---- removal ------------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Take an adapter off; modules left without any adapter become the base's own again.

        Raises:
            AdapterNameError: no such adapter.
            AdapterStateError: it is merged.
        """
        self.check_known([name])
        if name in self.merged:
            raise AdapterStateError(f"adapter {name!r} is merged; call unmerge_adapter() before deleting it")
        self.discard(name)
        remaining = tuple(active for active in self.active if active != name)
        if remaining != self.active and not remaining and self.configs:
            remaining = (next(iter(self.configs)),)
            warnings.warn(
                f"the active adapter {name!r} was deleted; {remaining[0]!r} is active now", stacklevel=4
            )
        if remaining != self.active:
            self.set_active(
                remaining, inference_mode=any(self.configs[key].inference_mode for key in remaining)
            )

    def discard(self, name: str) -> None:
        """Take off whatever there is of an adapter, also when it was put on only in part."""
        self.configs.pop(name, None)
        for path, layer in list(self.layers.items()):
            if name in layer.r:
                layer.remove(name)
            if not layer.adapters:
                self.unwrap(path, layer.base_layer)
                del self.layers[path]
        for path, wrapper in list(self.saved.items()):
            if name in wrapper.modules_to_save:
                wrapper.remove(name)
            if not wrapper.modules_to_save:
                self.unwrap(path, wrapper.original_module)
                del self.saved[path]
        for key, slot in list(self.slots.items()):
            if name in slot.copies:
                slot.remove(name)
            if not slot.copies:
                slot.restore()
                del self.slots[key]

    def unwrap(self, path: str, module: nn.Module) -> None:
        """Put `module` where the wrapper of `path` is."""
        for place in self.places.pop(path, ()):
            setattr(place.owner, place.attribute, module)


@contextmanager
def at_path(path: str) -> Iterator[None]:
    """Name the module in an error that its layer raises."""
    try:
        yield
    except AdapterError as error:
        error.args = (f"{path}: {error}", *error.args[1:])
        raise


def base_parameter_file_name(name: str, layers: Container[str]) -> str:
    """The name of a base parameter as files and state dicts have it: inside the wrapper, where there is one."""
    path, _, attribute = name.rpartition(".")
    return _join(path, f"base_layer.{attribute}") if path in layers else name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def find_registry(model: nn.Module) -> AdapterRegistry | None:
    """The registry of a model that carries adapters, else None."""
    found = model.__dict__.get(_ATTRIBUTE)
    assert found is None or isinstance(found, AdapterRegistry)
    return found


def set_registry(model: nn.Module, registry: AdapterRegistry | None) -> None:
    """Remember the registry on the model, or forget it."""
    if registry is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = registry
