"""The layer as a holder of adapters: what they are made of, put on, taken off, named and read.

How they act and merge is `lorakit.layers.base`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from lorakit.errors import AdapterNameError
from lorakit.layers.chosen import Owner
from lorakit.layers.factors import bare, let_go
from lorakit.layers.flags import flag_factors, set_mode
from lorakit.layers.merging import MergingLayer
from lorakit.layers.tokens import TokenRows
from lorakit.layers.varied import Kept, Offset, drop_parts, hold_parts, parts_of
from lorakit.specs import FILE_NAMES, TOKEN_ROWS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec
    from lorakit.types import Factors
    from lorakit.variants import Variant
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


_BY_ADAPTER = (
    *("r", "lora_alpha", "scaling", "use_rslora", "lora_bias", "variants", "frozen", "tied", "tied_rows"),
)


class HoldingLayer(MergingLayer):
    """A base module that holds adapters; `LoraLayer` is how they act.

    Attributes:
        lora_dropout: the dropout on the adapter's input by adapter name.
        r, lora_alpha, scaling, use_rslora, lora_bias: what each adapter was made with, by name. `scaling` may be
            changed and takes effect at the next forward.
        layout: shapes of the weight and the factors.
        variants: what adapters are more than plain LoRA, by name; those that are not are missing.
        frozen: which tensors of an adapter are never trained, by name.
        lora_offset: what adapters take off the base for themselves, by name (`lorakit.layers.varied`), or None.
        token_adapter: rows of the weight that adapters replace (`trainable_token_indices`), or None.
        tied, tied_rows: the layer whose factors, or rows, are also this one's, by adapter name.
    """

    owner: Owner
    lora_dropout: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, Any]  # floats; tensors (0-d) once prepared for hot-swapping
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    variants: dict[str, Variant]
    frozen: dict[str, frozenset[str]]
    kept: Kept
    layout: Layout
    out_features: int
    in_features: int
    tied: dict[str, HoldingLayer]
    tied_rows: dict[str, HoldingLayer]
    token_adapter: TokenRows | None
    lora_offset: nn.ModuleDict | None

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        layout = codec.layout(self.get_base_layer())
        named: dict[str, dict[str, Any]] = {name: {} for name in _BY_ADAPTER}
        self.__dict__.update(
            named,
            owner=Owner(),
            kept=Kept(),
            layout=layout,
            out_features=layout.out,
            in_features=layout.row[0],
        )
        self._modules.update(lora_dropout=bare(nn.ModuleDict), lora_offset=None, token_adapter=None)

    def enter(self, owner: Owner, active: tuple[str, ...], *, enabled: bool) -> None:
        """Be one of a model's layers from now on, still without any adapter.

        Args:
            owner: stands for the model in what a call chooses.
            active: the model's active adapters.
            enabled: whether its adapters act.
        """
        self.__dict__.update(owner=owner, _active=active, _enabled=enabled)

    # ---- what a final subclass supplies -------------------------------------------------------------

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
        A, B, bias = self.layout.join(factors)
        tensors = {"A": A, "B": B} if bias is None else {"A": A, "B": B, "bias": bias}
        self.add_stored(name, tensors, spec, use_rslora=use_rslora)

    def add_stored(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        spec: AdapterSpec,
        *,
        use_rslora: bool,
        offset: Sequence[Factors] | None = None,
    ) -> None:
        """Put an adapter on the layer, not yet active, whose tensors are at hand as they are stored.

        Args:
            name: of the adapter.
            tensors: of the shapes that `spec.shapes` says; they become its parameters.
            spec: what was planned here.
            use_rslora: how `scaling` follows from `lora_alpha`.
            offset: what is taken off the base for this adapter, for each block of the layout.
        """
        self._note(name, spec, use_rslora=use_rslora)
        self._hold(name, tensors["A"], tensors["B"], tensors.get("bias"))
        self.lora_bias[name] = "bias" in tensors
        if spec.variant is not None:
            self.variants[name] = cast("Variant", spec.variant)
            hold_parts(self, name, tensors)
        if spec.frozen:
            self.frozen[name] = spec.frozen
        if offset is not None:
            A, B, _ = self.layout.join(offset)
            self.hold_offset(name, Offset(A, B, offset[0].scaling))
        self._match_mode(name)

    def hold_offset(self, name: str, offset: nn.Module) -> None:
        """Take an `Offset` off the base for an adapter."""
        if self.lora_offset is None:
            self.lora_offset = nn.ModuleDict()
        self.lora_offset[name] = offset

    def add_tied(self, name: str, source: HoldingLayer, spec: AdapterSpec, *, use_rslora: bool) -> None:
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
        dropout = nn.Dropout(spec.dropout) if spec.dropout > 0 else bare(nn.Identity)
        cast("nn.ModuleDict", self._modules["lora_dropout"])._modules[name] = dropout

    def _match_mode(self, name: str) -> None:
        if self.training:  # as modules begin
            return
        for module in (self.lora_dropout[name], *self.modules_of(name)):
            module.__dict__["training"] = False

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, which would spend 3 microseconds on each of an adapter's four modules."""
        for part, module in self._modules.items():
            if type(module) is nn.ModuleDict and part != "base_layer":
                set_mode(module, training=mode)
            elif module is not None:
                module.train(mode)
        self.__dict__["training"] = mode
        return self

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
        self, name: str, indices: Sequence[int], rows: Tensor | None, source: HoldingLayer | None
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
            drop_parts(self, name)
            let_go(name, self.lora_dropout)
            for values in (self.r, self.lora_alpha, self.scaling, self.use_rslora, self.lora_bias):
                values.pop(name, None)
        if self._modules["token_adapter"] is not None:
            self._remove_rows(name)
        if name in self._active:
            self.__dict__["_active"] = tuple(active for active in self._active if active != name)
        self._install()

    def _remove_rows(self, name: str) -> None:
        assert self.token_adapter is not None
        self.tied_rows.pop(name, None)
        self.token_adapter.remove(name)
        if not self.token_adapter.adapters:
            self.token_adapter = None

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
            for part, parameter in parts_of(self, name).items():
                place = self.variants[name].parts[part]
                yield NamedAdapterTensor(place.in_file, place.state_suffix(name), parameter)
        if self.token_adapter is not None and name in self.token_adapter.trainable_tokens_delta:
            rows = self.token_adapter.trainable_tokens_delta[name]
            yield NamedAdapterTensor(TOKEN_ROWS, f"{TOKEN_ROWS}.{name}", rows)

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of an adapter that this layer itself holds."""
        for item in self.tensors(name):
            if isinstance(item.tensor, nn.Parameter):
                yield item.tensor

    def train_only(self, names: Collection[str]) -> None:
        """Let the parameters of these adapters want gradients, and no other adapter's; as `set_requires_grad`."""
        for name in flag_factors(self, names):
            self.set_requires_grad([name], requires_grad=name in names)

    def set_requires_grad(self, names: Iterable[str], *, requires_grad: bool) -> None:
        """Set the flag on the parameters of these adapters, but for those that are never trained."""
        for name in names:
            frozen = self.frozen_tensors(name) if name in self.frozen else ()
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(requires_grad and not any(parameter is it for it in frozen))

    def frozen_tensors(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter that are never trained."""
        held = {part: parameter for part, (_, parameter) in self._held(name).items()} | parts_of(self, name)
        return [held[part] for part in self.frozen.get(name, ())]

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

    def read_weight(self, dtype: torch.dtype) -> Tensor:
        """The unmerged base weight as a fresh tensor, (out, in), of experts (experts, out, in)."""
        return self.codec.read(self.stored_base(), dtype, self._original_state())

    def peek_weight(self, dtype: torch.dtype) -> Tensor:
        """As `read_weight`, but not to be written into: it may be the base's own memory."""
        return self.codec.peek(self.stored_base(), dtype, self._original_state())

    def replace_base(self, weight: Tensor) -> WeightState:
        """Let the base hold another weight, (out, in), from now on; gives what it held, for `restore_base`."""
        assert not self.merged_adapters, "the planner refuses to change a merged base"
        base = self.get_base_layer()
        return self.codec.swap(base, self.codec.encode(base, weight))

    def restore_base(self, state: WeightState) -> None:
        """Undo `replace_base`."""
        self.codec.swap(self.get_base_layer(), state)

    @property
    def is_tied(self) -> bool:
        """Whether any adapter's tensors here are another layer's."""
        return bool(self.tied or self.tied_rows)

    @property
    def original_weight(self) -> nn.Parameter:
        """The weight as it was before any merge."""
        return self._original_state().weight

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves the layer, or changes its dtype; what variants kept may hold the memory that it moves away from."""
        self.kept.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _lies_as(self, source: HoldingLayer) -> bool:
        """Whether a tied layer holds the weight the same way round as its source: an embedding, not a head."""
        return self.layout.transposed == source.layout.transposed
