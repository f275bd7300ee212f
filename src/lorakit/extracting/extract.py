"""`lorakit.extract`: a full fine-tune as an adapter, from two checkpoints.

Which layers there are, and of what kind, is asked of the model's class on the meta device: the numbers alone do not say
whether a matrix is a linear layer's, a `Conv1D`'s or an embedding's. The numbers are read weight by weight.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.hub import resolve_model
from lorakit.checkpoint.keys import natural_key, to_file_key
from lorakit.checkpoint.resizing import check_rank
from lorakit.checkpoint.shards import open_shards
from lorakit.checkpoint.storing import module_pattern, refuse_existing, silent
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import ConfigError, UnsupportedError, at_path, bullet_list
from lorakit.extracting.changes import Change, Numbers, find_changes, known_names
from lorakit.extracting.choosing import Asked, check_covered, choose
from lorakit.extracting.factoring import Factored, factored
from lorakit.skeleton import build_skeleton
from lorakit.surgery import make_plan
from lorakit.surgery.naming import names_in_file
from lorakit.surgery.paths import joined

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lorakit.checkpoint.storing import Progress
    from lorakit.config import LoraConfig
    from lorakit.surgery import Plan

    StrPath = str | os.PathLike[str]

_DTYPES = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class ExtractedLayer:
    """The factors of one weight's change.

    Attributes:
        path: of the module.
        shape: (out, in) of the weight.
        rank: of the factors.
        change: the Frobenius norm of the change relative to that of the weight, the larger of before and after.
        norm: the Frobenius norm of the change.
        error: the norm of what is lost, with the rounding to the factors' dtype, relative to `norm`.
        kept: the share of the energy (the squared norm) that is kept, `1 - error**2`.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    change: float
    norm: float
    error: float
    kept: float


@dataclass(frozen=True)
class LeftOut:
    """A change that is not in the adapter, as asked.

    Attributes:
        name: of the tensor.
        change: its norm relative to the weight's; None where the two cannot be subtracted.
    """

    name: str
    change: float | None


@dataclass(frozen=True)
class Extraction:
    """What `extract` did.

    Attributes:
        output: the folder written.
        layers: a row for each weight that became factors, by path.
        whole: names of tensors that are kept whole, with those of modules in `modules_to_save` that did not change.
        left_out: changes that were to be ignored.
        unchanged: how many tensors of the model are the same in both.
        parameters: of all tensors of the adapter.
        kept: the share of the energy of all changes together that became factors.
        notes: what a user should know.
    """

    output: str
    layers: tuple[ExtractedLayer, ...]
    whole: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    unchanged: int
    parameters: int
    kept: float
    notes: tuple[str, ...]


