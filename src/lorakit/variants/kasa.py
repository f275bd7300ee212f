"""KaSA: a learned diagonal between the factors, on a base without its least singular values."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch

from lorakit.errors import PlanError
from lorakit.specs import PartName
from lorakit.types import Factors
from lorakit.variants.variant import Effect, Held

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec
    from lorakit.variants.variant import Call, Start

_FITTING_INITS = frozenset({"default", "random", "gaussian", "eva"})
"""Schemes whose product begins as no change, or is meant to change the layer, whatever stands between the factors."""


@final
@dataclass(frozen=True, slots=True)
class Kasa:
    """`y + scaling * B (d * A x) - offset x`: the offset holds the base's r least singular triplets.

    The base itself is not touched; what is taken off it belongs to the adapter.

    Attributes:
        beta: weight of `sum(d**2)` in the penalty.
        gamma: weight of `|B^T B - 1|_F + |A A^T - 1|_F`.

    Source: Wang et al., 2024, arXiv:2412.06071.
    """

    beta: float
    gamma: float
    name: ClassVar[str] = "KaSA"
    field: ClassVar[str] = "kasa_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType({"diag": PartName("lora_diag", "lora_diag")})
    frozen: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    finish: ClassVar[None] = None

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - the contract's
        """The diagonal is (r,)."""
        return {"diag": (r,)}

    def why_not(self, path: str, layout: Layout, r: int) -> str:  # noqa: ARG002 - the contract's
        """The base must keep a singular value."""
        least = min(layout.shape)
        if r < least:
            return ""
        return f"KaSA takes r of the {least} singular values off this weight; it needs a rank below {least}, got r={r}"

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """A and B as initialised, the diagonal normal.

        Raises:
            PlanError: the initialiser's product would not be what stands between it and no change any more.
        """
        spec = start.spec
        if spec.init not in _FITTING_INITS:
            problem = (
                f"{spec.path}: init_lora_weights={spec.init!r} chooses B A, and KaSA has a random diagonal between them; "
                "use True, False, 'gaussian' or 'eva'"
            )
            raise PlanError([problem])
        diag = torch.randn(spec.r, device=spec.device).to(spec.dtype)
        return {"A": start.A, "B": start.B, "diag": diag}

    @torch.no_grad()
    def offset(
        self, spec: AdapterSpec, weight: Callable[[torch.dtype], Tensor]
    ) -> tuple[Factors, ...] | None:
        """The r least singular triplets of the base, by a whole SVD in fp32 (fp64 for an fp64 base).

        Raises:
            PlanError: the base has no values.
        """
        wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
        W = weight(wide)
        if W.is_meta:
            raise PlanError(
                [
                    f"{spec.path}: KaSA looks at the base weight, which has no values on the meta device; load it first"
                ]
            )
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        least = slice(-spec.r, None)
        return (Factors(Vh[least].to(spec.dtype), (U[:, least] * S[least]).to(spec.dtype), 1.0),)

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """The plain product, with the diagonal in the smaller factor."""
        held = call.held
        A, B, _ = self._product(held)
        return call.add(y, call.dropped(), Held(A, B, held.bias, held.scaling, {}))

    def penalty(self, held: Held, kept: Mapping[str, Any], count: int, *, training: bool) -> Tensor | None:  # noqa: ARG002 - the contract's
        """`beta sum(d**2) + gamma (|B^T B - 1|_F + |A A^T - 1|_F)`, in fp32 at least; equations 9 to 11 of the paper."""
        wide = torch.promote_types(held.A.dtype, torch.float32)
        A, B, diag = held.A.to(wide), held.B.to(wide), held.parts["diag"].to(wide)
        one = torch.eye(len(diag), dtype=wide, device=diag.device)
        skew: Tensor = torch.linalg.norm(B.mT @ B - one) + torch.linalg.norm(A @ A.mT - one)
        penalty: Tensor = self.beta * diag.square().sum() + self.gamma * skew
        return penalty

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """`B diag(d) A`; what is taken off the base is not in it."""
        return self._product(held)

    @staticmethod
    def _product(held: Held) -> Effect:
        A, B, diag = held.A, held.B, held.parts["diag"]
        return Effect(A * diag[:, None], B) if A.numel() < B.numel() else Effect(A, B * diag)


def from_config(config: LoraConfig) -> Kasa | None:
    """KaSA where the config asks for it, with its weights of the penalties."""
    options = config.kasa_config
    return None if options is None else Kasa(options.beta, options.gamma)
