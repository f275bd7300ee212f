"""LoRA-GA: what the weights' first gradients say of where an adapter is to begin, gathered before it is put on.

Source: Wang et al., 2024, arXiv:2407.05000. No weight gets a gradient. Each layer's output passes through a node that
sees the input and the output's gradient, and adds their product to a sum (`lorakit.init.lora_ga`).
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lorakit.calibration.caches import has_cache, read_cache, write_cache
from lorakit.calibration.running import frozen, left_alone, linear_targets
from lorakit.errors import ConfigError, KeyMismatchError, NonFiniteError, PlanError
from lorakit.init.gathered import keep
from lorakit.init.lora_ga import GradientStart, new_gradient_sum, normal_matrix
from lorakit.layers.hooks import outside_autocast
from lorakit.ops.low_rank import LowRank, truncated_svd

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from lorakit.calibration.running import Target
    from lorakit.config import LoraConfig
    from lorakit.init.lora_ga import GradientSum

_PARTS = ("U", "S", "Vh")
_THEIRS = "_peft_loraga_grad"
"""What PEFT calls a layer's whole gradient in its cache."""


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Find out where a LoRA-GA adapter is to begin; call it before `get_peft_model`, with the same model and config.

    What was found is kept on the modules until an adapter has begun from it. The model is in training mode meanwhile,
    and afterwards as it was: modes, buffers, `requires_grad` flags, gradients, torch's generators.

    Args:
        model: the model that is to carry the adapter, in full or half precision.
        lora_config: of the adapter, with a `lora_ga_config`.
        train_step: runs the model forward and the loss backward, as often as it likes; gradients are averaged.
        cache_file: keeps the result; if it exists, it is read and nothing is run. A file that PEFT wrote is
            understood, one of ours is in the safetensors format.

    Raises:
        ConfigError, PlanError, UnsupportedError: the config has no `lora_ga_config`, does not fit the model, or layers
            got no gradient.
        NonFiniteError: a layer's gradient holds NaN or infinity.
        AdapterFormatError, KeyMismatchError: the file is no cache, or one for other layers, sizes or ranks. Nothing is
            kept on the model after any of these.
    """
    options = lora_config.lora_ga_config
    if options is None:
        raise ConfigError(
            "lora_ga_config: None; pass lora_ga_config=LoraGAConfig(...) to say how LoRA-GA is to begin"
        )
    targets = linear_targets(model, lora_config)
    _check_ranks(targets)
    if has_cache(cache_file):
        assert cache_file is not None
        found = _from_cache(cache_file, targets)
    else:
        found = _from_run(model, targets, train_step)
        if cache_file is not None:
            tensors = {
                f"{path}.gradient.{part}": getattr(svd, part)
                for path, svd in found.items()
                for part in _PARTS
            }
            write_cache(cache_file, tensors)
    for path, svd in found.items():
        keep(targets[path].base, "lora_ga", GradientStart(svd, options))


def _check_ranks(targets: Mapping[str, Target]) -> None:
    problems = [
        f"{path}: LoRA-GA takes 2 r = {2 * target.spec.r} singular vectors of a gradient that has "
        f"{min(target.spec.shape)} at the most; lower the rank by rank_pattern"
        for path, target in targets.items()
        if 2 * target.spec.r > min(target.spec.shape)
    ]
    if problems:
        raise PlanError(problems)


# ---- gradients ------------------------------------------------------------------------------------------------


class _Tap(torch.autograd.Function):
    """The identity, which shows a layer's input and the gradient of its output to somebody."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, _anchor: Tensor, take: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.clone()  # a view of y could not be written into by the model

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad(), outside_autocast(dy.device):
            rows = (
                dy.reshape(-1, dy.shape[-1]).to(torch.float32),
                x.reshape(-1, x.shape[-1]).to(torch.float32),
            )
            ctx.take(*rows)
        return dy, None, None, None


