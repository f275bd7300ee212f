"""QA-LoRA: A sees the input's groups, each as one number, as a base quantised group by group can absorb it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorakit.variants.nothing import LeavesBase, NoPenalty
from lorakit.variants.shorter import check_scheme, shortened
from lorakit.variants.variant import Effect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.specs import PartName
    from lorakit.variants.variant import Call, Held, Start


@final
@dataclass(frozen=True, slots=True)
class QaLora(LeavesBase, NoPenalty):
    """`y + scaling * B A (g mean(x))`: the mean of each group of inputs, times the number g of groups; A is (r, g).

    Attributes:
        size: inputs in a group.

    Source: Xu et al., 2023, arXiv:2309.14717; the factor g is PEFT's.
    """

    size: int
    name: ClassVar[str] = "QA-LoRA"
    field: ClassVar[str] = "use_qalora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType({})
    frozen: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - the contract's
        """A is (r, in / size)."""
        return {"A": (r, layout.shape[1] // self.size)}

    def why_not(self, path: str, layout: Layout, r: int) -> str:  # noqa: ARG002 - the contract's
        """The groups must fit."""
        inner = layout.shape[1]
        return (
            f"qalora_group_size={self.size} does not divide its {inner} inputs" if inner % self.size else ""
        )

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """A uniform in ±1/sqrt(g), B as initialised.

        Raises:
            PlanError: the initialiser chooses whole factors.
        """
        check_scheme(start.spec, self.name)
        (shape,) = self.shapes(start.spec.path, start.spec.layout, start.spec.r).values()
        return {"A": shortened(start, shape, bound=1 / math.sqrt(shape[1])), "B": start.B}

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """The plain product with the means; the factor is in A, which is small."""
        A = call.held.A
        means = call.dropped().unflatten(-1, (-1, self.size)).mean(dim=-1)
        return call.add(y, means, replace(call.held, A=A * A.shape[1]))

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """Every input of a group has the group's column of A, times `g / size`."""
        A = held.A
        return Effect((A * (A.shape[1] / self.size)).repeat_interleave(self.size, dim=1), held.B)


def from_config(config: LoraConfig) -> QaLora | None:
    """QA-LoRA where the config asks for it."""
    return QaLora(config.qalora_group_size) if config.use_qalora else None
