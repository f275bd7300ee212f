"""`lorakit.resize`: an adapter of another rank, from files to files.

Of each weight's delta the best approximation of the new rank is taken (Eckart and Young, 1936), in float64 and on the
factors. The scaling of a module stays what it was, so that training can go on with the same learning rate, and A and B
share the singular values evenly.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorakit.checkpoint.keys import natural_key, to_file_key
from lorakit.checkpoint.sites import ROWS, Site, carries_parameters, owner_of, read_source
from lorakit.checkpoint.storing import module_pattern, refuse_existing, silent, stored_sites, tied_sites
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import ConfigError
from lorakit.ops.low_rank import LowRank, joint_spectrum, low_rank_svd, padded_rows, rank_for
from lorakit.ops.similarity import difference_norm
from lorakit.specs import scaling_of
from lorakit.types import Factors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from lorakit.checkpoint.sites import Source
    from lorakit.checkpoint.storing import Progress
    from lorakit.config import LoraConfig


@dataclass(frozen=True)
class ResizedLayer:
    """What became of one weight's factors.

    Attributes:
        path: in the file.
        rank_before, rank: of the factors.
        norm: the Frobenius norm of the delta before.
        error: the norm of what is lost, with the rounding to the file's dtype, relative to `norm`.
        kept: the share of the energy (the squared norm) that is kept, `1 - error**2`.
    """

    path: str
    rank_before: int
    rank: int
    norm: float
    error: float
    kept: float


@dataclass(frozen=True)
class Resized:
    """What `resize` did.

    Attributes:
        output: the folder written.
        layers: a row for each weight, by path.
        parameters_before, parameters: of the factors.
        kept: the share of the energy of all deltas together that is kept.
    """

    output: str
    layers: tuple[ResizedLayer, ...]
    parameters_before: int
    parameters: int
    kept: float


def resize(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Resized:
    """Write an adapter with the best factors of another rank; whole modules, biases and token rows are carried over.

    Args:
        adapter: a folder, or a repository of the hub.
        output: the folder to write.
        rank: of every weight. Larger than before, the delta stays and the new ranks begin with B zero. With `energy`: the
            largest rank that a weight may get.
        energy: in (0, 1]: each weight gets the fewest ranks that hold this share of its squared Frobenius norm.
            Parameters (`target_parameters`) must share one rank, so there every weight gets the largest of these.
        overwrite: replace an adapter that is in `output` already.
        progress: is called with (what, done, total).

    Returns:
        The ranks and what is lost, weight by weight.

    Raises:
        ConfigError: neither rank nor energy, or out of range; or `output` holds an adapter.
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: the adapter cannot be read.
        UnsupportedError: the adapter is more than its factors (DoRA and other variants).
        OSError: the disk refused. Nothing was written after any of these.
    """
    check_rank(rank, energy)
    target = Path(output)
    refuse_existing(target, overwrite=overwrite)
    source = read_source(
        adapter,
        instead="merge it into its base (lorakit merge) and take an adapter of the rank out of that (lorakit extract)",
    )
    found = {}
    for done, (path, site) in enumerate(source.sites.items()):
        progress("decomposing", done, len(source.sites))
        found[path] = [low_rank_svd([block.to(torch.float64)]) for block in site.blocks]
    progress("decomposing", len(found), len(found))
    ranks = _ranks(source, found, rank, energy)
    config = _config(source, ranks)
    sites = {path: _resized(site, found[path], ranks[owner_of(path)]) for path, site in source.sites.items()}
    tensors = stored_sites(sites, ranks, tied_sites([source]), biased=config.lora_bias)
    for module, tokens in source.rows.items():
        tensors[module + ROWS] = torch.stack(list(tokens.values()))
    tensors.update(source.rest)
    write_adapter(target, config.to_dict(), {to_file_key(name): tensor for name, tensor in tensors.items()})
    return _report(target, source, found, sites)


def check_rank(rank: int | None, energy: float | None) -> None:
    """Refuse a rank or an energy that is none.

    Raises:
        ConfigError: says what is wrong.
    """
    if rank is None and energy is None:
        raise ConfigError("say how large: rank=... (--rank), or energy=... in (0, 1] (--energy)")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank={rank!r}: wanted a positive whole number")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(
            f"energy={energy!r}: wanted a share in (0, 1], such as 0.99 for 99 % of the squared norm"
        )


# ---- how many ranks -----------------------------------------------------------------------------------


def _ranks(
    source: Source, found: Mapping[str, Sequence[LowRank]], rank: int | None, energy: float | None
) -> dict[str, int]:
    """The new rank of each module that a config names: the largest of those of its weights."""
    ranks: dict[str, int] = {}
    for path, site in source.sites.items():
        groups = site.layout.groups
        wanted = math.inf if rank is None else max(1, rank // groups)
        if energy is not None:
            whole = sum(block.energy for block in found[path])
            wanted = min(wanted, rank_for(joint_spectrum(found[path]), energy, whole))
        assert wanted < math.inf
        owner = owner_of(path)
        ranks[owner] = max(int(wanted) * groups, ranks.get(owner, 0))
    if any(carries_parameters(source.config, owner) for owner in ranks):
        step = math.lcm(*(site.layout.groups for site in source.sites.values()))
        ranks = dict.fromkeys(ranks, -(-max(ranks.values()) // step) * step)
    return ranks


def _config(source: Source, ranks: Mapping[str, int]) -> LoraConfig:
    """The config with these ranks, and with the alphas that leave every scaling what it was."""
    if not ranks:
        return source.config
    alphas = {
        owner_of(path): _plain(site.blocks[0].scaling * ranks[owner_of(path)])
        for path, site in source.sites.items()
    }
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return replace(
        source.config,
        r=r,
        lora_alpha=alpha,
        rank_pattern={module_pattern(owner): own for owner, own in ranks.items() if own != r},
        alpha_pattern={module_pattern(owner): own for owner, own in alphas.items() if own != alpha},
        use_rslora=False,
    )


def _plain(number: float) -> float:
    """A whole number as an int: some readers of configs take no other."""
    return int(number) if number == int(number) else number


# ---- factors ------------------------------------------------------------------------------------------


def _resized(site: Site, found: Sequence[LowRank], rank: int) -> Site:
    own = site.layout.block_rank(rank)
    pairs = zip(site.blocks, found, strict=True)
    blocks = tuple(_factors(svd.truncated(own), block, own, rank) for block, svd in pairs)
    return site._replace(blocks=blocks)


def _factors(svd: LowRank, before: Factors, own: int, rank: int) -> Factors:
    """Factors of rank `own` whose delta is that of the triplets, in the dtypes from before.

    A row of A whose singular value is zero, or that is new, gets the mean size of the others and a column of zeros in B: a
    row of zeros in both would never be trained.
    """
    scaling = scaling_of(rank, before.scaling * rank, rslora=False)
    S = torch.nn.functional.pad(svd.S, (0, own - svd.S.shape[0]))
    sizes = (S / abs(scaling)).sqrt()
    alive = sizes > 0.0
    sizes = torch.where(alive, sizes, sizes[alive].mean() if bool(alive.any()) else 1.0)
    U = torch.nn.functional.pad(svd.U, (0, own - svd.U.shape[1]))
    A = padded_rows(svd.Vh, own) * sizes[:, None]
    B = U * (S / (scaling * sizes))
    return Factors(A.to(before.A.dtype), B.to(before.B.dtype), scaling, before.bias)


# ---- what is told -------------------------------------------------------------------------------------


def _report(
    target: Path, source: Source, found: Mapping[str, Sequence[LowRank]], sites: Mapping[str, Site]
) -> Resized:
    layers = []
    for path in sorted(source.sites, key=natural_key):
        site = source.sites[path]
        norm = math.sqrt(sum(block.energy for block in found[path]))
        pairs = zip(site.blocks, sites[path].blocks, strict=True)
        lost = math.hypot(*(difference_norm(old, new) for old, new in pairs))
        error = lost / norm if norm else 0.0
        before, now = (of.blocks[0].rank * site.layout.groups for of in (site, sites[path]))
        layers.append(ResizedLayer(path, before, now, norm, error, max(0.0, 1.0 - error**2)))
    energy = sum(layer.norm**2 for layer in layers)
    lost = sum((layer.norm * layer.error) ** 2 for layer in layers)
    return Resized(
        output=str(target),
        layers=tuple(layers),
        parameters_before=_parameters(source.sites),
        parameters=_parameters(sites),
        kept=1.0 - lost / energy if energy else 1.0,
    )


def _parameters(sites: Mapping[str, Site]) -> int:
    blocks = [block for site in sites.values() for block in site.blocks]
    return sum(block.A.numel() + block.B.numel() for block in blocks)
