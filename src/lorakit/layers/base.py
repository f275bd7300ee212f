"""The layer that wraps a base module and carries its adapters.

Guarantees, beside those of `MergingLayer`:
- `forward` reads one prepared tuple of adapter names, the route; it is rebuilt when adapters are set, enabled,
  merged or deleted, never inside `forward`.
- A call may choose its own adapters (`chosen`), for all samples or for each; nothing of that stays in the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lorakit.errors import AdapterNameError, UnsupportedError
from lorakit.layers.chosen import Live, Owner, chosen_by
from lorakit.layers.factors import let_go
from lorakit.layers.finite import merge_is_finite
from lorakit.layers.hooks import outside_autocast
from lorakit.layers.merging import MergingLayer, as_tensor
from lorakit.layers.tokens import TokenRows
from lorakit.specs import FILE_NAMES, TOKEN_ROWS, scaling_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lorakit.layers.chosen import Chosen
    from lorakit.specs import AdapterSpec
    from lorakit.types import Factors
    from lorakit.weights import WeightCodec, WeightState


class NamedAdapterTensor(NamedTuple):
    """One tensor of an adapter on a layer."""

    file_suffix: str
    """Name below the layer in a file, such as "lora_A.weight"."""
    state_suffix: str
    """Name below the layer in `state_dict()`, such as "lora_A.default.weight"; empty if it is another layer's."""
    tensor: Tensor
    """The parameter itself; of a tied layer a transposed view of another layer's."""


class Stored(NamedTuple):
    """The factors of one adapter as they are stored on a layer."""

    A: Tensor
    B: Tensor
    bias: Tensor | None