@contextmanager
def _tapped(modules: Mapping[str, nn.Module], take: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within this context `take(name, dy, x)` is told of every backward through these modules' outputs."""
    anchor = torch.zeros((), requires_grad=True)  # lets outputs want gradients though no parameter does
    with ExitStack() as hooks:
        for name, module in modules.items():

            def hook(_module: nn.Module, inputs: tuple[Any, ...], y: Any, name: str = name) -> Any:
                if not inputs or not isinstance(inputs[0], torch.Tensor):
                    raise ConfigError(f"{name}: is not called with a tensor as its first argument")
                return _Tap.apply(y, inputs[0].detach(), anchor, lambda dy, x: take(name, dy, x))  # type: ignore[no-untyped-call]

            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _from_run(
    model: nn.Module, targets: Mapping[str, Target], train_step: Callable[[], Any]
) -> dict[str, LowRank]:
    draw = cache(normal_matrix)
    sums: dict[str, GradientSum] = {}

    def take(name: str, dy: Tensor, x: Tensor) -> None:
        if name not in sums:
            sums[name] = new_gradient_sum(*targets[name].spec.shape, targets[name].spec.r, dy.device, draw)
        sums[name].add(dy, x)

    called = {path: target.called for path, target in targets.items()}
    with ExitStack() as during:
        during.enter_context(left_alone(model, training=True))
        during.enter_context(frozen(model))
        during.enter_context(_tapped(called, take))
        during.enter_context(torch.enable_grad())
        train_step()
    missing = [path for path in targets if path not in sums]
    if missing:
        raise PlanError(
            [f"{path}: train_step gave it no gradient; leave it out with exclude_modules" for path in missing]
        )
    return {path: _svd(path, sums[path].mean_svd, target) for path, target in targets.items()}


def _svd(path: str, decompose: Callable[[int], LowRank], target: Target) -> LowRank:
    try:
        return decompose(2 * target.spec.r)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: the gradient holds NaN or infinity") from error


# ---- the cache ------------------------------------------------------------------------------------------------


def _from_cache(where: str | os.PathLike[str], targets: Mapping[str, Target]) -> dict[str, LowRank]:
    tensors = read_cache(where)
    missing: list[str] = []
    wrong: list[str] = []
    found = {}
    for path, target in targets.items():
        whole = tensors.get(f"{path}.{_THEIRS}")
        svd = (
            _ours(path, tensors, target, missing, wrong)
            if whole is None
            else _theirs(path, whole, target, wrong)
        )
        if svd is not None:
            found[path] = svd
    if missing or wrong:
        hint = "It was gathered for another model or config; delete it to gather again."
        raise KeyMismatchError(str(where), missing=missing, mismatched=wrong, hint=hint)
    return found


def _theirs(path: str, whole: Tensor, target: Target, wrong: list[str]) -> LowRank | None:
    G = whole.mT if target.spec.layout.transposed else whole
    if tuple(G.shape) != target.spec.shape:
        wrong.append(f"{path}.{_THEIRS}: found {tuple(G.shape)}, expected {target.spec.shape}")
        return None
    return truncated_svd(G, 2 * target.spec.r)


def _ours(
    path: str, tensors: Mapping[str, Tensor], target: Target, missing: list[str], wrong: list[str]
) -> LowRank | None:
    (out, inner), k = target.spec.shape, 2 * target.spec.r
    expected = {"U": (out, k), "S": (k,), "Vh": (k, inner)}
    names = {part: f"{path}.gradient.{part}" for part in _PARTS}
    lacking = [name for name in names.values() if name not in tensors]
    missing += lacking
    shapes = {part: tuple(tensors[name].shape) for part, name in names.items() if name in tensors}
    bad = [
        f"{names[part]}: found {shape}, expected {expected[part]}"
        for part, shape in shapes.items()
        if shape != expected[part]
    ]
    wrong += bad
    if lacking or bad:
        return None
    U, S, Vh = (tensors[names[part]].clone() for part in _PARTS)
    return LowRank(U, S, Vh, 0.0, 0.0)
