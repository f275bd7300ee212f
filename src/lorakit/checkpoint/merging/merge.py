"""`lorakit.merge_checkpoint`: adapters into a checkpoint, from files to files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.atomic import made, naming
from lorakit.checkpoint.hub import resolve_adapter, resolve_model
from lorakit.checkpoint.merging.carrying import read_carried, repaired_config, small_files
from lorakit.checkpoint.merging.changes import Gathering, check_apart
from lorakit.checkpoint.merging.checking import check_output
from lorakit.checkpoint.merging.fitting import FLOATS
from lorakit.checkpoint.merging.names import make_names
from lorakit.checkpoint.merging.output import Layouting, OutFile, lay_out, parse_size
from lorakit.checkpoint.merging.parts import AdapterParts, open_parts
from lorakit.checkpoint.merging.settling import settle
from lorakit.checkpoint.merging.streaming import Streamer
from lorakit.checkpoint.merging.ties import find_ties
from lorakit.checkpoint.merging.weight import Weight, WeightReader
from lorakit.checkpoint.merging.work import check_outside, check_target, working_on
from lorakit.checkpoint.shards import CONFIG, INDEX, ShardReader, open_shards
from lorakit.checkpoint.storing import refuse_twice
from lorakit.config import strict_json
from lorakit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorakit.checkpoint.shards import ModelShards

    Progress = Callable[[str, int, int], None]
    StrPath = str | os.PathLike[str]

_MEGABYTE = 10**6


@dataclass(frozen=True)
class CheckpointMerge:
    """What `merge_checkpoint` did.

    Attributes:
        output: the folder written.
        files: how many files of weights are in it.
        merged: how many tensors of the base were changed.
        copied: how many were not.
        untied: names that got a tensor of their own, since merging parted them from the weight they were tied to.
        added: names of tensors that the base did not have.
        resumed: how many files an earlier, killed run had finished.
        bytes: size of the files of weights.
        seconds: wall time.
        checked: with `verify`, how many tensors were read back.
        error: with `verify`, the largest distance of a merged number from the exact one.
        relative_error: the same relative to the largest number of its sample.
        notes: what a user should know.
    """

    output: str
    files: int
    merged: int
    copied: int
    untied: tuple[str, ...]
    added: tuple[str, ...]
    resumed: int
    bytes: int
    seconds: float
    checked: int
    error: float | None
    relative_error: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """Everything that a merge will write, before it writes anything."""

    shards: ModelShards
    files: list[OutFile]
    index: bytes | None
    config: dict[str, Any] | None
    untied: tuple[str, ...]
    added: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def merge_checkpoint(
    base: StrPath,
    adapters: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    strict: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,  # noqa: ARG005
) -> CheckpointMerge:
    """Merge adapters into a safetensors checkpoint and write a new one, without building the model.

    Each weight is accumulated in fp32 (fp64 in fp64) and rounded once: the numbers are those of `merge_and_unload`, bit
    for bit, where the file stores a weight as the model does. A tile of one weight and one adapter's factors for it are in
    memory at a time; the rest is copied by the kernel. A variant that looks at the base weight (DoRA, KaSA) has that one
    weight in memory, in fp32.

    The output is written beside its place and appears by one rename. A run that was killed, or whose disk was full, is
    gone on with by the same call.

    Args:
        base: a folder with `model.safetensors`, or shards and their index; or a repository of the hub.
        adapters: a folder or a repository of the hub, or several; they add up.
        output: folder to write; it must not be there, or be empty.
        weights: a finite number for each adapter, which multiplies its scaling; default 1.
        dtype: of all floating-point tensors written, such as "bfloat16"; default each one's own.
        max_shard_size: bytes of a file of weights, such as "5GB"; default the base's files.
        verify: read a sample back and compare it with a computation in fp64.
        strict: make it an error if the config of an adapter names a weight of which its file has nothing.
        overwrite: replace the checkpoint in `output`; it is there until the new one is whole.
        progress: is called with (what, done, total).

    Returns:
        What was done.

    Raises:
        AdapterNotFoundError, AdapterFormatError: the base or an adapter is missing or damaged.
        ConfigError: an argument is not sound, or the output may not be written there.
        KeyMismatchError: an adapter's tensors do not fit the base; all of them are listed.
        AdapterStateError: two adapters replace the same weight.
        UnsupportedError: something that cannot be merged on disk; says what to do instead.
        NonFiniteError: a merged weight would hold NaN or infinity.
        OSError: the disk refused. After any of these there is no output, or the former one.
    """
    began = time.perf_counter()
    target = Path(output).expanduser()
    paths = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    numbers = _checked_weights(weights, len(paths))
    wanted = Layouting(_checked_dtype(dtype), parse_size(max_shard_size))
    folders = [resolve_adapter(path) for path in paths]
    refuse_twice(folders)
    check_target(target, overwrite=overwrite)
    shards = open_shards(resolve_model(base))
    check_outside(target, [shards.folder, *folders])
    parts = [open_parts(folder, number) for folder, number in zip(folders, numbers, strict=True)]
    job = _plan(shards, parts, wanted, strict=strict)
    fingerprint = _fingerprint(shards, parts, wanted, job)
    kept = "there is no output yet; the same call goes on from the files that were finished"
    with (
        naming(target, kept),
        made(target.parent),
        working_on(target, fingerprint, overwrite=overwrite) as work,
    ):
        _check_space(target, job, [work.folder / name for name in work.resumed])
        done = sum(file.size for file in job.files if work.is_done(file.name))
        with ShardReader(shards) as reader:
            told = _Told(progress, done, job.bytes)
            streamer = Streamer(shards, reader, WeightReader(shards, reader), told)
            for file in job.files:
                if not work.is_done(file.name):
                    work.write(file.name, partial(streamer.write, file))
        notes = [*job.notes, *_write_small(job, work.write_small)]
        checked = check_output(shards, work.folder, job.files, progress) if verify else None
        work.finish(target)
    counts = Counter(bool(tensor.segments) for file in job.files for tensor in file.tensors)
    return CheckpointMerge(
        output=str(target),
        files=len(job.files),
        merged=counts[True],
        copied=counts[False],
        untied=job.untied,
        added=job.added,
        resumed=len(work.resumed),
        bytes=job.bytes,
        seconds=time.perf_counter() - began,
        checked=0 if checked is None else checked.tensors,
        error=None if checked is None else checked.error,
        relative_error=None if checked is None else checked.relative,
        notes=tuple(notes),
    )


# ---- what is asked ----------------------------------------------------------------------------------------


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ConfigError("adapters: got none, wanted at least one")
    numbers = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(numbers) != count or not all(abs(number) < float("inf") for number in numbers):
        raise ConfigError(f"weights: got {numbers}, wanted a finite number for each of the {count} adapters")
    return numbers


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOATS:
        names = sorted(str(each).removeprefix("torch.") for each in FLOATS)
        raise ConfigError(f"dtype: got {dtype!r}, wanted one of {names}")
    return found


# ---- planning ---------------------------------------------------------------------------------------------


def _plan(shards: ModelShards, parts: Sequence[AdapterParts], wanted: Layouting, *, strict: bool) -> _Job:
    _refuse_quantised(shards)
    asked = _asked(parts)
    names = make_names(shards, asked)
    ties = find_ties(shards, names, asked)
    names = names.with_tied({tie.target.name: tie.target for tie in ties if not tie.is_stored})
    with ShardReader(shards) as reader:
        weights = WeightReader(shards, reader)
        gathering = Gathering(
            names, shards.config, lambda weight: weights.whole(weight, weight.dtype), _main_dtype(shards)
        )
        for each in parts:
            gathering.add(each, strict=strict)
    gathered = gathering.gathered
    settled = settle(ties, gathered.changes)
    parted = {target.name: (target, source.pieces[0].tensor) for target, source in settled.parted}
    check_apart({name: change for name, change in settled.changes.items() if name not in parted})
    new: dict[str, tuple[Weight, str]] = {weight.name: (weight, "") for weight in gathered.added} | parted
    files, index = lay_out(shards, settled.changes, new, wanted)
    notes = list(gathered.notes)
    if parted:
        notes.append(f"{', '.join(parted)}: tied no more; config.json says tie_word_embeddings=false")
    return _Job(
        shards,
        files,
        index,
        repaired_config(shards.config, parted=bool(settled.parted), dtype=wanted.dtype),
        tuple(parted),
        tuple(weight.name for weight in gathered.added),
        tuple(notes),
    )


def _refuse_quantised(shards: ModelShards) -> None:
    found = shards.config.get("quantization_config")
    if found:
        method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
        raise UnsupportedError(
            f"{shards.folder}: the checkpoint is quantised ({method}); merge into the one that it was quantised from, or load "
            "it and call merge_and_unload(dequantize=True)"
        )


def _asked(parts: Sequence[AdapterParts]) -> list[str]:
    """The names of the weights that adapters may change, as far as their own names tell."""
    found: dict[str, None] = {}
    for each in parts:
        for site in each.sites.values():
            owners = [entry.rpartition(".") for entry in each.config.target_parameters or ()]
            bare = [
                f"{site.module}.{name}"
                for path, _, name in owners
                if not path or f".{site.module}".endswith(f".{path}")
            ]
            found.update(dict.fromkeys(bare or [f"{site.module}.weight"]))
        found.update({f"{module}.weight": None for module in each.rows})
        found.update(dict.fromkeys(each.owned))
    return list(found)


def _main_dtype(shards: ModelShards) -> torch.dtype | None:
    """The dtype of most of the base's weights."""
    counts = Counter(place.info.dtype for place in shards.places.values() if place.info.dtype in FLOATS)
    return counts.most_common(1)[0][0] if counts else None


