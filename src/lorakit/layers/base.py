"""The layer that wraps a base module and carries its adapters.

Guarantees, beside those of `MergingLayer`:
- `forward` reads one prepared tuple of adapter names, the route; it is rebuilt when adapters are set, enabled,
  merged or deleted, never inside `forward`.
- A call may choose its own adapters (`chosen`), for all samples or for each; nothing of that stays in the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

import torch

from lorakit.errors import UnsupportedError
from lorakit.layers.chosen import Live, chosen_by
from lorakit.layers.finite import merge_is_finite
from lorakit.layers.holding import HoldingLayer
from lorakit.layers.hooks import outside_autocast
from lorakit.layers.prepared import as_tensor
from lorakit.layers.scales import own_scaling, rescale
from lorakit.layers.varied import changes_of, effect_of, offset_of, total_rows
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.layers.chosen import Chosen
    from lorakit.layers.tokens import TokenRows
    from lorakit.weights import InFull, WeightCodec, WeightState


class LoraLayer(HoldingLayer):
    """A base module with any number of LoRA adapters (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
        base_layer: the wrapped module.
        lora_dropout: the dropout on the adapter's input by adapter name.
        r, lora_alpha, scaling, use_rslora, lora_bias: what each adapter was made with, by name. `scaling` may be
            changed and takes effect at the next forward.
        merged_adapters: names whose deltas are in the base weight now, in the order they were merged.

    The other attributes are those of `HoldingLayer`.
    """

    _route: tuple[str, ...] = ()

    # ---- what a final subclass supplies -------------------------------------------------------------

    @abstractmethod
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus the contributions of the routed adapters."""

    def blocks(self, name: str) -> tuple[Factors, ...]:
        """What the adapter adds to each block of the layout, as one pair of factors, detached.

        Of a plain adapter they share memory with its parameters. What it takes off the base is in them.

        Raises:
            UnsupportedError: what the adapter does is no addition.
        """
        parts, rows = changes_of(self, name)
        if rows is not None:
            raise UnsupportedError(
                f"{self.variants[name].name} rescales the weight, so {name!r} is not described by factors alone"
            )
        if len(parts) == 1:
            return parts[0]
        return tuple(Factors.cat(each) for each in zip(*parts, strict=True))

    def factors(self, name: str) -> Factors:
        """What the adapter adds, as one pair of factors; see `blocks`.

        Raises:
            AdapterNameError: the layer has no adapter of that name.
            UnsupportedError: the layer has several blocks, or what the adapter does is no addition.
        """
        found = self.blocks(name)
        if len(found) > 1:
            raise UnsupportedError(f"this layer has {len(found)} pairs of factors; call blocks()")
        return found[0]

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense change that the adapter makes to the base weight, in the shape and dtype of that weight.

        That of a grouped convolution mixes all input channels: (out, in_channels, *kernel), as if ungrouped.
        """
        dtype = self.codec.dtype(self.stored_base())
        wide = torch.promote_types(dtype, torch.float32)
        with outside_autocast(self.original_weight.device):
            A, B, rows = effect_of(self, adapter)
            delta = self.layout.dense(A.to(wide), B.to(wide)) * float(self.scaling[adapter])
            offset = offset_of(self, adapter)
            if offset is not None:
                delta += self.layout.dense(offset.A.to(wide), offset.B.to(wide)) * offset.scaling
            if rows is not None:
                delta += self.layout.by_output(rows.to(wide) - 1) * self._original_numbers(wide)
        return delta.to(dtype)

    def _original_numbers(self, dtype: torch.dtype) -> Tensor:
        """The unmerged weight in the shape in which it is stored, made dense."""
        if self.codec.on_grid:
            return self.read_weight(dtype)
        return self.layout.make_dense(self.original_weight.to(dtype))

    # ---- scaling --------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter to `scale` times what its `lora_alpha` and `r` say; nothing where it is not here.

        Raises:
            AdapterStateError: the adapter is merged.
        """
        if adapter in self.scaling:
            rescale(self, {adapter: scale * own_scaling(self, adapter)})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter.

        Raises:
            AdapterStateError: one of them is merged.
        """
        if scale != 1:
            here = [name for name in self._active if name in self.scaling]
            rescale(self, {name: self.scaling[name] * scale for name in here})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter, or bring it back to what `lora_alpha` and `r` say.

        Raises:
            AdapterStateError: one of them is merged.
        """
        here = [name for name in self._active if name in self.scaling]
        own = {name: own_scaling(self, name) for name in here}
        rescale(self, own if scale is None else {name: self.scaling[name] / scale for name in here})

    # ---- route ----------------------------------------------------------------------------------------

    def _reroute(self) -> None:
        acting = self._active if self._enabled and not self.merged_adapters else ()
        if self.merged_adapters:
            self.kept.clear()  # it may hold the weight that a merge for good lets go
        self.__dict__["_route"] = self._present(acting) if acting else ()

    def _present(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some adapters that are on this layer."""
        tokens = self._modules[
            "token_adapter"
        ]  # by name it costs a microsecond, and this runs in every switch
        rows = () if tokens is None else cast("TokenRows", tokens).token_indices
        return tuple([name for name in names if name in self.r or name in rows])

    def acting(self) -> tuple[tuple[str, ...], Chosen | None]:
        """The adapters that act in the running call, and its choice if that is one for each sample."""
        # a layer that is disabled has no choice
        chosen = chosen_by(self.owner) if Live.any and self._enabled else None
        if chosen is None:
            return self._route, None
        return self._present(chosen.names), None if chosen.ids is None else chosen

    # ---- merging ------------------------------------------------------------------------------------

    def _merged_into(
        self, state: WeightState, names: Sequence[str], codec: WeightCodec | InFull
    ) -> WeightState:
        if self.token_adapter is not None:
            state = self.token_adapter.merged(state, names)
        changes = [changes_of(self, name) for name in names if name in self.r]
        if not changes:
            return state
        blocks = [each for parts, _ in changes for each in parts]
        rows = total_rows([rows for _, rows in changes])
        return codec.merged(self.stored_base(), state, blocks, rows)

    def _numbers_of(self, name: str) -> list[Tensor]:
        found = [item.tensor for item in self.tensors(name)]
        return [*found, as_tensor(self.scaling[name])] if name in self.scaling else found

    def _is_surely_finite(self, state: WeightState, names: Sequence[str]) -> bool:
        if self.token_adapter is not None and not set(names).isdisjoint(self.token_adapter.adapters):
            return False
        if not self.variants.keys().isdisjoint(names):
            return False
        return merge_is_finite(state, [each for name in names for each in changes_of(self, name)[0]])

    def _refuse_merge(self, names: Sequence[str]) -> None:
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
