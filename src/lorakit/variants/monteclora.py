"""MonteCLoRA: in training A is drawn anew in every step, with a spread that is learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch

from lorakit.specs import PartName
from lorakit.variants.nothing import LeavesBase, OnAnyWeight
from lorakit.variants.variant import Effect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.variants.variant import Call, Held, Start

_HOLDER = "lora_monteclora_sampler"
_LEAST_VARIANCE = 1e-3  # of a rank, as drawn
_LEAST = 1e-6  # of a concentration, a variance of a logit, and a variance that a logarithm is taken of


class _Draw(NamedTuple):
    """What a step drew for everything but the noise itself: chi-squares (r,), and normals (samples,)."""

    squares: Tensor
    normals: Tensor


@final
@dataclass(frozen=True, slots=True)
class Monteclora(OnAnyWeight, LeavesBase):
    """`y + scaling * B (A + noise) x` in training, `y + scaling * B A x` in eval mode and merged.

    The noise is a weighted mean of `samples` normal matrices whose rows have the variance `exp(2 s) chi^2(r)`; the
    weights are a logistic-normal draw. Given the weights w, that mean is normal itself, with the variance times
    `sum(w**2)`: so one matrix is drawn in place of `samples`, of the same distribution.

    Attributes:
        samples: how many draws are averaged.
        entropy: whether `sum(w**2)` is in the penalty.
        prior: concentration of the weights' Dirichlet prior.
        scale: factor on the noise.
        kl_weight: weight of the divergences in the penalty.

    Source: Seth et al., 2024, arXiv:2411.04358; the divergences are PEFT's.
    """

    samples: int
    entropy: bool
    prior: float
    scale: float
    kl_weight: float
    name: ClassVar[str] = "MonteCLoRA"
    field: ClassVar[str] = "monteclora_config"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = MappingProxyType(
        {
            part: PartName(_HOLDER, f"{_HOLDER}.{part}", in_module=True, attribute=part)
            for part in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
        }
    )
    # Of these two PEFT keeps what the last step drew; nothing but the penalty before a first step reads them.
    frozen: ClassVar[frozenset[str]] = frozenset({"gaussian_var_prior", "expert_weights"})
    merges: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def shapes(self, path: str, layout: Layout, r: int) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002 - the contract's
        """Log deviations (r,), log concentrations (samples,), a variance (r, r), weights (samples,)."""
        many = (self.samples,)
        return {
            "std_prior": (r,),
            "expert_weights_prior": many,
            "gaussian_var_prior": (r, r),
            "expert_weights": many,
        }

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """A and B as initialised; the logarithms uniform in [0, 1), the variance one, the weights equal."""
        spec, many = start.spec, self.samples
        made = {
            "std_prior": torch.rand(spec.r, device=spec.device),
            "expert_weights_prior": torch.rand(many, device=spec.device),
            "gaussian_var_prior": torch.eye(spec.r, device=spec.device),
            "expert_weights": torch.full((many,), 1 / many, device=spec.device),
        }
        return {"A": start.A, "B": start.B, **{part: made[part].to(spec.dtype) for part in made}}

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """The plain product, in training with another A."""
        held = call.held
        if call.training:
            held = replace(held, A=self._drawn(held, call.kept))
        return call.add(y, call.dropped(), held)

    def _drawn(self, held: Held, kept: dict[str, Any]) -> Tensor:
        """A with noise; what else was drawn is kept for the penalty, which a checkpointed step asks for afterwards."""
        A = held.A
        wide = torch.promote_types(A.dtype, torch.float32)
        r = A.shape[0]
        squares = torch.randn(r, r, dtype=wide, device=A.device).square().sum(dim=1)
        draw = _Draw(squares, torch.randn(self.samples, dtype=wide, device=A.device))
        kept["draw"] = draw
        weights, variance = self._spread(held, draw)
        noise = torch.randn(A.shape, dtype=wide, device=A.device)
        spread: Tensor = variance.sqrt() * torch.linalg.vector_norm(weights) * self.scale
        return A + (noise * spread[:, None]).to(A.dtype)

    def _spread(self, held: Held, draw: _Draw) -> tuple[Tensor, Tensor]:
        """The weights (samples,) and the variances (r,) of a draw; differentiable."""
        squares, normals = (part.to(held.A.device) for part in draw)
        variance = (_wide(held, "std_prior") * 2).exp() * squares
        alpha = _wide(held, "expert_weights_prior").exp().clamp(min=_LEAST)
        inverse = 1 / alpha
        # the normal that is nearest to a Dirichlet in the logits, its covariance cut down to the diagonal
        of_logits = inverse * (1 - 2 / self.samples) + inverse.sum() / self.samples**2
        deviation = (of_logits.clamp(min=_LEAST) + _LEAST).sqrt()
        logits = deviation * normals + alpha.log() - alpha.log().mean()
        return logits.softmax(dim=0), variance.clamp(min=_LEAST_VARIANCE)

    def penalty(self, held: Held, kept: Mapping[str, Any], count: int, *, training: bool) -> Tensor | None:
        """The divergences of the last step's distributions from their priors, averaged over `count`; in training only.

        They are PEFT's to the letter; its divergence of Dirichlets adds the logarithms of the single gamma functions,
        where the textbook's takes them off.
        """
        if not training:
            return None
        if "draw" in kept:
            weights, variance = self._spread(held, kept["draw"])
        else:
            weights, variance = _wide(held, "expert_weights"), _wide(held, "gaussian_var_prior").diagonal()
        divergence = self._of_weights(held) + _of_deviations(held) + self._of_variance(variance)
        total = self.kl_weight * divergence
        return (total + weights.square().sum() if self.entropy else total) / count

    def _of_weights(self, held: Held) -> Tensor:
        alpha = _wide(held, "expert_weights_prior").exp()
        prior = torch.full_like(alpha, self.prior)
        total = alpha.sum()
        gammas = torch.lgamma(total) - torch.lgamma(prior.sum())
        gammas = gammas + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        return gammas + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(total))).sum()

    def _of_variance(self, variance: Tensor) -> Tensor:
        variance = variance.clamp(min=_LEAST)
        return self.samples * 0.5 * (variance - variance.log() - 1).sum()

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:  # noqa: ARG002 - the contract's
        """The plain product."""
        return Effect(held.A, held.B)


def from_config(config: LoraConfig) -> Monteclora | None:
    """MonteCLoRA where the config asks for it."""
    options = config.monteclora_config
    if options is None:
        return None
    return Monteclora(
        options.num_samples,
        options.use_entropy,
        options.dirichlet_prior,
        options.sample_scaler,
        options.kl_loss_weight,
    )


def _of_deviations(held: Held) -> Tensor:
    logs = _wide(held, "std_prior") * 2
    r = len(logs)
    return 0.5 * r * (logs.exp() - logs - 1).sum()


def _wide(held: Held, part: str) -> Tensor:
    tensor = held.parts[part]
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
