"""LoRA on `nn.Embedding`: A is looked up like the embedding itself, B multiplies what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from lorakit.layers.base import LoraLayer
from lorakit.layers.factors import let_go
from lorakit.layers.hooks import add_to_output, inside
from lorakit.layers.mixing import rows_by_sample, scaling_by_sample, then_zeros
from lorakit.layers.varied import (
    add_by_sample,
    add_variants,
    calling,
    held_by,
    offset_of,
    one_apart,
    parted,
    parted_by_sample,
)
from lorakit.layers.whole import has_own_forward, run_changed
from lorakit.layouts import filled

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.layers.chosen import Chosen
    from lorakit.variants import Held
    from lorakit.weights import WeightCodec

_PLAIN: frozenset[type[nn.Module]] = frozenset({nn.Embedding})


@final
class Embedding(LoraLayer):
    """y = base(ids) + sum over the routed adapters of scaling · A[:, ids]ᵀ Bᵀ.

    ids (...) and y (..., dim). `padding_idx` and `scale_grad_by_freq` of the base hold for the lookup of A, and an
    `embed_scale` of the base multiplies the adapters too. Dropout has no meaning for ids and is not applied. A base with
    another forward of its own, such as learned positions, is run whole (`lorakit.layers.whole`).

    Attributes:
        lora_embedding_A, lora_embedding_B: the factors (r, tokens) and (dim, r) by adapter name.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self._runs_whole = has_own_forward(self._base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(...) of ids -> (..., dim); further arguments go to the base layer."""
        route, by_sample = self.acting()
        if route and self._runs_whole:
            found: Tensor = run_changed(self, (x, *args), kwargs)
            return found
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not route:
            return y
        if by_sample is not None:
            return self._mixed(by_sample, route, y, x, calling(self.base_layer, args, kwargs))
        dtype = y.dtype
        if self.token_adapter is not None:
            y = self.token_adapter.in_embedding(y, x, route, self._base, self._scale)
        plain, varied = parted(self, route)
        if varied:
            y = add_variants(self, varied, y, x, calling(self.base_layer, args, kwargs), self._add)
        for name in plain:
            y = self._add_plain(name, y, x)
        return y.to(dtype)

    def _add_plain(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """Y, given away, with what a plain adapter adds."""
        offset = offset_of(self, name)
        if offset is not None:
            y = self._add(y, x, offset)
        return self._add(y, x, held_by(self, name))

    def _add(self, y: Tensor, x: Tensor, held: Held) -> Tensor:
        """Y, given away, with what an adapter with such tensors adds."""
        h = self._look_up(x, held.A.t())
        h = h.to(torch.promote_types(h.dtype, y.dtype)) * held.scaling * self._scale
        return add_to_output(y, linear(h.to(y.dtype), held.B.to(y.dtype)), self.base_layer, _PLAIN)

    def _mixed(
        self,
        chosen: Chosen,
        present: tuple[str, ...],
        y: Tensor,
        x: Tensor,
        again: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Each sample through its own adapter; x (samples, ...) of ids."""
        if self.token_adapter is not None:
            tokens, base, scale = self.token_adapter, self._base, self._scale
            y = rows_by_sample(
                y, chosen, present, x, lambda y, name: tokens.in_embedding(y, x, [name], base, scale)
            )
        names, apart = parted_by_sample(self, present)
        if apart:
            y = add_by_sample(chosen, apart, y, x, one_apart(self, again, self._add, self._add_plain))
        if not names:
            return y
        ids = chosen.groups(names, x.shape[0], x.device).ids
        stored = [self.stored(name) for name in names]
        rank = max(item.A.shape[0] for item in stored)
        # one table of all adapters' rows: tokens of the second follow those of the first; the last row is the base's
        tables = [filled(item.A, rank, dim=0).t() for item in stored]
        table = torch.cat([*tables, tables[0].new_zeros(1, rank)])
        places = x.reshape(len(ids), -1) + (ids * self.layout.shape[1]).unsqueeze(-1)
        places = torch.where((ids < 0).unsqueeze(-1), len(table) - 1, places)
        B = then_zeros([filled(item.B, rank, dim=1) for item in stored]).to(y.dtype)[ids]
        scaling = scaling_by_sample(self, names, ids, y)
        h = self._look_up_mixed(places, table) * scaling.view(-1, 1, 1) * self._scale
        return y + torch.bmm(h.to(y.dtype), B.mT).view(y.shape).to(y.dtype)

    def _look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of A transposed, with the base's way of counting gradients."""
        base = self._base
        return embedding(ids, table, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def _look_up_mixed(self, places: Tensor, table: Tensor) -> Tensor:
        """The same in a table of several adapters' rows."""
        base = self._base
        found = embedding(places, table, scale_grad_by_freq=base.scale_grad_by_freq)
        if base.padding_idx is not None and table.requires_grad:
            # the padding's row gets no gradient, in whichever adapter it is
            is_padding = (places % self.layout.shape[1] == base.padding_idx).unsqueeze(-1)
            found = torch.where(is_padding, found.detach(), found)
        return found

    @property
    def _scale(self) -> Any:
        """What the base multiplies its output by (Gemma's embeddings), in the dtype it does so in; else 1."""
        base = self._base
        scale = getattr(base, "embed_scale", 1.0)
        return scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale

    @property
    def _base(self) -> nn.Embedding:
        return inside(self.base_layer, nn.Embedding)

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        assert bias is None, "the planner refuses lora_bias on an embedding"
        self.lora_embedding_A[name] = nn.Parameter(A, requires_grad=False)
        self.lora_embedding_B[name] = nn.Parameter(B, requires_grad=False)

    def _let_go(self, name: str) -> None:
        let_go(name, self.lora_embedding_A, self.lora_embedding_B)

    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        return {
            "A": (f"lora_embedding_A.{name}", self.lora_embedding_A[name]),
            "B": (f"lora_embedding_B.{name}", self.lora_embedding_B[name]),
        }
