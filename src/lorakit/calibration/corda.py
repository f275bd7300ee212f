"""CorDA: what its layers' inputs say of where an adapter is to begin, gathered before the adapter is put on.

Source: Yang et al., 2024, arXiv:2406.05223. One covariance matrix is kept for each distinct input, (in, in), and one
input at a time; what comes out for a layer has the size of the adapter.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from lorakit.calibration.caches import has_cache, read_cache, write_cache
from lorakit.calibration.running import SharedRows, left_alone, linear_targets, rows_of, watched
from lorakit.config import CordaConfig
from lorakit.errors import ConfigError, KeyMismatchError, NonFiniteError, PlanError, at_path
from lorakit.init.corda import OrientedParts, oriented_parts
from lorakit.init.gathered import keep
from lorakit.layers.hooks import outside_autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from lorakit.calibration.running import Target
    from lorakit.config import LoraConfig

_PARTS = {"S": "eigens.S_WC", "U": "eigens.U_WC", "V": "eigens.V_WC"}
"""The names that the parts of a layer have in a cache, below the layer."""


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find out where a CorDA adapter is to begin; call it before `get_peft_model`, with the same model and config.

    What was found is kept on the modules until an adapter has begun from it (for good with
    `prune_temporary_fields=False`). The model is in evaluation mode meanwhile, and afterwards as it was.

    Args:
        model: the model that is to carry the adapter.
        lora_config: of the adapter; `corda_config` says how (`CordaConfig`, whose defaults hold where it is None).
            `cache_file` keeps the result, `covariance_file` the covariances: what is in a file that exists is not
            gathered again. A file that PEFT wrote is understood, one of ours is in the safetensors format.
        run_model: runs the model on the data, as often as it likes; each call of a layer counts alike. May be None
            when one of the files exists.
        hooked_model: another model with the same layers, which `run_model` runs in the place of `model`.

    Raises:
        ConfigError, PlanError, UnsupportedError: the config does not fit the model, there is neither a file nor
            `run_model`, or layers were not called.
        NonFiniteError: a layer's input, covariance or weight holds NaN or infinity.
        AdapterFormatError, KeyMismatchError: a file is no cache, or one for other layers, sizes or ranks. Nothing is
            kept on the model after any of these.
    """
    options = lora_config.corda_config or CordaConfig()
    targets = linear_targets(model, lora_config)
    _check_ranks(targets)
    if has_cache(options.cache_file):
        assert options.cache_file is not None
        found = _from_cache(options.cache_file, targets, lasting=not options.prune_temporary_fields)
    else:
        covariances = _covariances(model, targets, options, run_model, hooked_model)
        found = {}
        bar = tqdm(targets.items(), disable=not options.verbose, desc="CorDA")
        for path, target in bar:
            with at_path(path):
                found[path] = oriented_parts(
                    target.read(torch.float32),
                    covariances[path],
                    target.spec.r,
                    options.corda_method,
                    lasting=not options.prune_temporary_fields,
                )
        if options.cache_file is not None:
            write_cache(options.cache_file, _to_cache(found))
    for path, parts in found.items():
        keep(targets[path].base, "corda", parts)


def _check_ranks(targets: Mapping[str, Target]) -> None:
    problems = [
        f"{path}: CorDA begins from the weight, which has rank {min(target.spec.shape)} at the most, got {target.spec.r}"
        for path, target in targets.items()
        if target.spec.r > min(target.spec.shape)
    ]
    if problems:
        raise PlanError(problems)


# ---- covariances --------------------------------------------------------------------------------------------


class _Covariance(NamedTuple):
    """The mean of `x^T x` over calls, each x divided by the size of its largest entry; and how many calls."""

    matrix: Tensor
    calls: int


