"""A module whose weight can take changes in and give them back, bit for bit.

Guarantees:
- A merge computes its result beside the base weight and then exchanges references; the former parameters are
  kept, so unmerging gives back the very bits, whatever happened to the adapter meanwhile.
- While anything is merged, the layer computes with exactly the merged adapters; while adapters are disabled,
  with exactly the base, merged or not.
- `state_dict()` always describes the unmerged layer.
- A quantised weight is quantised again, and what that loses is measured; or it is merged into full precision, in a
  plain layer that takes the base's place and leaves the base as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.errors import AdapterStateError
from lorakit.layers.factors import begin
from lorakit.layers.hooks import outside_autocast
from lorakit.layers.prepared import Aside, PreparedMerge, non_finite, refuse_writing, standing_in
from lorakit.layers.standin import stand_in
from lorakit.ops import is_finite
from lorakit.report import MergeReport
from lorakit.weights import InFull

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lorakit.weights import WeightCodec, WeightState


class MergingLayer(nn.Module, ABC):
    """A wrapper around a module, with adapters that can be merged into its weight.

    Attributes:
        base_layer: the wrapped module.
        merged_adapters: names whose changes are in the base weight now, in the order they were merged.
    """

    base_layer: nn.Module
    codec: WeightCodec
    merged_adapters: list[str]
    _active: tuple[str, ...] = ()
    _enabled: bool = True
    _original: WeightState | None
    _merged_state: WeightState | None
    _aside: Aside | None
    _guards: Sequence[RemovableHandle] = ()

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        begin(self)
        self._modules["base_layer"] = base_layer
        self.__dict__.update(
            training=base_layer.training,
            codec=codec,
            merged_adapters=[],
            _original=None,
            _merged_state=None,
            _aside=None,
        )
        guards = () if isinstance(base_layer, MergingLayer) else codec.guard(base_layer)
        if guards:
            self._guards = guards
        self._state_dict_hooks[_HOOK] = _describe_unmerged

    # ---- what a subclass supplies -------------------------------------------------------------------

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on this layer, in the order they were added."""

    @abstractmethod
    def train_only(self, names: Collection[str]) -> None:
        """Let the parameters of these adapters want gradients, and no other adapter's."""

    @abstractmethod
    def _merged_into(
        self, state: WeightState, names: Sequence[str], codec: WeightCodec | InFull
    ) -> WeightState:
        """A new state: `state` with the changes of these adapters, as `codec` merges it."""

    @abstractmethod
    def _refuse_merge(self, names: Sequence[str]) -> None:
        """Raise for adapters that cannot be merged here; warn of what a merge does beside merging."""

    @abstractmethod
    def _numbers_of(self, name: str) -> list[Tensor]:
        """Every tensor of an adapter and its scaling, to find who is not finite."""

    @abstractmethod
    def _is_surely_finite(self, state: WeightState, names: Sequence[str]) -> bool:
        """Whether it is cheaply proved that merging gives finite numbers."""

    @abstractmethod
    def _reroute(self) -> None:
        """Prepare what the forward reads, after names, active ones, enabled or merged changed."""

    # ---- the base -----------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The wrapped module of the model, below any further wrappers."""
        base = self.base_layer
        return base.get_base_layer() if isinstance(base, MergingLayer) else base

    def stored_base(self) -> nn.Module:
        """The base whose weight the codec knows, also while a layer in full precision stands in for it."""
        return self.get_base_layer() if self._aside is None else self._aside.base

    def release(self) -> None:
        """Take the layer's hooks off the base, which is about to be without the layer."""
        for handle in self._guards:
            handle.remove()

    # ---- active and enabled ---------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the model's active adapters; this layer need not have them all."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer acts as its base."""
        return not self._enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, unless `inference_mode`, the trainable ones.

        The layer need not have all of them: an adapter need not be on every layer.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if self.merged_adapters:
            self.unmerge()
        self.__dict__["_active"] = active = tuple(names)
        self.train_only(() if inference_mode else active)
        self._install()

    def enable_adapters(self, enabled: bool) -> None:
        """Act with the adapters, or as the base; a merged layer gets its original weight for that time."""
        self.__dict__["_enabled"] = enabled
        self._install()

    # ---- merging ------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def prepare_merge(
        self, names: Sequence[str] | None = None, full: torch.dtype | None = None, *, spent: bool = False
    ) -> PreparedMerge | None:
        """Compute a merge without installing it; None when there is nothing to merge here.

        Adapters that are already merged are passed over. The result is always computed from the original
        weight, so any sequence of merges rounds once.

        Args:
            names: default the active ones.
            full: of a quantised base, the dtype of the layer that is to stand in for it; None quantises again.
            spent: the merge was checked (`check_merge`) and no other layer needs the original weight, so the
                result may lie where it lies, written there by `commit_merge_for_good`.

        Raises:
            UnsupportedError: the base cannot be written, or an adapter has no place in it.
            NonFiniteError: the result would hold NaN or infinity.
            AdapterStateError: the layer was merged for good (by `merge_and_unload`).
        """
        new = self.mergeable(names)
        if not new:
            return None
        everything = (*self.merged_adapters, *new)
        original = self._original_state()
        codec = InFull(self.codec, full) if self.codec.on_grid and full is not None else self.codec
        in_full = codec is not self.codec
        if not self.codec.can_write and not in_full:
            refuse_writing(self.codec, self.stored_base())
        with outside_autocast(original.weight.device):
            state = self._merged_into(original._replace(spent=spent), everything, codec)
        plain = standing_in(state, training=self.training) if in_full else None
        if spent:
            return PreparedMerge(self, everything, state, plain)
        # BLAS may treat a product with alpha = NaN as no product, so the adapters' own numbers are looked at too
        culprits = [name for name in everything if not is_finite(*self._numbers_of(name))]
        numbers = [] if self.codec.on_grid and not in_full else [state.weight]
        if state.bias is not None:
            numbers.append(state.bias)
        if culprits or not math.isfinite(state.error) or not is_finite(*numbers):
            raise non_finite(everything, culprits)
        return PreparedMerge(self, everything, state, plain)

    def prepare_alike(self, done: PreparedMerge) -> PreparedMerge:
        """The same merge for a layer whose weight and changes are those of the layer of `done` (tied ones)."""
        return PreparedMerge(self, done.names, self._original_state()._replace(weight=done.state.weight))

    def check_merge(
        self, names: Sequence[str] | None = None, full: torch.dtype | None = None
    ) -> float | None:
        """Everything that `prepare_merge` refuses, without keeping a result: at most one layer's memory.

        Returns:
            `PreparedMerge.error`.
        """
        new = self.mergeable(names)
        everything = (*self.merged_adapters, *new)
        if not new or (not self.codec.on_grid and self._is_surely_finite(self._original_state(), everything)):
            return None
        prepared = self.prepare_merge(
            names, full
        )  # the bound proves nothing: compute it, and raise if it is so
        return None if prepared is None else prepared.error

    def commit_merge(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge, keeping the original parameters for `unmerge`."""
        original = self._original_state()
        self._put_original()
        self._original = original
        self._merged_state = prepared.state
        self._aside = None if prepared.plain is None else Aside(self.get_base_layer(), prepared.plain)
        self.merged_adapters[:] = prepared.names
        self._install()

    def commit_merge_for_good(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge and let the original parameters go: there is no unmerge.

        Once begun it is carried through; what interrupts it is raised then.
        """
        try:
            self._settle(prepared)
        except BaseException:
            self._settle(prepared)
            raise

    def _settle(self, prepared: PreparedMerge) -> None:
        self._put_original()
        if prepared.state.pending is not None:
            prepared.state.pending.carry_on()
        if prepared.plain is None:
            self.codec.swap(self.get_base_layer(), prepared.state)
        else:
            self.base_layer = prepared.plain
        self._original = self._merged_state = None
        self.merged_adapters[:] = prepared.names
        self._install()

    def merge(
        self,
        safe_merge: bool = False,  # noqa: ARG002 - the signature users know
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add the changes of these adapters (default: the active ones) to the base weight.

        Results are always checked to be finite before anything is written, so `safe_merge` changes nothing.

        Raises:
            LossyMergeError: the base is quantised, and quantising it again would lose too much.
            UnsupportedError, NonFiniteError, AdapterStateError: as `prepare_merge`.
        """
        prepared = self.prepare_merge(adapter_names)
        if prepared is not None:
            if prepared.error is not None:
                MergeReport({"": prepared.error}).check()
            self.commit_merge(prepared)

    def unmerge(self) -> None:
        """Put the original parameters back: the same bits as before the first merge.

        Raises:
            AdapterStateError: the layer was merged for good (by `merge_and_unload`).
        """
        if not self.merged_adapters:
            return
        if self._original is None:
            raise AdapterStateError(_FOR_GOOD)
        self._put_original()
        self._original = self._merged_state = None
        self.merged_adapters.clear()
        self._install()

    def mergeable(self, names: Sequence[str] | None) -> list[str]:
        """The adapters among `names` that are here and not yet merged; refuses those that cannot be."""
        wanted = dict.fromkeys(self._active if names is None else names)
        here = self.adapters
        new = [name for name in wanted if name in here and name not in self.merged_adapters]
        if new and self.merged_adapters and self._original is None:
            raise AdapterStateError(_FOR_GOOD)
        if new:
            self._refuse_merge(new)
        return new

    def check_unmerged(self, name: str, what: str) -> None:
        """Refuse `what`, which would change a merged adapter.

        Raises:
            AdapterStateError: the adapter is merged here.
        """
        if name in self.merged_adapters:
            raise AdapterStateError(f"adapter {name!r} is merged; call unmerge_adapter() before {what}")

    def _install(self) -> None:
        """Make the base hold what the present state says it should, and prepare the route."""
        if self._aside is not None:
            self.base_layer = self._aside.plain if self._enabled else self._aside.base
        elif self._original is not None and self._merged_state is not None:
            self._put(self._merged_state if self._enabled else self._original)
        self._reroute()

    def _put(self, state: WeightState) -> None:
        """Install a state that was kept aside."""
        base = self.get_base_layer()
        self.codec.swap(base, self.codec.moved(base, state))

    def _put_original(self) -> None:
        """Let the base be as it was before any merge."""
        if self._aside is not None:
            device = next(self._aside.plain.parameters()).device
            if device.type != "meta" and self._original_state().weight.device != device:
                self._aside.base.to(device)  # the model was moved while it was merged
            self.base_layer, self._aside = self._aside.base, None
        elif self._original is not None:
            self._put(self._original)

    def _original_state(self) -> WeightState:
        base = self.stored_base()
        if self._original is None or self._aside is not None:
            return self.codec.state(base)
        return self.codec.moved(base, self._original)

    # ---- as a module ----------------------------------------------------------------------------------

    def unmerged_parameters(self) -> dict[str, nn.Parameter]:
        """The original parameters of a merged layer by their names below it; none while it is not merged."""
        if self._original is None:
            return {}
        prefix, base = "base_layer.", self.base_layer
        while isinstance(base, MergingLayer):
            prefix, base = prefix + "base_layer.", base.base_layer
        kept: list[nn.Parameter | None] = [self._original.weight, self._original.bias]
        return {
            prefix + name: value
            for name, value in zip(self.codec.names, kept, strict=True)
            if value is not None
        }

    def describe_original(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Let a state dict hold what the quantised base of a merged layer held before, under its own names."""
        if self._original is None:
            return
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]
        base = self.stored_base()
        if self._aside is None:
            base = stand_in(base, {})
            self.codec.swap(base, self._original)
        base.state_dict(destination=state_dict, prefix=prefix)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.merged_adapters:
            raise AdapterStateError("this layer is merged; call unmerge_adapter() before load_state_dict()")
        super()._load_from_state_dict(*args)

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


_FOR_GOOD = (
    "this layer was merged by merge_and_unload(), which keeps no original weight; "
    "call merge_and_unload() again to finish it, or load the base model afresh"
)


_HOOK = -1
"""The key of the hook below. Torch counts its own keys from 0, and registering takes as long as making a module."""


def _describe_unmerged(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Show the original parameters of a merged layer: its file must not hold the delta twice."""
    assert isinstance(module, MergingLayer)
    if module.codec.on_grid:
        module.describe_original(state_dict, prefix + "base_layer.")
        return
    for name, parameter in module.unmerged_parameters().items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = parameter.detach()
