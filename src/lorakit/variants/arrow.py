"""Arrow: each token goes through those adapters of the layer that fit it best."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch.nn.functional import dropout, linear

from lorakit.errors import AdapterStateError, ConfigError, UnsupportedError
from lorakit.ops.low_rank import low_rank_svd
from lorakit.ops.stamps import Stamp
from lorakit.types import Factors
from lorakit.variants.nothing import FactorsAlone, LeavesBase, NoPenalty, OnAnyWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.specs import PartName
    from lorakit.variants.variant import Call, Effect, Held

    Reader = Callable[[torch.dtype], Tensor]

_GENERAL = re.compile(r"gks_[0-9]+", re.ASCII)
"""How `create_arrow_model` names general adapters; none of that name is ever chosen."""


class Experts(NamedTuple):
    """The adapters of one layer to choose from.

    Attributes:
        prototypes: (experts, in), in fp32 at least: the input direction that each changes most.
        A: (sum of ranks, in), of all experts.
        B: (out, sum of ranks).
        owners: (sum of ranks,), whose each rank is.
        names: of the experts, then of the general adapters.
        stamp: of what these were computed from.
    """

    prototypes: Tensor
    A: Tensor
    B: Tensor
    owners: Tensor
    names: tuple[str, ...]
    stamp: Stamp


@final
@dataclass(frozen=True)
class Arrow(FactorsAlone, OnAnyWeight, LeavesBase, NoPenalty):
    """`y + sum_e c_e scaling_e B_e A_e x`: c is the softmax of |prototype_e x| over the `top_k` largest, else 0.

    The experts are the plain adapters on the layer. Their prototypes are made once, and again when an expert changes,
    comes or goes. With general adapters, the mean of their A is taken off every A, and the mean of their B off every B,
    while the adapters themselves stay what they are.

    Attributes:
        top_k: how many experts act on a token.
        temperature: of the softmax.
        general: names of the general adapters.

    Source: Ostapenko et al., 2024, arXiv:2405.11157; the general adapters are of GenKnowSub, arXiv:2505.10939.
    """

    top_k: int
    temperature: float
    general: tuple[str, ...]
    name: ClassVar[str] = "Arrow"
    field: ClassVar[str] = "arrow_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType({})
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    merges: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """Y with what each token's own experts add.

        Raises:
            AdapterStateError: fewer experts than `top_k` are on the layer, or a general adapter is not.
            UnsupportedError: an expert has a bias, or a general adapter the rank of no expert.
        """
        names = self._names(call.peers())
        held = {name: call.peer(name) for name in (*names, *self.general)}
        experts = self._experts(names, held, call.kept)
        scalings = torch.stack([_as_tensor(held[name].scaling, experts.prototypes) for name in names])
        x = call.x.reshape(-1, call.x.shape[-1])
        weights = self._weights(linear(x, experts.prototypes.to(x.dtype))) * scalings
        h = linear(x, experts.A.to(x.dtype))
        h = h * weights.index_select(1, experts.owners).to(h.dtype)
        added = linear(h, experts.B.to(h.dtype))
        if call.rate:
            added = dropout(added, call.rate)
        return y + added.view(y.shape).to(y.dtype)

    def effect(self, held: Held, layout: Layout, weight: Reader) -> Effect:  # noqa: ARG002
        """None that a weight could have.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "Arrow chooses adapters for each token, which no weight does; keep it unmerged, or combine the adapters "
            "it chooses from with add_weighted_adapter() and merge that"
        )

    def _names(self, here: tuple[str, ...]) -> tuple[str, ...]:
        """The experts among the plain adapters on a layer.

        Raises:
            AdapterStateError: there are too few, or a general adapter is not there.
        """
        missing = [name for name in self.general if name not in here]
        names = tuple(name for name in here if name not in self.general and not _GENERAL.fullmatch(name))
        if missing or len(names) < self.top_k:
            raise AdapterStateError(
                f"Arrow chooses top_k={self.top_k} of the plain adapters on a layer and needs {list(self.general)} "
                f"there too; it finds {list(here)}"
            )
        return names

    def _weights(self, likeness: Tensor) -> Tensor:
        """(tokens, experts) -> the same, in fp32 at least: the weight of each expert, 0 for all but the `top_k`."""
        size = likeness.abs().to(torch.promote_types(likeness.dtype, torch.float32))
        top, places = size.topk(self.top_k, dim=1)
        return torch.zeros_like(size).scatter(1, places, torch.softmax(top / self.temperature, dim=1))

    def _experts(self, names: tuple[str, ...], held: Mapping[str, Held], kept: dict[str, Any]) -> Experts:
        """Those that are kept, if nothing changed since; while experts are trained their factors are taken anew."""
        known: Experts | None = kept.get("experts")
        everyone = (*names, *self.general)
        if known is not None and known.names != everyone:
            known = None
        if torch.compiler.is_compiling() and known is not None:
            return known  # what a stamp asks, a graph cannot
        tensors = [tensor for name in everyone for tensor in (held[name].A, held[name].B)]
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if known is not None and not (known.stamp.holds() and _same(known.stamp.tensors, tensors)):
            known = None
        if known is not None and not trains:
            return known
        factors = self._purified(names, held)
        A, B = torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], dim=1)
        if known is not None:
            return known._replace(A=A, B=B)
        ranks = torch.tensor([len(A) for A, _ in factors], device=A.device)
        owners = torch.arange(len(factors), device=A.device).repeat_interleave(ranks)
        prototypes = torch.stack([prototype(A, B) for A, B in factors])
        found = Experts(prototypes, A, B, owners, everyone, Stamp.of(tensors))
        kept["experts"] = found._replace(A=A.detach(), B=B.detach())
        return found

    def _purified(self, names: Sequence[str], held: Mapping[str, Held]) -> list[tuple[Tensor, Tensor]]:
        """The experts' factors without the mean of the general adapters' (GenKnowSub)."""
        biased = [name for name in names if held[name].bias is not None]
        if biased:
            raise UnsupportedError(
                f"Arrow weighs products B A, and {biased} have lora_bias=True; leave them out"
            )
        factors = [(held[name].A, held[name].B) for name in names]
        if not self.general:
            return factors
        ranks = {name: len(held[name].A) for name in (*names, *self.general)}
        if len(set(ranks.values())) > 1:
            raise UnsupportedError(
                f"general adapters are taken off adapters of their rank, and ranks are {ranks}"
            )
        mean_A = torch.stack([held[name].A for name in self.general]).mean(dim=0)
        mean_B = torch.stack([held[name].B for name in self.general]).mean(dim=0)
        return [(A - mean_A, B - mean_B) for A, B in factors]


@torch.no_grad()
def prototype(A: Tensor, B: Tensor) -> Tensor:
    """(in,), in fp32 at least: the right singular vector of the largest singular value of B A; zero for a zero B A."""
    wide = torch.promote_types(A.dtype, torch.float32)
    with torch.autocast(A.device.type, enabled=False):
        svd = low_rank_svd([Factors(A.detach().to(wide), B.detach().to(wide), 1.0)], rank=1)
    return svd.Vh[0] * (svd.S[0] > 0)


def _same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(a is b for a, b in zip(found, wanted, strict=True))


def _as_tensor(scaling: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(scaling, dtype=like.dtype, device=like.device)


def from_config(config: LoraConfig) -> Arrow | None:
    """Arrow where the config asks for it.

    Raises:
        ConfigError: it asks for general adapters and names none.
    """
    options = config.arrow_config
    if options is None:
        return None
    general = tuple(options.gks_adapter_names or ()) if options.use_gks else ()
    if options.use_gks and not general:
        raise ConfigError(
            "arrow_config: use_gks=True without gks_adapter_names; create_arrow_model() sets them from "
            "general_adapter_paths"
        )
    return Arrow(options.top_k, options.router_temperature, general)
