"""PEFT's format, which is lorakit's own: a folder with `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.checkpoint.converting.neutral import Adapter, Part, Piece, alpha_of, config_of
from lorakit.checkpoint.files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, present
from lorakit.checkpoint.keys import from_file_key, to_file_key
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.sites import find_sites, sort_tensors
from lorakit.checkpoint.storing import refuse_existing
from lorakit.checkpoint.writing import write_adapter
from lorakit.config import REQUIRED_KEYS, LoraConfig, Matcher, check_supported
from lorakit.errors import AdapterFormatError, UnsupportedError, bullet_list
from lorakit.specs import FILE_NAMES
from lorakit.variants import variant_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.neutral import Context
    from lorakit.checkpoint.sites import Site

_MAGNITUDE = ".lora_magnitude_vector"
_KEPT_VARIANTS = ("use_dora", "alora_invocation_tokens")
_ELSEWHERE = {
    "modules_to_save": "whole modules",
    "trainable_token_indices": "token rows",
    "target_parameters": "factors of bare parameters",
    "layer_replication": "a base of repeated layers",
}


def recognises(path: Path) -> bool:
    """Whether a path is a folder of this format."""
    return any(present(path, name) for name in (WEIGHTS_NAME, PICKLE_NAME))


def read(path: Path, _context: Context) -> Adapter:
    """Read an adapter folder.

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError, NonFiniteError: it cannot be read.
        UnsupportedError: it holds more than factors.
    """
    file = open_adapter(path)
    config = LoraConfig.from_dict(file.config, where=str(path / CONFIG_NAME), required=REQUIRED_KEYS)
    tensors = {from_file_key(key): tensor for key, tensor in file.load().items()}
    return Adapter(str(path), (part_of("", config, tensors, str(path)),))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write an adapter folder.

    Raises:
        ConfigError: the folder holds an adapter and may not be overwritten.
        OSError: the disk refused.
    """
    refuse_existing(target, overwrite=context.overwrite)
    (part,) = adapter.parts
    config = config_of(part.pieces, part.config)
    tensors = {to_file_key(name): tensor for name, tensor in named_tensors(part.pieces)}
    write_adapter(target, config.to_dict(), tensors)


def part_of(component: str, config: LoraConfig, tensors: Mapping[str, Tensor], where: str) -> Part:
    """The part that a config and tensors of PEFT's names, without any prefix, make up.

    Raises:
        AdapterFormatError: the tensors are not those that the config speaks of.
        UnsupportedError: the config asks for more than factors.
    """
    _refuse_settings(config, where)
    found = sort_tensors(tensors)
    magnitudes = {name: tensor for name, tensor in found.rest.items() if name.endswith(_MAGNITUDE)}
    strange = [*(f"{name}: token rows" for name in found.rows), *(found.rest.keys() - magnitudes.keys())]
    if strange:
        raise UnsupportedError(
            bullet_list(f"{where}: only factors can be converted; it also holds", sorted(strange)[:20])
        )
    sites, problems = find_sites(found, config)
    matcher = Matcher(replace(config, target_modules=None))
    pieces = {}
    for path, site in sites.items():
        magnitude = magnitudes.pop(path + _MAGNITUDE, None)
        problems += [f"{path}: {line}" for line in _problems(site, magnitude, dora=config.use_dora)]
        alpha = (
            alpha_of(site.blocks[0].scaling, site.blocks[0].rank)
            if config.use_rslora
            else matcher.alpha(path)
        )
        pieces[path] = Piece(site.blocks[0], float(alpha), site.layout, site.is_embedding, magnitude)
    problems += [f"{name}: a magnitude without factors" for name in magnitudes]
    if problems:
        raise AdapterFormatError(bullet_list(f"{where}: its factors cannot be converted", problems))
    return Part(component, config, pieces)


def named_tensors(pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of pieces under PEFT's names, without any prefix."""
    for path, piece in pieces.items():
        names = FILE_NAMES["embedding" if piece.is_embedding else ""]
        A, B, bias = piece.layout.join([piece.factors])
        yield f"{path}.{names['A']}", A
        yield f"{path}.{names['B']}", B
        if bias is not None:
            yield f"{path}.{names['bias']}", bias
        if piece.magnitude is not None:
            yield path + _MAGNITUDE, piece.magnitude


def _problems(site: Site, magnitude: Tensor | None, *, dora: bool) -> Iterator[str]:
    """Why the factors of a module have no neutral form."""
    if site.layout.blocks != 1:
        yield f"a grouped convolution ({site.layout.groups} groups), which other formats have no place for"
    if dora and magnitude is None:
        yield "use_dora=True, and no lora_magnitude_vector"
    if magnitude is not None and not dora:
        yield "a lora_magnitude_vector, and the config does not say use_dora=True"
    if magnitude is not None and (magnitude.ndim != 1 or magnitude.shape[0] != site.layout.out):
        yield f"a magnitude of {tuple(magnitude.shape)}; only that of a linear layer, ({site.layout.out},), is converted"


def _refuse_settings(config: LoraConfig, where: str) -> None:
    check_supported(config, loading=True)
    found = [
        f"{name}: {what} cannot be converted" for name, what in _ELSEWHERE.items() if getattr(config, name)
    ]
    if config.bias != "none":
        found.append(f"bias={config.bias!r}: trained biases of the base cannot be converted")
    variant = variant_of(config)
    if variant is not None and variant.field not in _KEPT_VARIANTS:
        found.append(f"{variant.field}: {variant.name} is more than factors")
    if found:
        hint = "Merge it into its base (lorakit merge) and convert or extract from that."
        raise UnsupportedError(
            bullet_list(f"{where}: the adapter is more than other formats hold", found, hint)
        )
