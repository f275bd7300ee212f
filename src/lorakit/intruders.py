"""Reducing intruder dimensions (Shuttleworth et al., 2024, arXiv:2410.21228): forget less, for some of what was learnt.

A fine-tuned weight may have leading singular vectors that are unlike every one of the base weight. Scaling these down
gives back knowledge of the base model. What is left is brought to the adapter's rank again.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm.auto import tqdm

from lorakit.config import check_adapter_name
from lorakit.errors import AdapterNameError, ConfigError, UnsupportedError, at_path, bullet_list
from lorakit.layers.hooks import outside_autocast
from lorakit.layouts import filled
from lorakit.loading import plan_again
from lorakit.ops.low_rank import low_rank_svd, truncated_svd
from lorakit.padding import file_entries
from lorakit.state_dict import registry_of
from lorakit.surgery import attach
from lorakit.surgery.naming import names_in_file
from lorakit.surgery.paths import joined
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from lorakit.layers import LoraLayer
    from lorakit.specs import AdapterSpec
    from lorakit.surgery import AdapterRegistry, Plan


class IntruderReport(NamedTuple):
    """What `reduce_intruder_dimension` found.

    Attributes:
        intruders: by the path of each weight, how many of its leading singular vectors are intruders; of a stack of
            experts the sum.
        kept: where there are some, the share in [0, 1] of the energy (squared Frobenius norm) of the wanted change that
            the adapter's rank can hold; the smallest one of a stack.
    """

    intruders: dict[str, int]
    kept: dict[str, float]


class _Asked(NamedTuple):
    top_k: int
    threshold: float
    factor: float


def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
    *,
    show_progress: bool = True,
) -> IntruderReport:
    """Make a new adapter, active then, that is an old one with its intruder dimensions scaled down.

    For each weight W with the adapter's change D: of the `top_k` leading left singular vectors u of W + D, those are
    intruders whose cosine with every left singular vector of W is below `threshold_epsilon`. The new change is the best
    one of the adapter's rank for `D - (1 - mitigation_lambda) * sum s u v^T`. It is computed in fp32. Whole modules,
    biases and token rows are copied.

    Args:
        peft_model: a `PeftModel`, a model that adapters were injected into, or either compiled.
        old_adapter_name: of the trained adapter; it is not changed.
        new_adapter_name: a free name.
        top_k: how many singular vectors are looked at, at least 1.
        threshold_epsilon: in [0, 1]; the higher, the more vectors count as intruders.
        mitigation_lambda: in [0, 1], what an intruder is multiplied by: 0 removes it, 1 changes nothing.
        logging_sink: gets a line for each weight; None for silence.
        show_progress: show a progress bar.

    Raises:
        ConfigError: a number is out of range.
        AdapterNameError: the old name is unknown, the new one not allowed or taken.
        AdapterStateError: adapters are merged.
        UnsupportedError: the adapter is more than factors somewhere (a variant, a scheme that takes something off the
            base), is on a grouped convolution, or on a weight that cannot be read.
        NonFiniteError: a weight or a factor holds NaN or infinity. Nothing was changed after any of these.
    """
    asked = _checked(top_k, threshold_epsilon, mitigation_lambda)
    registry, _ = registry_of(peft_model)
    check_adapter_name(new_adapter_name)
    registry.check_known([old_adapter_name])
    if new_adapter_name in registry.configs:
        raise AdapterNameError(
            f"adapter {new_adapter_name!r} exists already; choose another name or delete it first"
        )
    registry.check_unmerged("reducing intruder dimensions")
    _check_can(registry, old_adapter_name)
    tensors = {item.file_name: item.in_file().clone() for item in file_entries(registry, old_adapter_name)}
    plan = _plan(registry, old_adapter_name, tensors)
    say = logging_sink or (lambda _: None)
    report = IntruderReport({}, {})
    own = [spec for spec in plan.specs if spec.tied_to is None]
    names = names_in_file(plan)
    for spec in tqdm(own, desc="reducing intruder dimensions", unit="weight", disable=not show_progress):
        layer = registry.layers[spec.path]
        with at_path(spec.path), outside_autocast(spec.device):
            changed = _reduced(layer, old_adapter_name, spec, asked, report)
        count = report.intruders[spec.path]
        say(f"{spec.path}: {count} intruders" if count else f"{spec.path}: no intruders")
        for part, key in spec.file_names.items():
            key_in_file = joined(names.layer(spec.path), key)
            tensors[key_in_file] = changed.get(part, tensors[key_in_file])
    say(f"enabling {new_adapter_name}")
    attach(registry.model, replace(plan, notes=()), new_adapter_name, tensors=tensors)
    registry.set_active([new_adapter_name], inference_mode=plan.config.inference_mode)
    return report


def _checked(top_k: int, threshold: float, factor: float) -> _Asked:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k: got {top_k!r}, wanted an integer >= 1")
    for name, value in (("threshold_epsilon", threshold), ("mitigation_lambda", factor)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"{name}: got {value!r}, wanted a number in [0, 1]")
    return _Asked(top_k, float(threshold), float(factor))


def _plan(registry: AdapterRegistry, name: str, tensors: Mapping[str, Tensor]) -> Plan:
    """Where the new adapter goes: where the old one is, in the dtypes that it has there."""
    plan = plan_again(registry, name, tensors)
    dtypes = {spec.path: registry.layers[spec.path].stored(name).A.dtype for spec in plan.specs}
    return replace(plan, specs=tuple(replace(spec, dtype=dtypes[spec.path]) for spec in plan.specs))


def _check_can(registry: AdapterRegistry, name: str) -> None:
    """Refuse what has no single pair of factors for a weight.

    Raises:
        UnsupportedError: listing all such weights.
    """
    problems = []
    for path, layer in registry.layers.items():
        if name in layer.variants:
            problems.append(f"{path}: {layer.variants[name].name} is more than A and B")
        elif layer.lora_offset is not None and name in layer.lora_offset:
            problems.append(f"{path}: the adapter also takes something off the base (its initialisation)")
        elif name in layer.r and layer.layout.groups > 1:
            problems.append(
                f"{path}: a grouped convolution has no singular vectors in common with its adapter"
            )
    if problems:
        hint = "Save the adapter as plain LoRA, or train one that leaves these layers out."
        raise UnsupportedError(bullet_list("intruder dimensions cannot be reduced here", problems, hint))


@torch.no_grad()
def _reduced(
    layer: LoraLayer, name: str, spec: AdapterSpec, asked: _Asked, report: IntruderReport
) -> dict[str, Tensor]:
    """The new factors as they are stored; those of the old adapter that stay the same are left out."""
    stored = layer.stored(name)
    wide = torch.float64 if torch.float64 in {stored.A.dtype, layer.original_weight.dtype} else torch.float32
    weight = layer.read_weight(wide)
    blocks = []
    found, kept = 0, []
    for W, old in zip(weight if spec.layout.experts else [weight], layer.blocks(name), strict=True):
        part = Factors(old.A.to(wide), old.B.to(wide), old.scaling)
        intruders = _intruders(W, part, asked)
        found += intruders.rank
        changed = [part, intruders] if intruders.rank else [part]
        svd = low_rank_svd(changed, rank=spec.layout.block_rank(spec.r))
        kept.append(1.0 - svd.rest**2 / svd.energy if svd.energy else 1.0)
        root = (svd.S / abs(spec.scaling)).sqrt()
        A, B = root[:, None] * svd.Vh, svd.U * root * math.copysign(1.0, spec.scaling)
        rank = spec.layout.block_rank(spec.r)
        blocks.append(Factors(filled(A, rank, dim=0), filled(B, rank, dim=1), 1.0))
    report.intruders[spec.path] = found
    # a scaling that was changed on the layer is folded in: the new adapter has the one that its config says
    ratio = float(layer.scaling[name]) / spec.scaling
    bias = {} if stored.bias is None else {"bias": stored.bias.detach() * ratio}
    if not found:
        return bias | ({"B": stored.B.detach() * ratio} if ratio != 1.0 else {})
    report.kept[spec.path] = min(kept)
    A, B, _ = spec.layout.join(blocks)
    return {"A": A, "B": B} | bias


def _intruders(W: Tensor, part: Factors, asked: _Asked) -> Factors:
    """What is added to W's change `part`: the intruders times `factor - 1`, of rank 0 if there are none."""
    leading = truncated_svd(W + part.delta(W.dtype), asked.top_k)
    ours = _alien(leading.U, W, part.rank, asked.threshold)
    return Factors(leading.Vh[ours], leading.U[:, ours] * leading.S[ours], asked.factor - 1.0)


def _alien(U: Tensor, W: Tensor, rank: int, threshold: float) -> Tensor:
    """Which columns of U (out, k) have a cosine below `threshold` with every left singular vector of W; (k,) of bool.

    Adding a matrix of some rank moves a vector that stays by no more places, so the leading ones of W answer for nearly
    all columns. One that is unlike them is an intruder for sure if less than `threshold` of its norm lies beyond them;
    else all of W's vectors are computed.
    """
    lead = U.shape[1] + rank
    if 4 * lead >= min(W.shape):
        return _cosines(U, torch.linalg.svd(W, full_matrices=False).U).amax(dim=1) < threshold
    cosines = _cosines(U, truncated_svd(W, lead).U)
    alien = cosines.amax(dim=1) < threshold
    beyond = (1.0 - cosines.square().sum(dim=1)).clamp(min=0.0).sqrt()
    doubtful = alien & (beyond >= threshold)
    if doubtful.any():
        everything = torch.linalg.svd(W, full_matrices=False).U
        alien[doubtful] = _cosines(U[:, doubtful], everything).amax(dim=1) < threshold
    return alien


def _cosines(U: Tensor, others: Tensor) -> Tensor:
    return (U.mT @ others).abs()
