"""LoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: A looks where the base looks, B is 1 x 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.layers.base import LoraLayer
from lorakit.layers.factors import acting_rate, let_go, looking_conv, pointwise_conv
from lorakit.layers.hooks import add_to_output, inside, is_observed
from lorakit.layers.linear import held_by_modules
from lorakit.layers.mixing import scaling_by_sample, then_zeros
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
from lorakit.weights.dense import CONVOLUTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.layers.chosen import Chosen
    from lorakit.layers.factors import Convolution
    from lorakit.variants import Held
    from lorakit.weights import WeightCodec

_CONVOLVE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_PLAIN: frozenset[type[nn.Module]] = frozenset(CONVOLUTIONS)


@final
class Conv(LoraLayer):
    """y = base(x) + sum over the routed adapters of scaling · B(A(dropout(x))).

    x (batch, in_channels, *space). A has the stride, padding and dilation of the base and sees all channels, so a
    grouped base gets mixed channels too; B has the base's groups. Merging makes a grouped weight an ungrouped one. A
    base with a forward of its own, such as a causal convolution, is run whole (`lorakit.layers.whole`).

    Attributes:
        lora_A, lora_B: the factors by adapter name, as convolutions.
    """

    def __init__(self, base_layer: nn.Module, codec: WeightCodec) -> None:
        super().__init__(base_layer, codec)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self._runs_whole = has_own_forward(self._base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(batch, in_channels, *space) -> (batch, out, *space); further arguments go to the base layer."""
        route, by_sample = self.acting()
        if route and self._runs_whole:
            found: Tensor = run_changed(self, (x, *args), kwargs)
            return found
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not route:
            return y
        again = calling(self.base_layer, args, kwargs)
        if by_sample is not None:
            return self._mixed(by_sample, route, y, x, again)
        dtype = y.dtype
        plain, varied = parted(self, route)
        if varied:
            y = add_variants(self, varied, y, x, again, self._add)
        for name in plain:
            y = self._add_plain(name, y, x)
        return y.to(dtype)

    def _add_plain(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """Y, given away, with what a plain adapter adds; through its modules where something hangs on them."""
        offset = offset_of(self, name)
        if offset is not None:
            y = self._add(y, x, offset)
        dropped = self.lora_dropout[name](x)
        if not any(is_observed(module) for module in self.modules_of(name)):
            return self._add(y, dropped, held_by(self, name))
        A, B = self.lora_A[name], self.lora_B[name]
        added: Tensor = B(A(dropped.to(next(A.parameters()).dtype))) * self.scaling[name]
        return add_to_output(y, added, self.base_layer, _PLAIN)

    def _add(self, y: Tensor, x: Tensor, held: Held) -> Tensor:
        """Y, given away, with what an adapter with such tensors adds."""
        return add_to_output(y, self._contribution(x, held), self.base_layer, _PLAIN)

    def _contribution(self, x: Tensor, held: Held) -> Tensor:
        A, B, bias, scaling = held.A, held.B, held.bias, held.scaling
        h = self._convolve(x, A.to(x.dtype)) * scaling
        space = len(self.layout.row) - 1
        convolve: Any = _CONVOLVE[space]
        z: Tensor = convolve(h, B.to(h.dtype), groups=self.layout.groups)
        return z if bias is None else z + (bias.to(z.dtype) * scaling).view(-1, *(1,) * space)

    def _mixed(
        self,
        chosen: Chosen,
        present: tuple[str, ...],
        y: Tensor,
        x: Tensor,
        again: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Each sample through its own adapter."""
        names, apart = parted_by_sample(self, present)
        if apart:
            y = add_by_sample(chosen, apart, y, x, one_apart(self, again, self._add, self._add_plain))
        return self._mixed_plain(chosen, names, y, x) if names else y

    def _mixed_plain(self, chosen: Chosen, names: tuple[str, ...], y: Tensor, x: Tensor) -> Tensor:
        """One convolution, in which a sample is a group."""
        ids = chosen.groups(names, x.shape[0], x.device).ids  # -1, the base alone, finds the zeros at the end
        stored = [self.stored(name) for name in names]
        per_group = max(item.B.shape[1] for item in stored)
        groups, space = self.layout.groups, len(self.layout.row) - 1
        # (n + 1, groups·rank, in, *kernel) and (n + 1, out, rank)
        A = then_zeros([self._by_group(item.A, per_group) for item in stored])
        B = then_zeros([filled(item.B.flatten(1), per_group, dim=1) for item in stored])
        scaling = scaling_by_sample(self, names, ids, y)
        h = self._convolve_each(self._dropped(x, names, ids), A.to(x.dtype)[ids])
        h = (h * scaling.view(-1, 1, *(1,) * space)).to(h.dtype)
        each = h.reshape(len(ids) * groups, per_group, -1)
        matrices = B.to(h.dtype)[ids].reshape(len(ids) * groups, -1, per_group)
        y = y + torch.bmm(matrices, each).reshape(y.shape).to(y.dtype)
        if any(item.bias is not None for item in stored):
            none = B.new_zeros(self.layout.out)
            biases = then_zeros([none if item.bias is None else item.bias for item in stored])[ids]
            y = y + (biases * scaling.unsqueeze(-1)).view(*y.shape[:2], *(1,) * space).to(y.dtype)
        return y

    def _by_group(self, A: Tensor, per_group: int) -> Tensor:
        """A with the ranks of each group filled with zeros up to `per_group`."""
        groups = self.layout.groups
        return filled(A.reshape(groups, -1, *A.shape[1:]), per_group, dim=1).reshape(-1, *A.shape[1:])

    def _dropped(self, x: Tensor, names: tuple[str, ...], ids: Tensor) -> Tensor:
        """X after the dropout of each sample's own adapter."""
        rates = [acting_rate(self.lora_dropout[name]) for name in names]
        if not any(rates):
            return x
        rate = torch.tensor([*rates, 0.0], device=x.device)[ids].view(-1, *(1,) * (x.ndim - 1))
        kept = torch.rand(x.shape, device=x.device) >= rate
        return x * (kept / (1 - rate)).to(x.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """X with `weight`, where the base looks."""
        base = self._base
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x, padding = pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        convolve: Any = _CONVOLVE[len(self.layout.row) - 1]
        found: Tensor = convolve(x, weight, None, base.stride, padding, base.dilation, groups)
        return found

    def _convolve_each(self, x: Tensor, weights: Tensor) -> Tensor:
        """X (n, in, *space) with weights (n, rank, in, *kernel), each sample with its own -> (n, rank, *space)."""
        n, rank = weights.shape[:2]
        folded = x.reshape(1, -1, *x.shape[2:])
        found = self._convolve(folded, weights.reshape(n * rank, *weights.shape[2:]), groups=n)
        return found.reshape(n, rank, *found.shape[2:])

    @property
    def _base(self) -> Convolution:
        return cast("Convolution", inside(self.base_layer, CONVOLUTIONS))

    def _hold(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        self.lora_A[name] = looking_conv(self._base, A)
        self.lora_B[name] = pointwise_conv(B, bias, groups=self.layout.groups)

    def _let_go(self, name: str) -> None:
        let_go(name, self.lora_A, self.lora_B)

    def _held(self, name: str) -> dict[str, tuple[str, nn.Parameter]]:
        return held_by_modules(self.lora_A, self.lora_B, name)
