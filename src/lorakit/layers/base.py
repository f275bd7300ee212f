"""The layer that wraps a base module and carries its adapters.

Guarantees:
- `forward` reads one prepared tuple of adapter names, the route; it is rebuilt when adapters are set, enabled,
  merged or deleted, never inside `forward`.
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

from lorakit.errors import AdapterNameError, AdapterStateError, NonFiniteError, UnsupportedError
from lorakit.layers.factors import plain_linear
from lorakit.layers.finite import merge_is_finite
from lorakit.layers.follow import follow
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from lorakit.types import AdapterSpec
    from lorakit.weights import WeightCodec, WeightState


class PreparedMerge(NamedTuple):
    """A merge of one layer, computed and checked but not yet installed."""

    layer: LoraLayer
    names: tuple[str, ...]
    state: WeightState


class NamedAdapterTensor(NamedTuple):
    """Where one tensor of an adapter lives."""

    file_suffix: str
    """Name below the layer in a file, such as "lora_A.weight"."""
    owner: nn.Module
    """The module that holds the parameter."""
    attribute: str
    """Its name in `owner`."""
    state_suffix: str
    """Name below the layer in `state_dict()`, such as "lora_A.default.weight"."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = getattr(self.owner, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter


class LoraLayer(nn.Module, ABC):
    """A base module with any number of LoRA adapters (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
        base_layer: the wrapped module.
        lora_A, lora_B: the factors by adapter name, as bias-free Linears (B has a bias under `lora_bias`).
        lora_dropout: the dropout on the adapter's input by adapter name.
        r, lora_alpha, scaling, use_rslora, lora_bias: what each adapter was made with, by name. `scaling` may be
            changed and takes effect at the next forward.
        merged_adapters: names whose deltas are in the base weight now, in the order they were merged.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.codec = codec
        self.out_features, self.in_features = codec.shape(base_layer)
        self._active: tuple[str, ...] = ()
        self._enabled = True
        self._route: tuple[str, ...] = ()
        self._original: WeightState | None = None
        self._merged_state: WeightState | None = None
        self.training = base_layer.training
        self.register_state_dict_post_hook(_describe_unmerged)  # type: ignore[no-untyped-call]

    # ---- what a final subclass supplies -------------------------------------------------------------

    @abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the contributions of the routed adapters."""

    # ---- adapters -----------------------------------------------------------------------------------

    def add(self, name: str, factors: Factors, spec: AdapterSpec, *, use_rslora: bool) -> None:
        """Put an adapter on the layer, not yet active. The factors become its parameters."""
        assert name not in self.lora_A, f"{name!r} is already on this layer"
        self.r[name] = spec.r
        self.lora_alpha[name] = spec.lora_alpha
        self.scaling[name] = spec.scaling
        self.use_rslora[name] = use_rslora
        self.lora_bias[name] = factors.bias is not None
        self.lora_dropout[name] = nn.Dropout(spec.dropout) if spec.dropout > 0 else nn.Identity()
        self.lora_A[name] = plain_linear(factors.A)
        self.lora_B[name] = plain_linear(factors.B, factors.bias)
        for module in (self.lora_dropout[name], self.lora_A[name], self.lora_B[name]):
            module.training = self.training

    def remove(self, name: str) -> None:
        """Take an adapter off the layer.

        Raises:
            AdapterStateError: the adapter is merged.
        """
        if name in self.merged_adapters:
            raise AdapterStateError(f"adapter {name!r} is merged; call unmerge_adapter() before deleting it")
        for mapping in (self.lora_dropout, self.lora_A, self.lora_B):
            del mapping[name]
        for values in (self.r, self.lora_alpha, self.scaling, self.use_rslora, self.lora_bias):
            del values[name]
        self._active = tuple(active for active in self._active if active != name)
        self._install()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on this layer, in the order they were added."""
        return tuple(self.r)

    def tensors(self, name: str) -> Iterator[NamedAdapterTensor]:
        """The tensors of an adapter on this layer; none when it has no adapter of that name."""
        if name not in self.r:
            return
        for part, mapping in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            owner = mapping[name]
            for attribute, _ in owner.named_parameters(recurse=False):
                yield NamedAdapterTensor(
                    f"{part}.{attribute}", owner, attribute, f"{part}.{name}.{attribute}"
                )

    def factors(self, name: str) -> Factors:
        """The adapter's factors, sharing memory with its parameters.

        Raises:
            AdapterNameError: the layer has no adapter of that name.
        """
        self._check_known([name])
        A, B = self.lora_A[name], self.lora_B[name]
        assert isinstance(A, nn.Linear)
        assert isinstance(B, nn.Linear)
        bias = None if B.bias is None else B.bias.detach()
        return Factors(A.weight.detach(), B.weight.detach(), self.scaling[name], bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense change that the adapter makes to the base weight, in the layout and dtype of that weight."""
        delta = self.factors(adapter).delta().to(self.weight.dtype)
        return delta.T if self.codec.transposed(self.base_layer) else delta

    # ---- active, enabled, route ---------------------------------------------------------------------

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

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

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

    def set_requires_grad(self, names: Iterable[str], *, requires_grad: bool) -> None:
        """Set the flag on the parameters of these adapters."""
        for name in names:
            for tensor in self.tensors(name):
                tensor.parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Act with the adapters, or as the base; a merged layer gets its original weight for that time."""
        self._enabled = enabled
        self._install()

    # ---- merging ------------------------------------------------------------------------------------

    def prepare_merge(self, names: Sequence[str] | None = None) -> PreparedMerge | None:
        """Compute a merge without installing it; None when there is nothing to merge here.

        Adapters that are already merged are passed over. The result is always computed from the original
        weight, so any sequence of merges rounds once.

        Raises:
            UnsupportedError: the base cannot be written, or `lora_bias` has no bias to go into.
            NonFiniteError: the result would hold NaN or infinity.
            AdapterStateError: the layer was merged for good (by `merge_and_unload`).
        """
        new = self._mergeable(names)
        if not new:
            return None
        everything = (*self.merged_adapters, *new)
        factors = [self.factors(name) for name in everything]
        state = self.codec.merged(self.base_layer, self._original_state(), factors)
        # BLAS may treat a product with alpha = NaN as no product, so the scalings are looked at themselves
        numbers = [torch.tensor(part.scaling) for part in factors]
        tensors = [state.weight, *numbers] + ([] if state.bias is None else [state.bias])
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise self._non_finite(everything)
        return PreparedMerge(self, everything, state)

    def check_merge(self, names: Sequence[str] | None = None) -> None:
        """Everything that `prepare_merge` refuses, without keeping a result: at most one layer's memory."""
        new = self._mergeable(names)
        factors = [self.factors(name) for name in (*self.merged_adapters, *new)]
        if new and not merge_is_finite(self._original_state(), factors):
            self.prepare_merge(names)  # the bound proves nothing: compute it, and raise if it is so

    def commit_merge(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge, keeping the original parameters for `unmerge`."""
        self._original = self._original_state()
        self._merged_state = prepared.state
        self.merged_adapters[:] = prepared.names
        self._install()

    def commit_merge_for_good(self, prepared: PreparedMerge) -> None:
        """Install a prepared merge and let the original parameters go: there is no unmerge."""
        self.codec.swap(self.base_layer, prepared.state)
        self._original = self._merged_state = None
        self.merged_adapters[:] = prepared.names
        self._install()

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:  # noqa: ARG002 - the signature users know
        """Add the deltas of these adapters (default: the active ones) to the base weight.

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

    def _install(self) -> None:
        """Make the base hold what the present state says it should, and prepare the route."""
        if self._original is not None and self._merged_state is not None:
            self._put(self._merged_state if self._enabled else self._original)
        acting = self._active if self._enabled and not self.merged_adapters else ()
        self._route = tuple(name for name in acting if name in self.r)

    def _put(self, state: WeightState) -> None:
        """Install a state that was kept aside."""
        self.codec.swap(self.base_layer, self._moved(state))

    def _original_state(self) -> WeightState:
        return self.codec.state(self.base_layer) if self._original is None else self._moved(self._original)

    def _moved(self, state: WeightState) -> WeightState:
        """A state that was kept aside, brought to where the model was moved meanwhile."""
        for kept, acting in zip(state, self.codec.state(self.base_layer), strict=True):
            if kept is not None and acting is not None:
                follow(kept, acting)
        return state

    def _mergeable(self, names: Sequence[str] | None) -> list[str]:
        """The adapters among `names` that are here and not yet merged; refuses those that cannot be."""
        wanted = dict.fromkeys(self._active if names is None else names)
        new = [name for name in wanted if name in self.r and name not in self.merged_adapters]
        if not new:
            return new
        if self.merged_adapters and self._original is None:
            raise AdapterStateError(_FOR_GOOD)
        if not self.codec.can_write:
            raise UnsupportedError(
                f"cannot merge into a {self.codec.name} weight; load the base in full precision to merge"
            )
        if self.bias is None and any(self.lora_bias[name] for name in new):
            raise UnsupportedError(
                "cannot merge an adapter with lora_bias=True into a layer that has no bias; "
                "keep the adapter unmerged, or train it with lora_bias=False"
            )
        return new

    def _non_finite(self, names: Sequence[str]) -> NonFiniteError:
        culprits = [name for name in names if not _all_finite(self.factors(name))]
        what = (
            f"adapter {culprits} holds NaN or infinity" if culprits else "the sum overflows the base's dtype"
        )
        return NonFiniteError(
            f"merging {list(names)} would give NaN or infinity: {what}; nothing was changed"
        )

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.r]
        if unknown:
            raise AdapterNameError(f"no adapter named {unknown} on this layer; it has {list(self.r)}")

    # ---- the base, for models that look at it ---------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        """The wrapped module."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that look at it instead of calling the layer."""
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

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


def _all_finite(factors: Factors) -> bool:
    tensors = [factors.A, factors.B, torch.tensor(factors.scaling)]
    tensors += [] if factors.bias is None else [factors.bias]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _describe_unmerged(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Show the original parameters of a merged layer: its file must not hold the delta twice."""
    assert isinstance(module, LoraLayer)
    original = module._original
    if original is None:
        return
    for name, parameter in (("weight", original.weight), ("bias", original.bias)):
        key = f"{prefix}base_layer.{name}"
        if parameter is not None and key in state_dict:
            state_dict[key] = parameter.detach()