class LoraLayer(MergingLayer):
    """A base module with any number of LoRA adapters (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
        base_layer: the wrapped module.
        lora_dropout: the dropout on the adapter's input by adapter name.
        r, lora_alpha, scaling, use_rslora, lora_bias: what each adapter was made with, by name. `scaling` may be
            changed and takes effect at the next forward.
        layout: shapes of the weight and the factors.
        token_adapter: rows of the weight that adapters replace (`trainable_token_indices`), or None.
        tied, tied_rows: the layer whose factors, or rows, are also this one's, by adapter name.
        merged_adapters: names whose deltas are in the base weight now, in the order they were merged.
    """

    token_adapter: TokenRows | None

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, Any] = {}  # floats; tensors (0-d) once prepared for hot-swapping
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.layout = codec.layout(self.get_base_layer())
        self.out_features, self.in_features = self.layout.out, self.layout.row[0]
        self.register_module("token_adapter", None)
        self.owner = Owner()
        self.tied: dict[str, LoraLayer] = {}
        self.tied_rows: dict[str, LoraLayer] = {}
        self._route: tuple[str, ...] = ()

    # ---- what a final subclass supplies -------------------------------------------------------------

    @abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus the contributions of the routed adapters."""

    @abstractmethod
    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        """Make the parameters of an adapter out of these very tensors, of the layout's shapes."""

    @abstractmethod
    def _let_go(self, name: str) -> None:
        """Drop the parameters of an adapter."""

    @abstractmethod
    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        """The parameters "A", "B" and maybe "bias" of an adapter, each with its name below the layer."""

    # ---- adapters -----------------------------------------------------------------------------------

    def add(self, name: str, factors: Sequence[Factors], spec: AdapterSpec, *, use_rslora: bool) -> None:
        """Put an adapter on the layer, not yet active. The factors' tensors become its parameters.

        Args:
            name: of the adapter.
            factors: one pair for each block of the layout.
            spec: what was planned here.
            use_rslora: how `scaling` follows from `lora_alpha`.
        """
        self._note(name, spec, use_rslora=use_rslora)
        A, B, bias = self.layout.join(factors)
        self._hold(name, A, B, bias)
        self.lora_bias[name] = bias is not None
        self._match_mode(name)

    def add_tied(self, name: str, source: LoraLayer, spec: AdapterSpec, *, use_rslora: bool) -> None:
        """Use the factors of another layer, transposed: a head tied to the embedding that carries the adapter."""
        self._note(name, spec, use_rslora=use_rslora)
        self.tied[name] = source
        self.lora_bias[name] = False
        self._match_mode(name)

    def _note(self, name: str, spec: AdapterSpec, *, use_rslora: bool) -> None:
        assert name not in self.r, f"{name!r} is already on this layer"
        self.r[name] = spec.r
        self.lora_alpha[name] = spec.lora_alpha
        self.scaling[name] = spec.scaling
        self.use_rslora[name] = use_rslora
        self.lora_dropout[name] = nn.Dropout(spec.dropout) if spec.dropout > 0 else nn.Identity()

    def _match_mode(self, name: str) -> None:
        self.lora_dropout[name].training = self.training
        for module in self.modules_of(name):
            module.training = self.training

    def modules_of(self, name: str) -> tuple[nn.Module, ...]:
        """The modules that hold an adapter's factors, where modules hold them."""
        holders = (self._modules.get(part) for part in ("lora_A", "lora_B"))
        return tuple(
            holder[name] for holder in holders if isinstance(holder, nn.ModuleDict) and name in holder
        )

    def original_rows(self, indices: Sequence[int]) -> Tensor:
        """Rows of the unmerged weight, copied."""
        weight = self.original_weight.detach()
        return weight.index_select(0, torch.tensor(list(indices), device=weight.device))

    def add_rows(
        self, name: str, indices: Sequence[int], rows: Tensor | None, source: LoraLayer | None
    ) -> None:
        """Let an adapter replace rows of the weight by `rows`, or by those of `source`; see `TokenRows`."""
        if self.token_adapter is None:
            self.token_adapter = TokenRows()
        if rows is not None:
            self.token_adapter.add(name, indices, rows)
            return
        assert source is not None
        assert source.token_adapter is not None
        self.tied_rows[name] = source
        self.token_adapter.tie(name, source.token_adapter)

    def remove(self, name: str) -> None:
        """Take an adapter off the layer.

        Raises:
            AdapterStateError: the adapter is merged.
        """
        self.check_unmerged(name, "deleting it")
        if name in self.r:
            self.tied.pop(name, None)
            self._let_go(name)
            let_go(name, self.lora_dropout)
            for values in (self.r, self.lora_alpha, self.scaling, self.use_rslora, self.lora_bias):
                values.pop(name, None)
        if self.token_adapter is not None:
            self.tied_rows.pop(name, None)
            self.token_adapter.remove(name)
            if not self.token_adapter.adapters:
                self.token_adapter = None
        self._active = tuple(active for active in self._active if active != name)
        self._install()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on this layer: those with factors, then those with rows alone."""
        rows = self.token_adapter.adapters if self.token_adapter is not None else ()
        return tuple(dict.fromkeys((*self.r, *rows)))

    def tensors(self, name: str) -> Iterator[NamedAdapterTensor]:
        """The tensors of an adapter on this layer; none when it has no adapter of that name."""
        if name in self.tied:
            A, B, _ = self.stored(name)
            names = FILE_NAMES["embedding" if self._lies_as(self.tied[name]) else ""]
            yield NamedAdapterTensor(names["A"], "", A)
            yield NamedAdapterTensor(names["B"], "", B)
        elif name in self.r:
            for state_suffix, parameter in self._held(name).values():
                yield NamedAdapterTensor(state_suffix.replace(f".{name}", "", 1), state_suffix, parameter)
        if self.token_adapter is not None and name in self.token_adapter.trainable_tokens_delta:
            rows = self.token_adapter.trainable_tokens_delta[name]
            yield NamedAdapterTensor(TOKEN_ROWS, f"{TOKEN_ROWS}.{name}", rows)

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an adapter that this layer itself holds."""
        for item in self.tensors(name):
            if isinstance(item.tensor, nn.Parameter):
                yield item.tensor

    def set_requires_grad(self, names: Iterable[str], *, requires_grad: bool) -> None:
        """Set the flag on the parameters of these adapters."""
        for name in names:
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(requires_grad)

    def stored(self, name: str) -> Stored:
        """The adapter's A, B and bias, of the layout's shapes; differentiable.

        Raises:
            AdapterNameError: the layer has no factors of that name.
        """
        if name in self.tied:
            A, B, _ = self.tied[name].stored(name)
            return Stored(A, B, None) if self._lies_as(self.tied[name]) else Stored(B.t(), A.t(), None)
        if name not in self.r:
            raise AdapterNameError(f"no adapter named {name!r} on this layer; it has {list(self.r)}")
        held = self._held(name)
        return Stored(held["A"][1], held["B"][1], held["bias"][1] if "bias" in held else None)

    def blocks(self, name: str) -> tuple[Factors, ...]:
        """The adapter's factors for each block of the layout, detached, sharing memory with its parameters."""
        A, B, bias = self.stored(name)
        return self.layout.split(
            A.detach(), B.detach(), float(self.scaling[name]), None if bias is None else bias.detach()
        )

    def factors(self, name: str) -> Factors:
        """The adapter's one pair of factors, sharing memory with its parameters.

        Raises:
            AdapterNameError: the layer has no adapter of that name.
            UnsupportedError: the layer has several pairs; see `blocks`.
        """
        found = self.blocks(name)
        if len(found) > 1:
            raise UnsupportedError(f"this layer has {len(found)} pairs of factors; call blocks()")
        return found[0]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense change that the adapter makes to the base weight, in the shape and dtype of that weight.

        That of a grouped convolution mixes all input channels: (out, in_channels, *kernel), as if ungrouped.
        """
        base = self.codec.state(self.get_base_layer()).weight
        A, B, _ = self.stored(adapter)
        wide = torch.promote_types(base.dtype, torch.float32)
        with outside_autocast(A.device):
            delta = self.layout.dense(A.detach().to(wide), B.detach().to(wide))
        return (delta * float(self.scaling[adapter])).to(base.dtype)

    @property
    def is_tied(self) -> bool:
        """Whether any adapter's tensors here are another layer's."""
        return bool(self.tied or self.tied_rows)

    @property
    def original_weight(self) -> nn.Parameter:
        """The weight as it was before any merge."""
        return self._original_state().weight

    def _lies_as(self, source: LoraLayer) -> bool:
        """Whether a tied layer holds the weight the same way round as its source: an embedding, not a head."""
        return self.layout.transposed == source.layout.transposed

    # ---- scaling --------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter to `scale` times what its `lora_alpha` and `r` say; nothing where it is not here.

        Raises:
            AdapterStateError: the adapter is merged.
        """
        if adapter in self.scaling:
            self._rescale({adapter: scale * self._own_scaling(adapter)})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter.

        Raises:
            AdapterStateError: one of them is merged.
        """
        if scale != 1:
            here = [name for name in self._active if name in self.scaling]
            self._rescale({name: self.scaling[name] * scale for name in here})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter, or bring it back to what `lora_alpha` and `r` say.

        Raises:
            AdapterStateError: one of them is merged.
        """
        here = [name for name in self._active if name in self.scaling]
        own = {name: self._own_scaling(name) for name in here}
        self._rescale(own if scale is None else {name: self.scaling[name] / scale for name in here})

    def _own_scaling(self, name: str) -> float:
        return scaling_of(self.r[name], self.lora_alpha[name], rslora=self.use_rslora[name])

    def _rescale(self, values: Mapping[str, float]) -> None:
        for name in values:
            self.check_unmerged(name, "changing its scaling")
        for name, value in values.items():
            current = self.scaling[name]
            if isinstance(current, torch.Tensor):  # for hot-swapping: a compiled graph holds this very tensor
                current.fill_(float(value))
            else:
                self.scaling[name] = value

    # ---- route ----------------------------------------------------------------------------------------

    def _reroute(self) -> None:
        acting = self._active if self._enabled and not self.merged_adapters else ()
        self._route = self._present(acting)

    def _present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some adapters that are on this layer."""
        here = self.adapters
        return tuple(name for name in names if name in here)

    def acting(self) -> tuple[tuple[str, ...], Chosen | None]:
        """The adapters that act in the running call, and its choice if that is one for each sample."""
        # a layer that is disabled has no choice
        chosen = chosen_by(self.owner) if Live.any and self._enabled else None
        if chosen is None:
            return self._route, None
        return self._present(chosen.names), None if chosen.ids is None else chosen

    # ---- merging ------------------------------------------------------------------------------------

    def _merged_into(self, state: WeightState, names: Sequence[str]) -> WeightState:
        if self.token_adapter is not None:
            state = self.token_adapter.merged(state, names)
        adapters = [self.blocks(name) for name in names if name in self.r]
        return self.codec.merged(self.get_base_layer(), state, adapters) if adapters else state

    def _numbers_of(self, name: str) -> list[Tensor]:
        found = [item.tensor for item in self.tensors(name)]
        return [*found, as_tensor(self.scaling[name])] if name in self.scaling else found

    def _is_surely_finite(self, state: WeightState, names: Sequence[str]) -> bool:
        if self.token_adapter is not None and not set(names).isdisjoint(self.token_adapter.adapters):
            return False
        return merge_is_finite(state, [self.blocks(name) for name in names])

    def _refuse_merge(self, names: Sequence[str]) -> None:
        if not self.codec.can_write:
            raise UnsupportedError(
                f"cannot merge into a {self.codec.name} weight; load the base in full precision to merge"
            )
        if any(self.lora_bias.get(name) for name in names) and self.bias is None:
            raise UnsupportedError(
                "cannot merge an adapter with lora_bias=True into a layer that has no bias; "
                "keep the adapter unmerged, or train it with lora_bias=False"
            )

    # ---- the base, for models that look at it ---------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that look at it instead of calling the layer; with token rows in place.

        A call that chose an adapter for each sample finds the base's own rows in it.
        """
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        if self.token_adapter is None:
            return weight
        names, by_sample = self.acting()
        return self.token_adapter.in_weight(weight, () if by_sample else names)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias; None where it has none."""
        bias = getattr(self.base_layer, "bias", None)
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias
