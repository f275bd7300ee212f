"""LoRA-FA (Zhang et al., 2023, arXiv:2308.03303): A stays as it is, B follows the full weight's gradient.

With A frozen a step of B changes the weight by `scaling * dB A`. The one nearest to a step along the full gradient G is
`dB = g_B (A A^T)^-1 / scaling^2`, where `g_B = scaling * G A^T` is what backward gives. AdamW then runs on dB. Nothing of
a layer's input is kept for backward (`lorakit.ops.fused`), and A has no optimizer state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer

from lorakit.errors import ConfigError, UnsupportedError, bullet_list
from lorakit.ops.stamps import Stamp
from lorakit.optimizers.arguments import check_number, trained_of
from lorakit.state_dict import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BY_PRODUCT = frozenset({"use_dora", "alora_invocation_tokens"})
"""Fields of variants under which B changes the weight by `scaling * dB A`, but for a factor on its rows."""


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None,
    lora_alpha: float | None,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freeze every A of the trainable adapters and give an optimizer of all that is left trainable.

    Ranks and scalings are read off the layers, so `rank_pattern`, rsLoRA, several adapters and layers of every kind are
    right. `set_adapter` makes A trainable again: call this afterwards.

    Args:
        model: a `PeftModel`, a model that adapters were injected into, or either compiled.
        r: what the adapters' configs say, as a check; None where they differ.
        lora_alpha: the same.
        lr: the learning rate.
        weight_decay: decoupled, as AdamW's.
        use_rslora: the same check.

    Raises:
        TypeError: a number is none.
        ConfigError: a number is out of range, or is not what a config says.
        AdapterNameError: the model carries no adapter.
        AdapterStateError: none of its adapters is trainable.
        UnsupportedError: an A is zero and would stay so, a B is frozen, factors are tied to another layer's, or a variant
            acts otherwise than by `B A`. No flag was changed after any of these.
    """
    registry, _ = registry_of(model)
    names = trained_of(registry)
    _check_made_with(registry, names, {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora})
    pairs = dict(_pairs(registry, names))
    frozen = [layer.stored(name).A for layer, name in pairs.values()]
    without = {id(A) for A in frozen}
    trained = [each for each in model.parameters() if each.requires_grad and id(each) not in without]
    optimizer = LoraFAOptimizer(trained, lr=lr, weight_decay=weight_decay, pairs=pairs)
    for A in frozen:
        A.requires_grad = False
    return optimizer


class LoraFAOptimizer(Optimizer):
    """AdamW whose gradients of B are those of LoRA-FA; `create_lorafa_optimizer` makes one for a model.

    AdamW as PEFT's optimizer has it: eps is not divided by the bias correction, and weights decay after the step.
    Moments are kept in fp32 for half-precision parameters, also through `state_dict()` and back: in bf16 the second one
    could not decay, since 0.999 rounds to 1.

    Args:
        params: parameters, or groups of them.
        lr: the learning rate.
        betas: decays of the averages of the gradient and of its square.
        eps: added to the root of the second.
        weight_decay: decoupled.
        correct_bias: divide the averages by what they lack at the beginning.
        pairs: the layer and the adapter of each parameter that is some adapter's B; others get plain AdamW.

    Raises:
        TypeError, ConfigError: a number is none, or out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pairs: Mapping[nn.Parameter, tuple[LoraLayer, str]],
    ) -> None:
        check_number("lr", lr)
        check_number("eps", eps)
        check_number("weight_decay", weight_decay)
        for beta in betas:
            check_number("betas", beta)
            if beta >= 1.0:
                raise ConfigError(f"betas: got {beta!r}, wanted numbers below 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        self._projections = {B: _Projection(layer, name) for B, (layer, name) in pairs.items()}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gives what `closure` gives, which computes the loss and its gradients again.

        Raises:
            UnsupportedError: a gradient is sparse; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [
            [(p, self._gradient(p)) for p in group["params"] if p.grad is not None]
            for group in self.param_groups
        ]
        for group, pairs in zip(self.param_groups, gradients, strict=True):
            if pairs:
                self._adamw(group, [p for p, _ in pairs], [gradient for _, gradient in pairs])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the moments to the parameters' dtype; here they stay as they were saved."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for parameter, key in zip(parameters, keys, strict=True):
            saved = state_dict["state"].get(key, {})
            for moment in _MOMENTS:
                if moment in saved:
                    self.state[parameter][moment] = saved[moment].to(
                        parameter.device, _wide(parameter), copy=True
                    )

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """What AdamW is to follow, in fp32 at least."""
        grad = cast("Tensor", parameter.grad)
        if grad.is_sparse:
            raise UnsupportedError("LoRA-FA's AdamW needs dense gradients; make embeddings with sparse=False")
        projection = self._projections.get(parameter)
        wide = grad.to(_wide(parameter))
        return wide if projection is None else projection.of(wide)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """All parameters of a group in a dozen calls, however many there are."""
        states = [self._state(parameter) for parameter in parameters]
        first, second = ([state[moment] for state in states] for moment in _MOMENTS)
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_add_(roots, group["eps"])
        sizes = []
        for state in states:
            state["step"] += 1
            number = state["step"]
            missing = (1.0 - beta1**number, 1.0 - beta2**number) if group["correct_bias"] else (1.0, 1.0)
            sizes.append(-float(group["lr"]) * math.sqrt(missing[1]) / missing[0])
        weights = [parameter.detach().to(_wide(parameter)) for parameter in parameters]
        torch._foreach_addcdiv_(weights, first, roots, sizes)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight.dtype != parameter.dtype:  # else it is the parameter's own memory
                parameter.copy_(weight)

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(parameter, dtype=_wide(parameter))
        return state


class _Projection:
    """What makes `g (A A^T)^-1 / scaling^2` of B's gradient g; computed again only if A was written to, or rescaled."""

    def __init__(self, layer: LoraLayer, name: str) -> None:
        self._layer, self._name = layer, name
        self._stamp: Stamp | None = None
        self._inverse = self._scaled = torch.empty(0)
        self._scaling = 0.0

    def of(self, grad: Tensor) -> Tensor:
        """In the shape and dtype of B's gradient."""
        layout = self._layer.layout
        inverse = self._inverse_for(grad)
        if layout.experts:  # (out, r, experts)
            blocks = grad.view(layout.out, -1, layout.experts).permute(2, 0, 1)
            return (blocks @ inverse).permute(1, 2, 0).reshape(grad.shape)
        blocks = grad.reshape(layout.groups, -1, inverse.shape[-1])
        return (blocks @ inverse).view(grad.shape)

    def _inverse_for(self, grad: Tensor) -> Tensor:
        """(blocks, r, r), with the present scaling; an adapter with scaling 0 has no gradient to follow."""
        A = self._layer.stored(self._name).A
        scaling = float(self._layer.scaling[self._name])
        stamp = self._stamp
        holds = stamp is not None and stamp.tensors[0] is A and stamp.holds()
        if not holds:
            blocks = A.detach().reshape(self._layer.layout.blocks, -1, self._layer.layout.shape[1])
            self._inverse = inverse_gram(blocks).to(grad.dtype)
            self._stamp = Stamp.of([A])
        if not holds or scaling != self._scaling:
            self._scaled = self._inverse * (1.0 / scaling**2 if scaling else 0.0)
            self._scaling = scaling
        return self._scaled


@torch.no_grad()
def inverse_gram(A: Tensor) -> Tensor:
    """The pseudo-inverse of `A A^T`, for a stack of matrices.

    From the SVD of A in fp64, not from the product, whose condition is the square of A's; what is applied at every
    step is this matrix, so its own rounding is all that is left.

    Args:
        A: (..., r, in), any floating dtype.

    Returns:
        (..., r, r) in float64.
    """
    U, S, _ = torch.linalg.svd(A.double(), full_matrices=False)
    least = S.amax(dim=-1, keepdim=True) * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
    inverse = torch.where(least < S, S, torch.inf).pow(-2)
    return cast("Tensor", (U * inverse.unsqueeze(-2)) @ U.mT)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _pairs(
    registry: AdapterRegistry, names: Iterable[str]
) -> Iterator[tuple[nn.Parameter, tuple[LoraLayer, str]]]:
    """Every B that is trained, with its layer and adapter.

    Raises:
        UnsupportedError: listing those that LoRA-FA cannot train.
    """
    problems, found = [], []
    for path, layer in registry.layers.items():
        for name in names:
            if name not in layer.r:
                continue
            A, B, _ = layer.stored(name)
            if not (A.requires_grad or B.requires_grad):
                continue
            reason = _why_not(layer, name)
            if reason:
                problems.append(f"{path}: {reason}")
            found.append((cast("nn.Parameter", B), (layer, name)))
    if problems:
        raise UnsupportedError(bullet_list("LoRA-FA cannot train these", problems))
    yield from found


def _why_not(layer: LoraLayer, name: str) -> str:
    """Why LoRA-FA cannot train an adapter on a layer, or an empty text."""
    if name in layer.tied:
        return "its factors are another layer's (ensure_weight_tying), whose gradient is a sum over both"
    variant = layer.variants.get(name)
    if variant is not None and variant.field not in _BY_PRODUCT:
        return f"{variant.name} does not act by the product of its A and B alone"
    A, B, _ = layer.stored(name)
    if not B.requires_grad:
        return "its B is not trained"
    if not A.any():
        return "A is zero and would stay so; leave this layer out of target_modules, or give A a start of its own"
    return ""


def _check_made_with(
    registry: AdapterRegistry, names: Iterable[str], asked: Mapping[str, float | None]
) -> None:
    """Refuse numbers that are not the configs'.

    Raises:
        ConfigError: listing them; None is not compared.
    """
    problems = []
    for name in names:
        made = registry.configs[name].to_dict()
        problems += [
            f"{field}: got {value!r}, but {name!r} was made with {made[field]!r}"
            for field, value in asked.items()
            if value is not None and value != made[field]
        ]
    if problems:
        hint = "Scalings are read off the layers; pass None where the adapters differ."
        raise ConfigError(bullet_list("create_lorafa_optimizer", problems, hint))
