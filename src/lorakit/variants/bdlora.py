"""BD-LoRA: one of the factors is block-diagonal, so that serving on several devices exchanges nothing for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from torch.nn.functional import linear

from lorakit.errors import UnsupportedError
from lorakit.ops.blocks import block_diagonal, block_linear
from lorakit.ops.terms import product_dtype, result_dtype
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
class BdLora(LeavesBase, NoPenalty):
    """`y + scaling * B (A x)` with A or B block-diagonal, stored without its zeros: (r, in / n) or (out, r / n).

    Attributes:
        pieces_a: texts; a module whose path holds one of them gets a block-diagonal A.
        pieces_b: the same for B.
        blocks: n, how many blocks.
        strict: refuse a module that neither names; otherwise both of its factors are whole.

    Source: Wang et al., 2025, arXiv:2510.23346.
    """

    pieces_a: tuple[str, ...]
    pieces_b: tuple[str, ...]
    blocks: int
    strict: bool
    name: ClassVar[str] = "BD-LoRA"
    field: ClassVar[str] = "use_bdlora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType({})
    frozen: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def _blocked(self, path: str) -> str:
        """Which factor is block-diagonal on this module: "A", "B", "AB" for both lists name it, or none."""
        lists = (("A", self.pieces_a), ("B", self.pieces_b))
        return "".join(factor for factor, texts in lists if any(text in path for text in texts))

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:
        """Of the factor that is block-diagonal."""
        out, inner = layout.shape
        own = {"A": (r, inner // self.blocks), "B": (out, r // self.blocks)}
        return {factor: own[factor] for factor in self._blocked(path)}

    def why_not(self, path: str, layout: Layout, r: int) -> str:
        """One list must name the module, and the blocks must fit."""
        blocked = self._blocked(path)
        if len(blocked) > 1:
            return "use_bdlora names it in target_modules_bd_a and in target_modules_bd_b; one factor can be block-diagonal"
        if not blocked:
            return (
                "use_bdlora names it neither in target_modules_bd_a nor in target_modules_bd_b; name it there, or set "
                "match_strict=False to give it plain LoRA"
                if self.strict
                else ""
            )
        out, inner = layout.shape
        other = ("inputs", inner) if blocked == "A" else ("outputs", out)
        uneven = [f"{size} {what}" for what, size in (other, ("ranks", r)) if size % self.blocks]
        return (
            f"use_bdlora cuts {blocked} into {self.blocks} blocks, which do not divide its {' and its '.join(uneven)}"
            if uneven
            else ""
        )

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """A block-diagonal A uniform in ±sqrt(6 n / in) (Kaiming), a block-diagonal B zero, the other as initialised.

        Raises:
            PlanError: the initialiser chooses whole factors.
        """
        spec = start.spec
        shapes = self.shapes(spec.path, spec.layout, spec.r)
        if shapes:
            check_scheme(spec, self.name)
        A, B = start.A, start.B
        if "A" in shapes:
            A = shortened(start, shapes["A"], bound=math.sqrt(6 / shapes["A"][1]))
        if "B" in shapes:
            B = B[:, : shapes["B"][1]].contiguous()  # zero, or independent numbers
        return {"A": A, "B": B}

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """The product block by block; where no factor has blocks, the plain one."""
        held = call.held
        if not self._cut(held, call.layout):
            return call.add(y, call.dropped(), held)
        x = call.dropped()
        x = x.to(product_dtype(x, result_dtype(x)))
        if held.A.shape[1] < call.layout.shape[1]:
            h = block_linear(x, held.A, self.blocks) * held.scaling
            added = linear(h, held.B.to(h.dtype))
        else:
            h = linear(x, held.A.to(x.dtype)) * held.scaling
            added = block_linear(h, held.B, self.blocks)
        if held.bias is not None:
            added = added + held.bias * held.scaling
        return (y + added).to(y.dtype)

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """The factors with their zeros."""
        A, B = held.A, held.B
        if held.A.shape[1] < layout.shape[1]:
            A = block_diagonal(A, self.blocks)
        elif self._cut(held, layout):
            B = block_diagonal(B, self.blocks)
        return Effect(A, B)

    def _cut(self, held: Held, layout: Layout) -> bool:
        return held.A.shape[1] < layout.shape[1] or held.B.shape[1] < held.A.shape[0]


def from_config(config: LoraConfig) -> BdLora | None:
    """BD-LoRA where the config asks for it.

    Raises:
        UnsupportedError: it asks for a bias of a block-diagonal B, which PEFT's files have no place for.
    """
    options = config.use_bdlora
    if options is None:
        return None
    if config.lora_bias and options.target_modules_bd_b:
        raise UnsupportedError(
            "lora_bias=True: a block-diagonal B (use_bdlora.target_modules_bd_b) has no bias; set lora_bias=False"
        )
    return BdLora(
        tuple(options.target_modules_bd_a or ()),
        tuple(options.target_modules_bd_b or ()),
        options.nblocks,
        options.match_strict,
    )
