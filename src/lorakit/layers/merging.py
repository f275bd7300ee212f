"""A module whose weight can take changes in and give them back, bit for bit.

Guarantees:
- A merge computes its result beside the base weight and then exchanges references; the former parameters are
  kept, so unmerging gives back the very bits, whatever happened to the adapter meanwhile.
- While anything is merged, the layer computes with exactly the merged adapters; while adapters are disabled,
  with exactly the base, merged or not.
- `state_dict()` always describes the unmerged layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lorakit.errors import AdapterStateError, NonFiniteError
from lorakit.layers.follow import follow
from lorakit.layers.hooks import outside_autocast

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lorakit.weights import WeightCodec, WeightState


class PreparedMerge(NamedTuple):
    """A merge of one layer, computed and checked but not yet installed."""

    layer: MergingLayer
    names: tuple[str, ...]
    state: WeightState


class MergingLayer(nn.Module, ABC):
    """A wrapper around a module, with adapters that can be merged into its weight.

    Attributes:
        base_layer: the wrapped module.
        merged_adapters: names whose changes are in the base weight now, in the order they were merged.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.codec = codec
        self.merged_adapters: list[str] = []
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self._original: WeightState | None = None
        self._merged_state: WeightState | None = None
        self.training = base_layer.training
        self.register_state_dict_post_hook(_describe_unmerged)  # type: ignore[no-untyped-call]

    # ---- what a subclass supplies -------------------------------------------------------------------

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on this layer, in the order they were added."""

    @abstractmethod
    def set_requires_grad(self, names: Iterable[str], *, requires_grad: bool) -> None:
        """Set the flag on the parameters of these adapters."""

    @abstractmethod
    def _merged_into(self, state: WeightState, names: Sequence[str]) -> WeightState:
        """A new state: `state` with the changes of these adapters."""

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
        self._active = tuple(names)
        for name in self.adapters:
            self.set_requires_grad([name], requires_grad=name in self._active and not inference_mode)
        self._install()

    def enable_adapters(self, enabled: bool) -> None:
        """Act with the adapters, or as the base; a merged layer gets its original weight for that time."""
        self._enabled = enabled
        self._install()

    # ---- merging ------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def prepare_merge(self, names: Sequence[str] | None = None) -> PreparedMerge | None:
        """Compute a merge without installing it; None when there is nothing to merge here.

        Adapters that are already merged are passed over. The result is always computed from the original
        weight, so any sequence of merges rounds once.

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
        with outside_autocast(original.weight.device):
            state = self._merged_into(original, everything)
        tensors = [state.weight] + ([] if state.bias is None else [state.bias])
        # BLAS may treat a product with alpha = NaN as no product, so the adapters' own numbers are looked at too
        culprits = [name for name in everything if not _all_finite(self._numbers_of(name))]
        if culprits or not _all_finite(tensors):
            raise _non_finite(everything, culprits)
        return PreparedMerge(self, everything, state)

    def prepare_alike(self, done: PreparedMerge) -> PreparedMerge:
        """The same merge for a layer whose weight and changes are those of the layer of `done` (tied ones)."""
        return PreparedMerge(self, done.names, self._original_state()._replace(weight=done.state.weight))

    def check_merge(self, names: Sequence[str] | None = None) -> None:
        """Everything that `prepare_merge` refuses, without keeping a result: at most one layer's memory."""
        new = self.mergeable(names)
        everything = (*self.merged_adapters, *new)
        if new and not self._is_surely_finite(self._original_state(), everything):
            self.prepare_merge(names)  # the bound proves nothing: compute it, and raise if it is so

    def commit_merge(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge, keeping the original parameters for `unmerge`."""
        self._original = self._original_state()
        self._merged_state = prepared.state
        self.merged_adapters[:] = prepared.names
        self._install()

    def commit_merge_for_good(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge and let the original parameters go: there is no unmerge."""
        self.codec.swap(self.get_base_layer(), prepared.state)
        self._original = self._merged_state = None
        self.merged_adapters[:] = prepared.names
        self._install()

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:  # noqa: ARG002 - the signature users know
        """Add the changes of these adapters (default: the active ones) to the base weight.

        Results are always checked to be finite before anything is written, so `safe_merge` changes nothing.

        Raises:
            As `prepare_merge`.
        """
        prepared = self.prepare_merge(adapter_names)
        if prepared is not None:
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
        self._put(self._original)
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
        if self._original is not None and self._merged_state is not None:
            self._put(self._merged_state if self._enabled else self._original)
        self._reroute()

    def _put(self, state: WeightState) -> None:
        """Install a state that was kept aside."""
        self.codec.swap(self.get_base_layer(), self._moved(state))

    def _original_state(self) -> WeightState:
        if self._original is None:
            return self.codec.state(self.get_base_layer())
        return self._moved(self._original)

    def _moved(self, state: WeightState) -> WeightState:
        """A state that was kept aside, brought to where the model was moved meanwhile."""
        acting = self.codec.state(self.get_base_layer())
        follow(state.weight, acting.weight)
        if state.bias is not None and acting.bias is not None:
            follow(state.bias, acting.bias)
        return state

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


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _non_finite(names: Sequence[str], culprits: Sequence[str]) -> NonFiniteError:
    what = f"adapter {culprits} holds NaN or infinity" if culprits else "the sum overflows the base's dtype"
    return NonFiniteError(f"merging {list(names)} would give NaN or infinity: {what}; nothing was changed")


def _describe_unmerged(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Show the original parameters of a merged layer: its file must not hold the delta twice."""
    assert isinstance(module, MergingLayer)
    for name, parameter in module.unmerged_parameters().items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = parameter.detach()


def as_tensor(value: float | Tensor) -> Tensor:
    """A scaling as a tensor, so that it can be checked with the tensors of its adapter."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)
