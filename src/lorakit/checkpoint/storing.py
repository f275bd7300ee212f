"""Factors in blocks as the tensors of an adapter file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, present
from lorakit.checkpoint.sites import owner_of
from lorakit.errors import ConfigError, UnsupportedError
from lorakit.layouts import filled
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.sites import Site, Source

    Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody how far the work is: the progress of who asks for none."""


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds an adapter, unless it may be replaced.

    Raises:
        ConfigError: it holds one.
    """
    if not overwrite and any(present(folder, name) for name in (CONFIG_NAME, WEIGHTS_NAME)):
        raise ConfigError(
            f"{folder}: an adapter is there already; choose another folder, or pass overwrite=True (--overwrite)"
        )


def refuse_twice(folders: Sequence[str | Path]) -> None:
    """Refuse a folder that is given more than once, though its adapter can only be meant once.

    Raises:
        ConfigError: it is.
    """
    seen: dict[str, str | Path] = {}
    for folder in folders:
        if seen.setdefault(os.path.realpath(folder), folder) is not folder:
            raise ConfigError(
                f"{folder}: is given twice; give it once, and a weight (--weight 2) if it is to count double"
            )


def module_pattern(path: str) -> str:
    """The key of `rank_pattern` and `alpha_pattern` that means one module alone."""
    return "^" + path.replace(".", r"\.")


def stored_sites(
    sites: Mapping[str, Site], ranks: Mapping[str, int], tied: Mapping[str, str], *, biased: bool
) -> dict[str, Tensor]:
    """The tensors of factors under their names inside the model.

    Args:
        sites: by path; the scalings of their blocks are not written: the config has them.
        ranks: what the config says of the module at each path; lesser factors are filled with zeros.
        tied: heads whose factors are those of an embedding, transposed; with that embedding.
        biased: whether a B has a bias: those without one get zeros.

    Raises:
        UnsupportedError: there are biases of B, and a weight has no place for one.
    """
    tensors: dict[str, Tensor] = {}
    for path, site in sites.items():
        if path not in tied:
            tensors.update(_stored(path, site, ranks[owner_of(path)], biased=biased))
    for path, source in tied.items():
        tensors[f"{path}.lora_A.weight"] = tensors[f"{source}.lora_embedding_B"].t().contiguous()
        tensors[f"{path}.lora_B.weight"] = tensors[f"{source}.lora_embedding_A"].t().contiguous()
    return tensors


def tied_sites(sources: Sequence[Source]) -> dict[str, str]:
    """Heads whose factors are those of the embedding, transposed, in every adapter that has them; with that one."""
    if not all(source.config.ensure_weight_tying for source in sources):
        return {}
    found = {}
    for path in dict.fromkeys(path for source in sources for path in source.sites):
        for other in dict.fromkeys(path for source in sources for path in source.sites):
            pairs = [(s.sites.get(path), s.sites.get(other)) for s in sources]
            if all((a is None) == (b is None) and (a is None or _is_transposed(a, b)) for a, b in pairs):
                found[path] = other
    return found


def _is_transposed(head: Site, embedding: Site | None) -> bool:
    if embedding is None or not embedding.is_embedding or head.is_embedding:
        return False
    (a,), (b,) = head.blocks, embedding.blocks
    return torch.equal(a.A, b.B.t()) and torch.equal(a.B, b.A.t())


def _stored(path: str, site: Site, rank: int, *, biased: bool) -> dict[str, Tensor]:
    if biased and (site.is_embedding or site.layout.experts):
        raise UnsupportedError(
            f"{path}: some of the adapters have lora_bias=True, and this weight has no place for such a bias; combine "
            "adapters that are on the same kinds of layers"
        )
    own = site.layout.block_rank(rank)
    blocks = [
        Factors(filled(block.A, own, dim=0), filled(block.B, own, dim=1), 1.0, block.bias)
        for block in site.blocks
    ]
    A, B, bias = site.layout.join(blocks)
    if bias is None and biased:
        bias = B.new_zeros(B.shape[0])
    if site.is_embedding:
        return {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
    found = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    return found if bias is None else {**found, f"{path}.lora_B.bias": bias}
