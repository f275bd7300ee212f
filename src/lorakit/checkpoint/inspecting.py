"""`lorakit.inspect_adapter`: what is in an adapter's files, and in what state.

Nothing that can be read is refused: what is odd is told.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.adapter_report import AdapterReport, InspectedKind, InspectedLayer, InspectedTensor
from lorakit.checkpoint.digest import Digest, digest_order
from lorakit.checkpoint.files import MAX_CONFIG
from lorakit.checkpoint.hub import resolve_adapter
from lorakit.checkpoint.keys import from_file_key, natural_key
from lorakit.checkpoint.layout import CONFIG_FIELD, DIGEST_FIELD
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.sites import ROWS, find_sites, sort_tensors
from lorakit.checkpoint.storing import silent
from lorakit.config import REQUIRED_KEYS, LoraConfig, check_supported, strict_json
from lorakit.errors import UnsupportedError
from lorakit.ops.low_rank import joint_spectrum, low_rank_svd, rank_for
from lorakit.specs import FACTOR_OF, FILE_NAMES
from lorakit.variants import variant_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lorakit.checkpoint.reading import AdapterFile
    from lorakit.checkpoint.sites import Site, Sorted
    from lorakit.checkpoint.storing import Progress
    from lorakit.variants import Variant

MOST = 0.99
"""The share of the energy that `InspectedLayer.energy_rank` holds."""
_MOST_RANKS = 0.5  # of all; where fewer hold the energy, it is worth saying


def inspect_adapter(path: str | os.PathLike[str], *, progress: Progress = silent) -> AdapterReport:
    """Look into an adapter, without any model.

    Factors are decomposed in float64; the dense delta is never built. NaN, infinity, a digest that does not fit and factors
    that make no sense are reported, not refused.

    Args:
        path: a folder, or a repository of the hub.
        progress: is called with (what, done, total).

    Raises:
        AdapterNotFoundError: the folder or a file is not there.
        AdapterFormatError: a file is no adapter of this format, or so damaged that its tensors cannot be told.
        ConfigError: the config has wrong values; lists them.
    """
    file = open_adapter(resolve_adapter(path))
    config = LoraConfig.from_dict(file.config, where=str(file.folder), required=REQUIRED_KEYS)
    loaded = file.load(check_finite=False, check_digest=False)
    tensors = {from_file_key(key): tensor for key, tensor in loaded.items()}
    found = sort_tensors(tensors)
    sites, unread = find_sites(found, config)
    variant, refused = _variant(config)
    kinds = {name: _kind(name, config, variant) for name in tensors}
    layers = _layers(found, sites, progress)
    others = tuple(_other(name, kinds[name], tensors[name]) for name in _no_factors(found, sites))
    bad = [layer.path for layer in layers if layer.nan or layer.inf]
    bad += [tensor.name for tensor in others if tensor.nan or tensor.inf]
    return AdapterReport(
        path=str(file.folder),
        base=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        peft_version=config.peft_version,
        variant=None if variant is None else variant.name,
        config=config.to_dict(),
        metadata={key: text for key, text in file.metadata.items() if key != CONFIG_FIELD},
        files={
            entry.name: entry.stat().st_size for entry in sorted(file.folder.iterdir()) if entry.is_file()
        },
        digest=_digest_state(file, loaded),
        config_state=_config_state(file),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=_by_dtype(tensors),
        kinds=_by_kind(tensors, kinds),
        norm=math.hypot(*(layer.norm or 0.0 for layer in layers)),
        layers=layers,
        others=others,
        dead=tuple(layer.path for layer in layers if layer.dead),
        non_finite=tuple(bad),
        problems=(*refused, *unread, *_lacking(tensors)),
        notes=tuple(_notes(variant, layers)),
    )


# ---- the tensors --------------------------------------------------------------------------------------


def _layers(found: Sorted, sites: Mapping[str, Site], progress: Progress) -> tuple[InspectedLayer, ...]:
    layers = []
    for done, path in enumerate(sorted(sites, key=natural_key)):
        progress("decomposing", done, len(sites))
        layers.append(_layer(path, sites[path], found.factors[path]))
    progress("decomposing", len(layers), len(layers))
    return tuple(layers)


def _layer(path: str, site: Site, parts: Mapping[str, Tensor]) -> InspectedLayer:
    nan, inf = (sum(counts) for counts in zip(*map(_non_finite, parts.values()), strict=True))
    spectrum = None if nan or inf else _spectrum(site)
    return InspectedLayer(
        path=path,
        kind=_layer_kind(site),
        shape=site.layout.shape,
        blocks=site.layout.blocks,
        rank=site.blocks[0].rank * site.layout.groups,
        scaling=site.blocks[0].scaling,
        dtype=_name(parts["A"].dtype),
        parameters=sum(tensor.numel() for tensor in parts.values()),
        norm=None if spectrum is None else float(torch.linalg.vector_norm(spectrum)),
        effective_rank=None if spectrum is None else _effective_rank(spectrum),
        energy_rank=None if spectrum is None else _energy_rank(spectrum),
        spectrum=() if spectrum is None else tuple(spectrum.tolist()),
        dead=spectrum is not None and not bool(spectrum.any()),
        nan=nan,
        inf=inf,
    )


def _spectrum(site: Site) -> Tensor:
    return joint_spectrum([low_rank_svd([block.to(torch.float64)]) for block in site.blocks])


def _effective_rank(spectrum: Tensor) -> float:
    shares = spectrum[spectrum > 0.0] / spectrum.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if shares.numel() else 0.0


def _energy_rank(spectrum: Tensor) -> int:
    energy = float(spectrum.square().sum())
    return rank_for(spectrum, MOST, energy) if energy else 0


def _layer_kind(site: Site) -> str:
    if site.is_embedding:
        return "embedding"
    if site.layout.experts:
        return "experts"
    if len(site.layout.row) == 1:
        return "linear"
    return "convolution" if site.layout.groups == 1 else "grouped convolution"


def _no_factors(found: Sorted, sites: Mapping[str, Site]) -> list[str]:
    """Names of tensors that no layer tells of: all but factors, and factors that cannot be read."""
    names = [module + ROWS for module in found.rows] + list(found.rest)
    for path, parts in found.factors.items():
        if path not in sites:
            own = FILE_NAMES["embedding" if path in found.embeddings else ""]
            names += [f"{path}.{own[part]}" for part in parts]
    return names


def _other(name: str, kind: str, tensor: Tensor) -> InspectedTensor:
    nan, inf = _non_finite(tensor)
    norm = None if nan or inf else float(torch.linalg.vector_norm(tensor.double()))
    return InspectedTensor(name, kind, tuple(tensor.shape), _name(tensor.dtype), norm, nan, inf)


def _non_finite(tensor: Tensor) -> tuple[int, int]:
    """How many NaN and how many infinities."""
    return int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())


def _kind(name: str, config: LoraConfig, variant: Variant | None) -> str:
    factor = next((part for known, part in FACTOR_OF.items() if name.endswith(f".{known}")), None)
    if factor is not None:
        return "biases of B" if factor == "bias" else "factors"
    if name.endswith(ROWS):
        return "token rows"
    if variant is not None and any(name.endswith(f".{part.in_file}") for part in variant.parts.values()):
        return variant.name
    module, _, attribute = name.rpartition(".")
    if module.endswith(".base_layer") and attribute == "weight":
        return "weights of the base"
    whole = any(f".{entry}." in f".{module}." for entry in config.modules_to_save or ())
    return "biases" if config.bias != "none" and attribute == "bias" and not whole else "modules saved whole"


def _by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[_name(tensor.dtype)] += tensor.numel()
    return dict(counts)


def _by_kind(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> tuple[InspectedKind, ...]:
    found = []
    for kind in dict.fromkeys(kinds.values()):
        own = [tensor for name, tensor in tensors.items() if kinds[name] == kind]
        numbers, size = sum(tensor.numel() for tensor in own), sum(tensor.nbytes for tensor in own)
        found.append(InspectedKind(kind, len(own), numbers, size))
    return tuple(found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the files ----------------------------------------------------------------------------------------


def _digest_state(file: AdapterFile, loaded: Mapping[str, Tensor]) -> str:
    if DIGEST_FIELD not in file.metadata:
        return "none"
    digest = Digest(file.metadata.get(CONFIG_FIELD, "").encode("utf-8", "surrogatepass"))
    for name in digest_order(file.tensors):
        digest.add(name, loaded[name])
    return "fits" if digest.text() == file.metadata[DIGEST_FIELD] else "does not fit"


def _config_state(file: AdapterFile) -> str:
    copy = file.metadata.get(CONFIG_FIELD)
    if copy is None:
        return "no copy in the weights"
    if file.repaired:
        return "the copy in the weights"
    kept = strict_json.loads(
        copy.encode("utf-8", "surrogatepass"), where=str(file.weights_path), max_bytes=MAX_CONFIG
    )
    edited = sorted(key for key in {*kept, *file.config} if kept.get(key) != file.config.get(key))
    return f"edited: {', '.join(edited)}" if edited else "as saved"


# ---- what is odd --------------------------------------------------------------------------------------


def _variant(config: LoraConfig) -> tuple[Variant | None, list[str]]:
    """The variant, and why the adapter cannot be loaded, as far as the config goes."""
    problems = []
    variant = None
    try:
        check_supported(config, loading=True)
    except UnsupportedError as error:
        problems.append(str(error))
    try:
        variant = variant_of(config)
    except UnsupportedError as error:
        problems.append(str(error))
    return variant, problems


def _lacking(tensors: Mapping[str, Tensor]) -> list[str]:
    if not tensors:
        return ["the file has no tensors"]
    return [
        f"{name}: has no numbers ({tuple(tensor.shape)}); a save of parameters that were sharded leaves such tensors"
        for name, tensor in tensors.items()
        if not tensor.numel()
    ]


def _notes(variant: Variant | None, layers: Sequence[InspectedLayer]) -> Iterator[str]:
    if variant is not None:
        yield f"{variant.name}: norms and spectra are those of scaling * B A; what it does besides is not in them"
    alive = [layer for layer in layers if layer.energy_rank]
    ranks, needed = sum(layer.rank for layer in alive), sum(layer.energy_rank or 0 for layer in alive)
    if alive and needed <= _MOST_RANKS * ranks:
        yield (
            f"{needed:,} of {ranks:,} ranks hold 99 % of the energy: lorakit resize --energy 0.99 makes the adapter smaller"
        )
