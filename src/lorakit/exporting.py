"""Adapters that take something off the base, as plain LoRA for the untouched base.

Some initialisers begin from a part of the base weight, and the adapter then adds `s B A - s0 B0 A0`, where B0 A0 is where
it began (`lorakit.layers.varied`). A file holds that as one pair of factors: of the same rank where one of the two never
moved, else of twice the rank. It is exact, and needs no scheme and no copy of the beginning to be loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import to_file_key
from lorakit.checkpoint.reading import open_adapter
from lorakit.errors import AdapterFormatError, bullet_list
from lorakit.layers.scales import own_scaling
from lorakit.layers.varied import offset_of
from lorakit.specs import scaling_of
from lorakit.types import Factors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layers import LoraLayer
    from lorakit.padding import Entry
    from lorakit.surgery import AdapterRegistry

    Offsets = Mapping[str, tuple[Factors, ...]]
    """What is taken off each weight, by path and block."""


def offsets_of(registry: AdapterRegistry, name: str) -> Offsets:
    """What an adapter takes off the base where its file does not say so; empty for an adapter that takes nothing."""
    found = {}
    for path, layer in registry.layers.items():
        held = offset_of(layer, name) if name in layer.r and name not in layer.variants else None
        if held is not None:
            found[path] = layer.layout.split(held.A, held.B, -float(held.scaling))
    return found


def offsets_in_file(
    registry: AdapterRegistry, name: str, entries: Sequence[Entry], folder: str | os.PathLike[str]
) -> Offsets:
    """The adapter that a folder holds, as what another of the same shapes takes off the base.

    Raises:
        AdapterNotFoundError, AdapterFormatError: it cannot be read, or does not have these factors.
    """
    spots = {
        to_file_key(entry.file_name): (entry.spot, entry.shape) for entry in entries if entry.spot is not None
    }
    tensors = open_adapter(folder).load()
    wrong = [
        f"{key}: found {tuple(tensors[key].shape) if key in tensors else 'nothing'}, expected {shape}"
        for key, (_, shape) in spots.items()
        if key not in tensors or tuple(tensors[key].shape) != shape
    ]
    if wrong:
        raise AdapterFormatError(bullet_list(f"{folder}: is not how adapter {name!r} began", wrong))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, (spot, _) in spots.items():
        parts.setdefault(spot.path, {})[spot.factor] = tensors[key]
    return {
        path: registry.layers[path].layout.split(own["A"], own["B"], own_scaling(registry.layers[path], name))
        for path, own in parts.items()
    }


@torch.no_grad()
def as_plain(
    registry: AdapterRegistry,
    name: str,
    entries: Sequence[Entry],
    config: LoraConfig,
    offsets: Offsets,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The tensors of an adapter with what it takes off the base in them, by file name, and the config for them."""
    tensors = {entry.file_name: entry.in_file() for entry in entries}
    if not offsets:
        return tensors, config
    pairs = {path: _blocks(registry.layers[path], name) for path in offsets}
    moved = {path: _moved(pairs[path], offsets[path]) for path in offsets}
    doubled = not all(moved.values())
    written: dict[str, dict[str, Tensor]] = {}
    for path, offset in offsets.items():
        zipped = zip(pairs[path], offset, strict=True)
        change = moved[path]
        blocks = [_stacked(own, off) if doubled else _difference(own, off, change) for own, off in zipped]
        A, B, _ = registry.layers[path].layout.join(blocks)
        written[path] = {"A": A, "B": B}
    for entry in entries:
        if entry.spot is not None and entry.spot.path in written:
            tensors[entry.file_name] = written[entry.spot.path][entry.spot.factor]
    plain = replace(config, init_lora_weights=True, corda_config=None, lora_ga_config=None)
    return tensors, _with_twice_the_rank(plain) if doubled else plain


def _blocks(layer: LoraLayer, name: str) -> tuple[Factors, ...]:
    """The factors as they are stored, with the scaling that the config says."""
    A, B, _ = layer.stored(name)
    return layer.layout.split(A.detach(), B.detach(), own_scaling(layer, name))


def _moved(own: Sequence[Factors], offset: Sequence[Factors]) -> str:
    """The one factor that is no longer what it was; empty if it may be both, or if the difference would be rounded."""
    zipped = list(zip(own, offset, strict=True))
    if any(a.A.dtype in {torch.float16, torch.bfloat16} or a.scaling != b.scaling for a, b in zipped):
        return ""
    if all(torch.equal(a.A, b.A) for a, b in zipped):
        return "B"
    return "A" if all(torch.equal(a.B, b.B) for a, b in zipped) else ""


def _difference(own: Factors, offset: Factors, moved: str) -> Factors:
    if moved == "B":
        return Factors(own.A, own.B - offset.B, own.scaling)
    return Factors(own.A - offset.A, own.B, own.scaling)


def _stacked(own: Factors, offset: Factors) -> Factors:
    ratio = offset.scaling / own.scaling
    A = torch.cat([own.A, offset.A.to(own.A)])
    return Factors(A, torch.cat([own.B, -ratio * offset.B.to(own.B)], dim=1), own.scaling)


def _with_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The same scalings at twice the ranks."""
    factor = 1 / scaling_of(2, 1.0, rslora=config.use_rslora)
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    )