def _fingerprint(shards: ModelShards, parts: Sequence[AdapterParts], wanted: Layouting, job: _Job) -> str:
    """A hash of everything that the output follows from."""
    content = {
        "base": [
            os.path.realpath(shards.folder),
            {file: list(stamp) for file, stamp in shards.stamps.items()},
        ],
        "adapters": [
            [os.path.realpath(each.where), _stamp(each.file.weights_path), each.config.to_dict(), each.weight]
            for each in parts
        ],
        "files": {file.name: [file.size, hashlib.sha256(file.header).hexdigest()] for file in job.files},
        "options": [str(wanted.dtype), wanted.max_shard_size],
        "torch": str(torch.__version__),
    }
    return hashlib.sha256(strict_json.dumps(content)).hexdigest()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


# ---- writing ----------------------------------------------------------------------------------------------


class _Told:
    """Counts bytes and tells of megabytes, so that a bar has numbers that a person reads."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def __call__(self, count: int) -> None:
        self._done += count
        total = -(-self._total // _MEGABYTE)
        self._progress("merging (MB)", total if self._done == self._total else self._done // _MEGABYTE, total)


def _check_space(target: Path, job: _Job, finished: Sequence[Path]) -> None:
    needed = job.bytes - sum(path.stat().st_size for path in finished)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no room: {needed:,} bytes are needed and {free:,} are free", str(target.parent)
        )


def _write_small(job: _Job, write: Callable[[str, bytes], None]) -> list[str]:
    """Write what goes along; gives notes of what does not."""
    folder = job.shards.folder
    carried, left = small_files(folder)
    for path in carried:
        if path == CONFIG and job.config is not None:
            write(path, _as_json(job.config))
        else:
            write(path, read_carried(folder, path))
    if job.index is not None:
        write(INDEX, job.index)
    return [f"{path}: larger than what goes along, left out" for path in left]


def _as_json(config: Mapping[str, Any]) -> bytes:
    return strict_json.dumps(dict(config))
