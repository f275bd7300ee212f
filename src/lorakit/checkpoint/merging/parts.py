"""What an adapter folder holds, sorted by what it does to a base: factors, token rows, and tensors of the base's own.

Names are those inside the model. Nothing is read but the config and the header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.keys import PREFIX, from_file_key
from lorakit.checkpoint.reading import AdapterFile, open_adapter
from lorakit.config import REQUIRED_KEYS, LoraConfig, Matcher, check_supported, ends_in
from lorakit.errors import AdapterFormatError, UnsupportedError
from lorakit.specs import FACTOR_OF, TOKEN_ROWS, adapter_dtype, scaling_of
from lorakit.variants import Held, variant_of

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor

    from lorakit.checkpoint.header import TensorInfo
    from lorakit.variants import Variant

_BASE = ".base_layer"
_INNER = re.compile(r"(?:\.base_layer)+(?=\.)")


class Site(NamedTuple):
    """The tensors of an adapter on one module or bare parameter.

    Attributes:
        path: in the file; with `base_layer` where wrappers are nested.
        module: the module's own path in the model.
        depth: how many wrappers of the module's other parameters are around this one.
        keys: file keys by part: "A", "B", "bias" and those of the variant.
        is_embedding: whether the factors are named as those of an embedding.
    """

    path: str
    module: str
    depth: int
    keys: Mapping[str, str]
    is_embedding: bool

    @property
    def named_as(self) -> str:
        """The module that a config names for it: parts of an attention module go by that one."""
        return self.path.partition(_BASE)[0]


@dataclass(frozen=True)
class AdapterParts:
    """One adapter of a merge.

    Attributes:
        file: its folder, opened.
        config: its config.
        weight: what its scalings are multiplied by.
        variant: what it is more than plain LoRA, or None.
        matcher: of its config.
        sites: its factors by the path in the file.
        rows: its token rows: file keys by module.
        owned: file keys of its other tensors, by the name that the base's own tensor has.
    """

    file: AdapterFile
    config: LoraConfig
    weight: float
    variant: Variant | None
    matcher: Matcher
    sites: Mapping[str, Site]
    rows: Mapping[str, str]
    owned: Mapping[str, str]

    @property
    def where(self) -> str:
        """Its folder, for messages."""
        return str(self.file.folder)

    def info(self, key: str) -> TensorInfo:
        """What the header says of a tensor."""
        return self.file.tensors[key]

    def read(self, key: str) -> Tensor:
        """One tensor, finite, in the dtype of the file."""
        return self.file.load([key], check_digest=False)[key]

    def rank(self, name: str) -> int:
        """The rank on a module or parameter."""
        return self.matcher.rank(name)

    def scaling(self, name: str) -> float:
        """The scaling on a module or parameter, times the weight of the adapter."""
        own = scaling_of(self.rank(name), self.matcher.alpha(name), rslora=self.config.use_rslora)
        return self.weight * own

    def held(self, site: Site, named_as: str, base: torch.dtype, *, twice: bool = False) -> Held:
        """The tensors of a site, in the dtype that an adapter in memory has on such a base.

        Args:
            site: of this adapter.
            named_as: what the config calls it.
            base: dtype of the base weight.
            twice: in fp64 instead, to check against.
        """
        dtype = torch.float64 if twice else adapter_dtype(base, widen=True)
        keys = list(site.keys.values())
        loaded = self.file.load(keys, check_digest=False)
        tensors = {part: loaded[key].to(dtype) for part, key in site.keys.items()}
        A, B, bias = tensors.pop("A"), tensors.pop("B"), tensors.pop("bias", None)
        return Held(A, B, bias, self.scaling(named_as), tensors)

    def tokens(self, module: str) -> list[int]:
        """Which rows of a module's weight the adapter replaces, in the order of its own.

        Raises:
            AdapterFormatError: the config does not say as many as there are rows, or says one twice.
        """
        wanted = self.config.trainable_token_indices
        if isinstance(wanted, dict):
            wanted = next((value for name, value in wanted.items() if ends_in(module, name)), None)
        count = self.info(self.rows[module]).shape[0]
        if wanted is None or len(wanted) != count or len(set(wanted)) != count:
            named = 0 if wanted is None else len(set(wanted))
            raise AdapterFormatError(
                f"{self.where}: {count} token rows of {module}, and the config names {named} different tokens"
            )
        return list(wanted)


def open_parts(folder: str | os.PathLike[str], weight: float) -> AdapterParts:
    """Open an adapter folder and check its digest.

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError: it cannot be read.
        UnsupportedError: its config asks for what lorakit cannot do, or cannot be merged into a checkpoint.
    """
    file = open_adapter(folder)
    where = str(file.folder)
    config = LoraConfig.from_dict(file.config, where=where, required=REQUIRED_KEYS)
    check_supported(config, loading=True)
    variant = variant_of(config)
    if variant is not None and not variant.merges:
        raise UnsupportedError(
            f"{where}: {variant.name} does what no weight does, so it cannot be merged; keep it apart"
        )
    if config.layer_replication:
        raise UnsupportedError(
            f"{where}: layer_replication makes a deeper model out of the base's layers, which a checkpoint of the base "
            "has no place for; merge it in memory (merge_and_unload) and save that model"
        )
    file.load([])  # compares the digest, and keeps nothing
    matcher = Matcher(
        replace(config, target_modules=None) if config.target_modules == "all-linear" else config
    )
    sites, rows, owned = _sorted(file, variant)
    return AdapterParts(file, config, weight, variant, matcher, sites, rows, owned)


def _sorted(
    file: AdapterFile, variant: Variant | None
) -> tuple[dict[str, Site], dict[str, str], dict[str, str]]:
    parts = dict(FACTOR_OF)
    if variant is not None:
        parts |= {place.in_file: part for part, place in variant.parts.items()}
    prefixed = any(key.startswith(PREFIX) for key in file.tensors)
    found: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    rows: dict[str, str] = {}
    owned: dict[str, str] = {}
    for key in file.tensors:
        # PEFT calls an embedding with token rows the base of those
        name = (from_file_key(key) if prefixed else key).replace(".token_adapter.base_layer.", f"{_BASE}.")
        suffix = next((end for end in (*parts, TOKEN_ROWS) if name.endswith(f".{end}")), None)
        if suffix is None:
            own = _INNER.sub("", name)
            if own in owned:
                raise AdapterFormatError(
                    f"{file.weights_path}: {owned[own]!r} and {key!r} are one tensor of the base"
                )
            owned[own] = key
        elif suffix == TOKEN_ROWS:
            rows[name.removesuffix(f".{suffix}").replace(_BASE, "")] = key
        else:
            path = name.removesuffix(f".{suffix}")
            found.setdefault(path, {})[parts[suffix]] = key
            embeddings |= {path} if suffix.startswith("lora_embedding") else set()
    sites = {path: _site(path, keys, is_embedding=path in embeddings) for path, keys in found.items()}
    return sites, rows, owned


def _site(path: str, keys: Mapping[str, str], *, is_embedding: bool) -> Site:
    outer = path
    while outer.endswith(_BASE):
        outer = outer.removesuffix(_BASE)
    depth = (len(path) - len(outer)) // len(_BASE)
    return Site(path, _INNER.sub("", outer), depth, keys, is_embedding)
