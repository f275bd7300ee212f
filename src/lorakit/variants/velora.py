"""VeLoRA: plain LoRA that keeps a projection of its input for backward instead of the input."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch.nn.functional import linear

from lorakit.ops.dropout import draw_seeds
from lorakit.ops.reference import must_compose
from lorakit.ops.velora import (
    Projection,
    group_size,
    mean_direction,
    normalised,
    projected_linear,
    projected_reference,
)
from lorakit.specs import PartName
from lorakit.variants.nothing import LeavesBase, NoPenalty, OnAnyWeight
from lorakit.variants.variant import Effect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.variants.variant import Call, Held, Start

    Reader = Callable[[torch.dtype], Tensor]


@final
@dataclass(frozen=True)
class Velora(OnAnyWeight, LeavesBase, NoPenalty):
    """What the layer gives is plain LoRA's; the gradient of A is taken from the projected input.

    Attributes:
        groups: into how many groups the features of the input go.
        scale: factor on the projected input.
        init_type: what it is projected on: the mean group of each step's input ("batch_average"), of the first step's
            ("batch_average_once"), or a random direction ("random").

    Source: Miles et al., 2024, arXiv:2405.17991.
    """

    groups: int
    scale: float
    init_type: str
    name: ClassVar[str] = "VeLoRA"
    field: ClassVar[str] = "velora_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType(
        {"direction": PartName("lora_velora_embed", "lora_velora_embed")}
    )
    frozen: ClassVar[frozenset[str]] = frozenset({"direction"})
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002
        """The direction is as long as a group."""
        return {"direction": (group_size(layout.row[0], self.groups),)}

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """The factors as initialised; a random direction, or zeros until the first step."""
        spec = start.spec
        direction = torch.zeros(group_size(spec.layout.row[0], self.groups), device=spec.device)
        if self.init_type == "random":
            direction = normalised(torch.randn_like(direction))
        return {"A": start.A, "B": start.B, "direction": direction.to(spec.dtype)}

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """The plain product; where A is trained, on a projected input in backward."""
        held, x = call.held, call.x
        trains = call.training and torch.is_grad_enabled() and held.A.requires_grad and x.numel() > 0
        if not trains:
            return call.add(y, call.dropped() if call.rate else x, held)
        direction = self._direction(x.detach(), call)
        if must_compose(x, ()):
            dropped = call.dropped() if call.rate else x
            h = projected_reference(dropped, held.A, direction, Projection(self.groups, self.scale))
        else:
            seed = draw_seeds(1)[0] if call.rate else 0
            drawn = Projection(self.groups, self.scale, call.rate, seed)
            h = projected_linear(x, held.A, direction, drawn)
        h = h * held.scaling
        y = y + linear(h, held.B.to(h.dtype)).to(y.dtype)
        return y if held.bias is None else y + (held.bias * held.scaling).to(y.dtype)

    def effect(self, held: Held, layout: Layout, weight: Reader) -> Effect:  # noqa: ARG002
        """That of the factors."""
        return Effect(held.A, held.B)

    def _direction(self, x: Tensor, call: Call) -> Tensor:
        """What this step projects on.

        The mean is that of the input before dropout, whose expectation the dropped one has.
        """
        stored = call.held.parts["direction"]
        once = self.init_type == "batch_average_once"
        if self.init_type == "random" or (once and call.kept.get("begun")):
            return stored
        direction = mean_direction(x, self.groups)
        with torch.no_grad():
            if once:  # a loaded adapter has one; asking whether would make the host wait for the device
                direction = torch.where(stored.any(), stored, direction)
                call.kept["begun"] = True
            stored.copy_(direction)
        return direction


def from_config(config: LoraConfig) -> Velora | None:
    """VeLoRA where the config asks for it."""
    options = config.velora_config
    return None if options is None else Velora(options.num_groups, options.scale, options.init_type)
