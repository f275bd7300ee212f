"""Which adapters a model carries and where: written once at attach time, read by every later operation.

No operation walks the model again to find its layers, so none grows with the size of the rest of the model.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from lorakit.errors import AdapterNameError, AdapterStateError, UnsupportedError, at_path
from lorakit.layers import Owner, ParamWrapper
from lorakit.layers.slot import single_owner
from lorakit.layers.switchboard import Switchboard, switch
from lorakit.layers.tied import merged_with
from lorakit.layers.tokens import TokenRows
from lorakit.report import MergeReport
from lorakit.surgery.naming import Names
from lorakit.surgery.paths import joined
from lorakit.weights.dense import is_dense

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor, nn

    from lorakit.config import LoraConfig
    from lorakit.init import Misfit
    from lorakit.layers import LoraLayer, MergingLayer, ModulesToSaveWrapper, ParameterSlot, PreparedMerge
    from lorakit.layers.slot import Place
    from lorakit.surgery.replicate import Replication

_ATTRIBUTE = "_lorakit_registry"


class StoredTensor(NamedTuple):
    """One tensor of an adapter, under the names it has in a file and in the model's state dict.

    The second is empty for a tensor that is another one of the adapter, seen from a tied module.
    """

    file_name: str
    state_name: str
    tensor: Tensor


class AdapterRegistry:
    """The adapters of one model.

    Attributes:
        model: the model whose modules were wrapped.
        configs: the config of each adapter, by name.
        layers: every `LoraLayer`, by the path of the module or the bare parameter that it changes.
        saved: every `ModulesToSaveWrapper`, by path.
        slots: every base parameter that an adapter replaces, by its name in the base model.
        places: where each wrapper sits, by path.
        flags: the `requires_grad` flag that each base parameter had before the first adapter came.
        shared: names of base parameters that were one and the same then, for each such parameter.
        active: names of the active adapters.
        enabled: whether adapters act at all.
        owner: stands for the model in what a call chooses for itself.
        board: where layers hold the adapters' parameters, for `set_active`.
        replication: the deeper list of layers that the adapters are for, or None.
        misfits: by adapter and path how well a base that its scheme quantised, and it, stand for the weight before.
        checkpointing: modules that may run their layers again in backward, once somebody asked; else None.
        merge_report: what the last merge lost by quantising again; None before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.configs: dict[str, LoraConfig] = {}
        self.layers: dict[str, LoraLayer] = {}
        self.saved: dict[str, ModulesToSaveWrapper] = {}
        self.slots: dict[str, ParameterSlot] = {}
        self.places: dict[str, tuple[Place, ...]] = {}
        self.flags: dict[str, bool] = {}
        self.shared: tuple[tuple[str, ...], ...] = ()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.owner = Owner()
        self.board = Switchboard()
        self.replication: Replication | None = None
        self.checkpointing: list[nn.Module] | None = None
        self.misfits: dict[str, dict[str, Misfit]] = {}
        self.merge_report: MergeReport | None = None

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
        for path, layer in self.layers.items():
            rows = layer._modules["token_adapter"]  # as an attribute it costs ten times as much
            if isinstance(rows, TokenRows):
                with at_path(path):
                    rows.check_apart(names)

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
        self.board = switch(
            self.board, self.layers.values(), self.configs.keys(), names, trains=not inference_mode
        )
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

    def merge(
        self, names: Sequence[str] | None = None, *, force: bool = False, dequantize: bool = False
    ) -> MergeReport:
        """Merge adapters (default: the active ones) in every layer, or in none.

        Args:
            names: of the adapters.
            force: accept whatever quantising again loses.
            dequantize: leave quantised layers in full precision instead.

        Returns:
            What quantising again lost; also kept as `merge_report`.

        Raises:
            LossyMergeError: a quantised layer would lose too much; nothing was changed.
            AdapterNameError, AdapterStateError, UnsupportedError, NonFiniteError: with the module path; nothing was
                changed.
        """
        names = self.mergeable(names)
        self.check_can_merge(names)
        prepared: dict[MergingLayer, PreparedMerge] = {}
        errors: dict[str, float] = {}
        for path, layer in self.in_merge_order():
            with at_path(path):
                found = self.prepare(layer, names, prepared, self.full_dtype(layer) if dequantize else None)
            if found is not None:
                prepared[layer] = found
                if found.error is not None:
                    errors[path] = found.error
        report = MergeReport(errors)
        if not force:
            report.check()
        for merge in prepared.values():
            merge.layer.commit_merge(merge)
        self.merge_report = report
        return report

    def full_dtype(self, layer: LoraLayer) -> torch.dtype:
        """The dtype for a layer that is to stand in for a quantised one.

        That of the base's first floating-point parameter, by which what the layer is called with goes: transformers
        calls it the model's. Where no such is left, that of the numbers that the layer's own weight stands for.
        """
        for name, parameter in self.model.named_parameters():
            if name in self.flags and is_dense(parameter):
                return parameter.dtype
        return layer.codec.dtype(layer.stored_base())

    def in_merge_order(self) -> list[tuple[str, LoraLayer]]:
        """The layers by path, those that take their tensors from another one after it."""
        return sorted(self.layers.items(), key=lambda item: item[1].is_tied)

    def prepare(
        self,
        layer: LoraLayer,
        names: Sequence[str],
        prepared: dict[MergingLayer, PreparedMerge],
        full: torch.dtype | None = None,
    ) -> PreparedMerge | None:
        """A merge of one layer; that of a tied one whose weight and changes are another's is the other's."""
        source = merged_with(layer, [*self.merged, *names])
        done = None if source is None else prepared.get(source)
        if done is None:
            return layer.prepare_merge(names, full)
        return layer.prepare_alike(done) if layer.mergeable(names) else None

    def check_can_merge(self, names: Sequence[str]) -> None:
        """Refuse merging where it has no place, or where two adapters are owners of one thing.

        Raises:
            UnsupportedError: the layers are replicated, so copies with different adapters share one weight.
            AdapterStateError: two of the adapters, and of those merged already, replace the same token.
        """
        if self.replication is not None and names:
            raise UnsupportedError(
                f"cannot merge {list(names)}: layer_replication makes several layers share one weight, and each has "
                "factors of its own; keep the adapter unmerged, or copy the base's layers first and train on those"
            )
        for path, layer in self.layers.items():
            if layer.token_adapter is not None:
                with at_path(path):
                    layer.token_adapter.check_apart([*layer.merged_adapters, *names])

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
        own, everywhere = self.names(name), self.names()
        for path, layer in self.layers.items():
            for item in layer.tensors(name):
                state = item.state_suffix and joined(everywhere.layer(path), item.state_suffix)
                yield StoredTensor(joined(own.layer(path), item.file_suffix), state, item.tensor)
        for path, wrapper in self.saved.items():
            for key, tensor in wrapper.tensors(name):
                yield StoredTensor(joined(path, key), joined(path, f"modules_to_save.{name}.{key}"), tensor)
        for parameter, slot in self.slots.items():
            if name in slot.copies:
                yield StoredTensor(
                    own.parameter(parameter), everywhere.parameter(parameter), slot.copies[name]
                )

    def frozen(self, adapter: str) -> set[int]:
        """The `id`s of the adapter's parameters that are never trained."""
        layers = [layer for layer in self.layers.values() if adapter in layer.frozen]
        return {id(tensor) for layer in layers for tensor in layer.frozen_tensors(adapter)}

    def names(self, adapter: str | None = None) -> Names:
        """Where things are inside the model, counting all wrappers, or only those that carry one adapter."""
        mine = {
            path: layer for path, layer in self.layers.items() if adapter is None or adapter in layer.adapters
        }
        parameters = {
            path: layer.get_base_layer() for path, layer in mine.items() if isinstance(layer, ParamWrapper)
        }
        return Names.of(mine.keys() - parameters.keys(), parameters)

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
        if not self.configs:
            self.replicate(None)
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
        self.misfits.pop(name, None)
        self.board.forget(name)
        for path, layer in list(self.layers.items()):
            if name in layer.adapters:
                layer.remove(name)
            if not layer.adapters:
                self.unwrap(path)
                del self.layers[path]
        for path, wrapper in list(self.saved.items()):
            if name in wrapper.modules_to_save:
                wrapper.remove(name)
            if not wrapper.modules_to_save:
                self.put(self.places.pop(path, ()), wrapper.original_module)
                del self.saved[path]
        self._discard_slots(name)

    def _discard_slots(self, name: str) -> None:
        for key, slot in list(self.slots.items()):
            if name in slot.copies:
                slot.remove(name)
            if not slot.copies:
                slot.restore()
                del self.slots[key]

    def install(self, path: str, places: tuple[Place, ...], wrapper: nn.Module) -> None:
        """Put a wrapper in place, and remember where."""
        self.places[path] = places
        self.put(places, wrapper)

    def unwrap(self, path: str) -> None:
        """Take a layer off: what it wraps, be it another wrapper of the same module, takes its place."""
        places = self.places.pop(path, ())
        self.board = Switchboard()  # it would keep the layer
        self.layers[path].release()
        inner = self.layers[path].base_layer
        self.put(places, inner)
        if isinstance(inner, ParamWrapper):
            below = next(name for name, layer in self.layers.items() if layer is inner)
            self.places[below] = places

    @staticmethod
    def put(places: tuple[Place, ...], module: nn.Module) -> None:
        """Put a module where places are."""
        for place in places:
            place.put(module)

    def replicate(self, replication: Replication | None) -> None:
        """Put a deeper list of layers in place, or the base's own back."""
        if self.replication is not None:
            self.replication.undo()
        self.replication = replication
        if replication is not None:
            replication.install()


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