class _Covariances:
    """Of each set of layers that were given the same input."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._means: dict[frozenset[str], _Covariance] = {}
        self.rows = SharedRows(self._take)

    def see(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Take the input of one call of a layer."""
        rows = rows_of(inputs, name).to(torch.float32)
        if not rows.numel():
            return
        top = rows.max().abs()
        top = torch.where(top > 0, top, rows.abs().max())
        if not bool(torch.isfinite(rows.sum())):
            raise NonFiniteError(f"{name}: the input holds NaN or infinity")
        self.rows.add(name, rows / torch.where(top > 0, top, 1.0))

    def _take(self, names: frozenset[str], rows: Tensor) -> None:
        inner = rows.shape[1]
        mean = self._means.get(names)
        if mean is None:
            mean = _Covariance(torch.zeros(inner, inner, dtype=self._dtype, device=rows.device), 0)
        count = mean.calls + 1
        with outside_autocast(rows.device):
            wide = mean.matrix.to(torch.float32)
            wide.mul_((count - 1) / count).addmm_(rows.mT, rows, alpha=1 / count)
        matrix = wide.to(self._dtype)
        if not bool(torch.isfinite(matrix.diagonal()).all()):  # which has the largest entries
            hint = "" if self._dtype == torch.float32 else "; leave use_float16_for_covariance False"
            raise NonFiniteError(f"{', '.join(sorted(names))}: the covariance has overflowed{hint}")
        self._means[names] = _Covariance(matrix, count)

    def result(self) -> dict[str, Tensor]:
        """The covariance of each layer that was called; layers share it where they shared their inputs."""
        self.rows.flush()
        keys: dict[str, list[frozenset[str]]] = {}
        for names in self._means:
            for name in names:
                keys.setdefault(name, []).append(names)
        return {name: self._mean_of(its_keys) for name, its_keys in keys.items()}

    def _mean_of(self, keys: list[frozenset[str]]) -> Tensor:
        means = [self._means[key] for key in keys]
        if len(means) == 1:
            return means[0].matrix
        total = sum(mean.calls for mean in means)
        return torch.stack([mean.matrix.float() * (mean.calls / total) for mean in means]).sum(dim=0)


def _covariances(
    model: nn.Module,
    targets: Mapping[str, Target],
    options: CordaConfig,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """The covariance of each layer's inputs, from the file or from a run, which then is written to it."""
    if has_cache(options.covariance_file):
        assert options.covariance_file is not None
        return _checked(read_cache(options.covariance_file), targets, options.covariance_file)
    if run_model is None:
        raise ConfigError(
            "run_model: None, and neither cache_file nor covariance_file exists; CorDA needs one of the three"
        )
    called = {path: target.called for path, target in targets.items()}
    if hooked_model is not None:
        modules = dict(hooked_model.named_modules())
        called = {path: modules[path] for path in targets if path in modules}
    seen = _Covariances(torch.float16 if options.use_float16_for_covariance else torch.float32)
    with ExitStack() as during:
        during.enter_context(left_alone(model if hooked_model is None else hooked_model, training=False))
        during.enter_context(watched(called, seen.see))
        run_model()
    found = seen.result()
    missing = [path for path in targets if path not in found]
    if missing:
        raise PlanError(
            [f"{path}: run_model did not call it; leave it out with exclude_modules" for path in missing]
        )
    if options.covariance_file is not None:
        write_cache(options.covariance_file, {path: found[path] for path in targets})
    return found


def _checked(found: Mapping[str, Tensor], targets: Mapping[str, Target], where: str) -> dict[str, Tensor]:
    missing = [path for path in targets if path not in found]
    wrong = []
    for path, target in targets.items():
        inner = target.spec.shape[1]
        if path in found and tuple(found[path].shape) != (inner, inner):
            wrong.append(f"{path}: found {tuple(found[path].shape)}, expected {(inner, inner)}")
    if missing or wrong:
        raise KeyMismatchError(where, missing=missing, mismatched=wrong, hint=_OTHER)
    return {path: found[path] for path in targets}


_OTHER = "It was gathered for another model or config; delete it to gather again."


# ---- the cache ------------------------------------------------------------------------------------------------


def _to_cache(found: Mapping[str, OrientedParts]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": getattr(parts, part)
        for path, parts in found.items()
        for part, name in _PARTS.items()
    }


def _from_cache(where: str, targets: Mapping[str, Target], *, lasting: bool) -> dict[str, OrientedParts]:
    tensors = read_cache(where)
    missing, wrong, found = [], [], {}
    for path, target in targets.items():
        names = {part: f"{path}.{name}" for part, name in _PARTS.items()}
        (out, inner), r = target.spec.shape, target.spec.r
        expected = {"S": (r,), "U": (out, r), "V": (inner, r)}
        lacking = [name for name in names.values() if name not in tensors]
        shapes = {part: tuple(tensors[name].shape) for part, name in names.items() if name in tensors}
        missing += lacking
        wrong += [
            f"{names[part]}: found {shape}, expected {expected[part]}"
            for part, shape in shapes.items()
            if shape != expected[part]
        ]
        if not lacking:
            own = {part: tensors[name].to(torch.float32, copy=True) for part, name in names.items()}
            found[path] = OrientedParts(own["U"], own["S"], own["V"], lasting)
    if missing or wrong:
        raise KeyMismatchError(where, missing=missing, mismatched=wrong, hint=_OTHER)
    return found
