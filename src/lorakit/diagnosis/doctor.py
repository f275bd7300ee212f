"""`doctor`: everything that is wrong or odd about an adapter, as a list."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.files import PICKLE_NAME, WEIGHTS_NAME, present
from lorakit.checkpoint.hub import resolve_adapter
from lorakit.checkpoint.reading import open_adapter
from lorakit.config import REQUIRED_KEYS, LoraConfig, check_supported
from lorakit.diagnosis.contents import number_findings, ranks_of, shape_findings, sorted_shapes
from lorakit.diagnosis.finding import Finding
from lorakit.diagnosis.fit import fit_findings
from lorakit.diagnosis.folder import folder_findings, unreadable
from lorakit.diagnosis.foreign import key_findings
from lorakit.diagnosis.serving import serving_findings
from lorakit.errors import AdapterError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from lorakit.checkpoint.reading import AdapterFile

_ORDER = ("error", "warning", "note")
_SAVE_AGAIN = (
    "Save it again as plain LoRA where it was trained: lorakit does so by itself, PEFT with save_pretrained(..., "
    "path_initial_model_for_weight_conversion=...)."
)
_TAKE_OUT = (
    " With the file alone: load it with PEFT onto the original base, where the scheme changes the weights once more as it did "
    "then; save what merge_and_unload() gives; take the adapter out of that: lorakit extract BASE MERGED -o ADAPTER --rank {}."
)
_REPEATS = frozenset({"pissa", "olora"})
"""Schemes that make the same of a weight each time, and need nothing but the weight."""
_STOPS = frozenset({"git-lfs-pointer", "in-subfolder", "no-weights", "foreign-format", "unreadable"})


_UNFIT = frozenset({"factors", "zero-size"})
"""Findings with which an adapter fits no base, so that nothing can be said of the one given."""


def doctor(adapter: str | os.PathLike[str], base: Any = None) -> list[Finding]:
    """Find out whether an adapter would load, into what, and what is odd about it.

    Looks at the files (git-lfs pointers, pickles, other formats, stale configs), the config, keys and shapes, and every
    number (digest, NaN, zeros); with a base, whether the adapter fits it. Nothing is changed, and no base weight is read.

    Args:
        adapter: a folder, a single file, or a repository of the hub.
        base: a transformers config, a model that has one, a folder with `config.json`, or a repository; None looks at the
            adapter alone.

    Returns:
        The findings, errors first. Without an error, the adapter loads (onto that base).

    Raises:
        AdapterNotFoundError: there is no such adapter or base.
        AdapterFormatError: the base's config cannot be read.
        UnsupportedError: a base is given, and transformers is not installed.
    """
    folder = resolve_adapter(adapter, allow_pickle_bin=True)
    found = [*_examine(folder, base)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.level))


def _examine(folder: Path, base: Any) -> Iterator[Finding]:
    outside = list(folder_findings(folder))
    yield from outside
    if any(finding.check in _STOPS for finding in outside):
        return
    path = folder / (WEIGHTS_NAME if present(folder, WEIGHTS_NAME) else PICKLE_NAME)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            file = open_adapter(folder, allow_pickle_bin=True)
        except AdapterError as error:
            yield unreadable(error, path)
            return
    yield from (
        Finding("warning", "two-configs", str(file.config_path), str(entry.message)) for entry in told
    )
    names = list(key_findings(list(file.tensors), str(file.weights_path)))
    yield from names
    config, problems = _config(file)
    yield from problems
    if config is None:
        return
    sound = not any(finding.level == "error" for finding in names)
    shapes = list(shape_findings(file, config)) if sound else []
    yield from shapes
    yield from number_findings(file, config)
    yield from serving_findings(config, ranks_of(sorted_shapes(file)))
    if base is not None and sound and not any(finding.check in _UNFIT for finding in shapes):
        yield from fit_findings(file, config, base)


def _config(file: AdapterFile) -> tuple[LoraConfig | None, list[Finding]]:
    where = str(file.config_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            config = LoraConfig.from_dict(file.config, where=where, required=REQUIRED_KEYS)
        except ConfigError as error:
            lines = str(error).split("\n  - ")[1:] or [str(error).removeprefix(f"{where}: ")]
            fix = "Correct the field, or restore the config that was saved with the weights."
            return None, [Finding("error", "config", where, line, fix) for line in lines]
    found = [
        Finding("note", "unknown-fields", where, str(entry.message).removeprefix(f"{where}: "))
        for entry in told
    ]
    try:
        check_supported(config, loading=True)
    except UnsupportedError as error:
        found += [_unsupported(line, where, config) for line in str(error).split("\n  - ")[1:]]
    if not config.base_model_name_or_path:
        found.append(
            Finding(
                "note",
                "no-base-name",
                where,
                "base_model_name_or_path is empty: the file does not say what it is for",
            )
        )
    return config, found


def _unsupported(line: str, where: str, config: LoraConfig) -> Finding:
    what, _, rest = line.partition("; ")
    if line.startswith("init_lora_weights"):
        way = _TAKE_OUT.format(2 * config.r) * (config.init_lora_weights in _REPEATS)
        return Finding("error", "changed-base", where, what, _SAVE_AGAIN + way)
    return Finding(
        "error",
        "unsupported",
        where,
        what,
        rest[:1].upper() + rest[1:] if rest else "lorakit cannot load it.",
    )
