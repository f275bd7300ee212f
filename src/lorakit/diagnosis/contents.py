"""What an adapter's config and tensors say of each other, and the numbers themselves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import PREFIX, from_file_key, to_file_key
from lorakit.checkpoint.reading import non_finite
from lorakit.checkpoint.sites import carries_parameters, find_sites, owner_of, sort_tensors
from lorakit.config import Matcher
from lorakit.diagnosis.finding import Finding, some
from lorakit.errors import AdapterFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.checkpoint.sites import Sorted
    from lorakit.config import LoraConfig


def sorted_shapes(file: AdapterFile) -> Sorted:
    """The file's tensors by what they are, without their numbers."""
    return sort_tensors(
        {
            from_file_key(key): torch.empty(info.shape, dtype=info.dtype, device="meta")
            for key, info in file.tensors.items()
            if key.startswith(PREFIX)
        }
    )


def ranks_of(found: Sorted) -> dict[str, int]:
    """The rank of the factors at each path, as B's shape says it."""
    return {
        path: parts["B"].shape[1]
        for path, parts in found.factors.items()
        if "B" in parts and parts["B"].ndim > 1
    }


def shape_findings(file: AdapterFile, config: LoraConfig) -> Iterator[Finding]:
    """Header against config."""
    where = str(file.weights_path)
    empty = [key for key, info in file.tensors.items() if 0 in info.shape]
    if empty:
        yield Finding(
            "error",
            "zero-size",
            where,
            f"{len(empty)} tensors hold nothing: {some(empty)}. DeepSpeed's ZeRO-3 gives such tensors where a model is saved "
            "without gathering its parameters",
            "Save through the Trainer or accelerator.get_state_dict(), or from zero_to_fp32.py's result.",
        )
        return
    found = sorted_shapes(file)
    _, problems = find_sites(found, config)
    if problems:
        yield Finding(
            "error",
            "factors",
            where,
            f"{len(problems)} pairs of factors do not go with each other or with the config: {some(problems)}",
            "Restore the config or the weights that were saved together; r, rank_pattern and target_parameters must be "
            "those of the training.",
        )
    yield from _target_findings(found, config, where)


def _target_findings(found: Sorted, config: LoraConfig, where: str) -> Iterator[Finding]:
    """Modules of the file against those that the config names."""
    paths = sorted({owner_of(path) for path in found.factors})
    if not paths and not found.rows:
        yield Finding(
            "error",
            "no-factors",
            where,
            "no LoRA tensors in the file",
            "Is it the file of an adapter? Save it again.",
        )
        return
    kinds = Counter(path.rpartition(".")[2] for path in paths)
    listed = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
    others = [f"{len(found.rest)} other tensors"] * bool(found.rest) + ["token rows"] * bool(found.rows)
    yield Finding("note", "targets", where, f"adapts {some([listed, *others])}")
    if config.target_modules == "all-linear":
        return
    matcher = Matcher(config)
    stray = [path for path in paths if not (matcher.target(path) or carries_parameters(config, path))]
    if stray:
        yield Finding(
            "error",
            "not-targeted",
            where,
            f"{len(stray)} modules have factors that target_modules does not name: {some(stray)}",
            "Put their names into target_modules of adapter_config.json, or restore the config they were saved with.",
        )
    unused = [line for line in matcher.unused() if not line.startswith(("rank_pattern", "alpha_pattern"))]
    if unused:
        yield Finding(
            "warning",
            "nothing-for-target",
            str(where),
            f"the config names what the file has nothing for: {some(unused)}",
            "Harmless where the base has no such modules; else the file is not whole.",
        )


def number_findings(file: AdapterFile, config: LoraConfig) -> Iterator[Finding]:
    """Reads the tensors once: digest, NaN and infinity, factors that are zero, dtypes."""
    where = str(file.weights_path)
    try:
        loaded = file.load(check_finite=False)
    except AdapterFormatError as error:
        yield Finding(
            "error",
            "digest",
            where,
            str(error).removeprefix(f"{where}: "),
            "Copy, download or save it again.",
        )
        return
    bad = [line for key, tensor in loaded.items() for line in non_finite(key, tensor)]
    if bad:
        yield Finding(
            "error",
            "not-finite",
            where,
            f"{len(bad)} tensors hold NaN or infinity: {some(bad)}",
            "The training diverged, or the file is damaged: go back to an earlier checkpoint.",
        )
    else:
        yield from _zero_findings(loaded, config, where)
    yield from _dtype_findings(file, where)


def _zero_findings(loaded: Mapping[str, Tensor], config: LoraConfig, where: str) -> Iterator[Finding]:
    own = sort_tensors(
        {from_file_key(key): tensor for key, tensor in loaded.items() if key.startswith(PREFIX)}
    )
    pairs = {path: parts for path, parts in own.factors.items() if {"A", "B"} <= parts.keys()}
    dead = [path for path, parts in pairs.items() if not (parts["A"].any() and parts["B"].any())]
    if not dead:
        return
    more = own.rest or own.rows or config.use_dora
    if len(dead) == len(pairs):
        yield Finding(
            "note" if more else "warning",
            "zero-factors",
            where,
            "every pair of factors has an A or a B of zeros, so the factors change nothing",
            "The adapter was saved before a step of training, or the wrong parameters were trained.",
        )
    else:
        names = [to_file_key(path) for path in dead]
        yield Finding(
            "warning",
            "zero-factors",
            where,
            f"{len(dead)} of {len(pairs)} pairs of factors are zero and change nothing: {some(names)}",
            "These modules were not reached by the training; leave them out of target_modules.",
        )


def _dtype_findings(file: AdapterFile, where: str) -> Iterator[Finding]:
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in file.tensors.values())
    if len(counts) > 1 or "float64" in counts:
        kinds = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        yield Finding(
            "note",
            "dtype",
            where,
            f"tensors: {kinds}",
            "Each is loaded as it is, and computed in the base's dtype.",
        )