def extract(
    base: StrPath,
    tuned: StrPath,
    output: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
    ignore: Sequence[str] = (),
    tolerance: float = 0.0,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Extraction:
    """Write the adapter that makes of one checkpoint another one, as well as factors of a rank can.

    The change of each weight is computed in fp32 (fp64 of fp64 weights) and its leading singular triplets are within 1e-5
    of the best. Two weights at a time are in memory, and the adapter.

    Args:
        base: the checkpoint that the adapter will be loaded on: a folder with safetensors, in one file or in shards, or a
            repository of the hub.
        tuned: the changed one, with the `config.json` of its model.
        output: the folder to write.
        rank: of every weight's factors. With `energy`: the largest that a weight may get.
        energy: in (0, 1]: each weight gets the fewest ranks that hold this share of the squared norm of its change.
        target_modules: names that end the paths of the modules whose weights become factors. None: every linear layer
            and convolution but the head, as far as it changed.
        modules_to_save: of modules to keep whole, such as "embed_tokens", "lm_head", "norm": any ending of a path.
        bias: which biases are kept: "none", "all" or "lora_only" (of modules with factors).
        ignore: names that end the names of tensors or modules whose change is left out.
        tolerance: a weight that changed by no more than this share of its norm counts as unchanged.
        dtype: of the factors: "float32", "bfloat16" or "float16". What is kept whole has that of `tuned`.
        overwrite: replace an adapter that is in `output` already.
        progress: is called with (what, done, total).

    Returns:
        What became of each weight.

    Raises:
        ConfigError: the request is not sound, a name means nothing, nothing changed, the two are not of one model, or
            `output` holds an adapter.
        AdapterNotFoundError, AdapterFormatError: a checkpoint cannot be read.
        NonFiniteError: a change holds NaN or infinity.
        UnsupportedError: a checkpoint is quantised or not of safetensors; or tensors changed that the adapter has no place
            for: all are listed.
        OSError: the disk refused. Nothing was written after any of these.
    """
    check_rank(rank, energy)
    _check_rest(tolerance, dtype)
    target = Path(output)
    refuse_existing(target, overwrite=overwrite)
    asked = Asked(target_modules, modules_to_save, bias, ignore)
    with ExitStack() as stack:
        first, second = open_shards(resolve_model(base)), open_shards(resolve_model(tuned))
        model = build_skeleton(second.folder)
        known = known_names(model)
        before, after = Numbers(first, known, stack), Numbers(second, known, stack)
        changes = find_changes(before, after, known, tolerance, progress)
        plan = make_plan(model, choose(model, changes, known, asked, rank or 1))
        left = check_covered(plan, changes, known, asked)
        _check_whole(plan, after)
        found = _factored(plan, before, after, rank, energy, _DTYPES[dtype], progress)
        plan = make_plan(model, _with_ranks(plan.config, found))
        tensors = {**_stored(plan, found), **_whole(plan, after)}
    config = replace(plan.config, base_model_name_or_path=str(base), inference_mode=True)
    write_adapter(target, config.to_dict(), {to_file_key(name): tensor for name, tensor in tensors.items()})
    layers = _layers(plan, found, changes)
    energies = [(layer.norm**2, layer.kept) for layer in layers]
    return Extraction(
        output=str(target),
        layers=layers,
        whole=tuple(sorted(_whole_names(plan).values(), key=natural_key)),
        left_out=tuple(LeftOut(change.name, change.size) for change in left),
        unchanged=len(set(known.values())) - len(changes),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        kept=sum(own * kept for own, kept in energies) / sum(own for own, _ in energies),
        notes=tuple(_notes(before, after)),
    )


def _check_rest(tolerance: float, dtype: str) -> None:
    if not 0.0 <= tolerance < 1.0:
        raise ConfigError(
            f"tolerance={tolerance!r}: wanted a share of a weight's norm in [0, 1), such as 1e-4"
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: wanted one of {', '.join(_DTYPES)}")


def _factored(
    plan: Plan,
    base: Numbers,
    tuned: Numbers,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Factored]:
    """The factors of every weight in a plan, by the path of its module."""
    found = {}
    for done, spec in enumerate(plan.specs):
        progress("decomposing", done, len(plan.specs))
        name = f"{spec.path}.weight"
        with at_path(spec.path):
            change = _change(name, base, tuned)
            found[spec.path] = factored(change, spec.layout, rank, energy, dtype)
    progress("decomposing", len(found), len(found))
    return found


def _change(name: str, base: Numbers, tuned: Numbers) -> Tensor:
    before, after = base.find(name), tuned.find(name)
    assert before is not None
    assert after is not None
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return tuned.whole(name, wide).sub_(base.whole(name, wide))


def _with_ranks(config: LoraConfig, found: Mapping[str, Factored]) -> LoraConfig:
    """The config with the rank of each module, and the alphas that make every scaling 1."""
    ranks = {path: each.factors.rank for path, each in found.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {module_pattern(path): own for path, own in ranks.items() if own != r}
    return replace(config, r=r, lora_alpha=r, rank_pattern=patterns, alpha_pattern=dict(patterns))


# ---- tensors of the file ------------------------------------------------------------------------------


def _stored(plan: Plan, found: Mapping[str, Factored]) -> dict[str, Tensor]:
    names = names_in_file(plan)
    tensors = {}
    for spec in plan.specs:
        A, B, _ = spec.layout.join([found[spec.path].factors])
        for part, tensor in (("A", A), ("B", B)):
            tensors[joined(names.layer(spec.path), spec.file_names[part])] = tensor
    return tensors


def _whole_names(plan: Plan) -> dict[str, str]:
    """The names in the file of what is kept whole, with those in the model."""
    found = {
        f"{path}.{key}": f"{path}.{key}"
        for path in plan.modules_to_save
        for key in plan.description.nodes[path].module.state_dict()
    }
    names = names_in_file(plan)
    return {**found, **{names.parameter(name): name for name in plan.biases}}


def _check_whole(plan: Plan, tuned: Numbers) -> None:
    absent = [name for name in _whole_names(plan).values() if tuned.find(name) is None]
    if absent:
        raise UnsupportedError(
            bullet_list(f"{tuned.folder}: does not hold tensors that are to be kept whole", absent)
        )


def _whole(plan: Plan, tuned: Numbers) -> dict[str, Tensor]:
    return {key: tuned.whole(name) for key, name in _whole_names(plan).items()}


# ---- what is told -------------------------------------------------------------------------------------


def _layers(
    plan: Plan, found: Mapping[str, Factored], changes: Mapping[str, Change]
) -> tuple[ExtractedLayer, ...]:
    layers = []
    for spec in sorted(plan.specs, key=lambda spec: natural_key(spec.path)):
        own = found[spec.path]
        change = changes[f"{spec.path}.weight"].size or 0.0
        kept = max(0.0, 1.0 - own.error**2)
        layers.append(
            ExtractedLayer(spec.path, spec.shape, own.factors.rank, change, own.norm, own.error, kept)
        )
    return tuple(layers)


def _notes(base: Numbers, tuned: Numbers) -> list[str]:
    return [
        f"{each.folder}: has tensors that the model does not know, which were not looked at: "
        + ", ".join(each.strange[:5])
        + f" and {len(each.strange) - 5:,} more" * (len(each.strange) > 5)
        for each in (base, tuned)
        if each.strange
    ]
