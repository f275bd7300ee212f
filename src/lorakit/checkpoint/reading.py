"""Reading an adapter folder: nothing is allocated, run or asked of a network before the files have been checked.

Which config counts. A saved weights file carries a copy of the config, and replacing the weights file is the moment
at which a save counts (see `writing`). `adapter_config.json` is used as it stands, but for these
cases:

- It is missing, and the weights carry a copy: the copy is used.
- A save was cut between the weights and the config. Its finished config then still lies under a temporary name that
  holds the digest of those very weights. The copy is used, with a `UserWarning`; the next save cleans up.
- It differs and no such temporary file is there: somebody edited it after saving. The edited file is used, with a
  `UserWarning` that names the fields, so that neither the edit nor the difference goes unseen.
- The weights carry no copy (written elsewhere): the file is all there is.

A reader takes no lock and may run against a writer: the weights are opened first, then the temporary name is looked
up, then the config is read, and if the weights were replaced meanwhile it starts again.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.digest import Digest, digest_order, raw_bytes
from lorakit.checkpoint.files import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    Stamp,
    open_regular,
    present,
    read_small,
    read_up_to,
    stamp_of,
)
from lorakit.checkpoint.header import Header, TensorInfo, parse_header
from lorakit.checkpoint.layout import CONFIG_FIELD, DIGEST_FIELD, pending_config_name
from lorakit.checkpoint.sources import Run, SafetensorsSource, Source, open_pickle
from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, NonFiniteError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

_ATTEMPTS = 100  # how often a reader starts again because the weights were replaced under it


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder whose config and header have been read and checked.

    Attributes:
        folder: the folder.
        config: the config that counts (see the module's text), as parsed JSON.
        tensors: every tensor's dtype, shape and size, from the header alone.
        metadata: the texts of the weights file's header.
        repaired: whether `config` is the copy in the weights because `adapter_config.json` is missing or stale.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    repaired: bool
    source: Source = field(repr=False)

    @property
    def weights_path(self) -> Path:
        """The file of the tensors."""
        return self.source.path

    @property
    def config_path(self) -> Path:
        """The file of the config."""
        return self.folder / CONFIG_NAME

    def load(
        self,
        keys: Iterable[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        check_finite: bool = True,
        check_digest: bool = True,
    ) -> dict[str, Tensor]:
        """Read tensors, in the dtypes of the file.

        Args:
            keys: which ones; all of them by default.
            device: where to put them.
            check_finite: refuse NaN and infinity.
            check_digest: compare with the digest in the file, if it carries one; reads all tensors.

        Raises:
            AdapterFormatError: a key is not in the file, the file is damaged or changed since it was opened.
            NonFiniteError: the tensors that hold NaN or infinity, with their counts.
        """
        wanted = dict.fromkeys(self.tensors if keys is None else keys)
        absent = [key for key in wanted if key not in self.tensors]
        if absent:
            raise AdapterFormatError(bullet_list(f"{self.weights_path}: no tensors of these names", absent))
        digest = self._digest() if check_digest else None
        order = digest_order(self.tensors if digest else {key: self.tensors[key] for key in wanted})
        loaded: dict[str, Tensor] = {}
        bad: list[str] = []
        for run in self.source.runs(order):
            if digest:
                self._take_in(run, digest)
            mine = {name: tensor for name, tensor in run.tensors.items() if name in wanted}
            if check_finite and not _is_finite(run.values):
                bad += [line for name, tensor in mine.items() for line in non_finite(name, tensor)]
            loaded |= mine
        if digest and digest.text() != self.metadata[DIGEST_FIELD]:
            raise AdapterFormatError(
                f"{self.weights_path}: the file was damaged or changed after it was saved (its digest does not fit "
                "its contents); copy or download it again"
            )
        if bad:
            hint = "The training diverged or the file is damaged."
            raise NonFiniteError(bullet_list(f"{self.weights_path}: numbers that are not finite", bad, hint))
        if torch.device(device).type == "cpu":
            return {key: loaded[key] for key in wanted}
        return {key: loaded[key].to(device) for key in wanted}

    def _take_in(self, run: Run, digest: Digest) -> None:
        raw, begin = raw_bytes(run.values), 0
        for name in run.tensors:
            dtype, shape, nbytes = self.tensors[name]
            digest.add_bytes(name, dtype, shape, raw[begin : begin + nbytes])
            begin += nbytes

    def _digest(self) -> Digest | None:
        if DIGEST_FIELD not in self.metadata:
            return None
        return Digest(self.metadata.get(CONFIG_FIELD, "").encode("utf-8", "surrogatepass"))


def open_adapter(folder: str | os.PathLike[str], *, allow_pickle_bin: bool = False) -> AdapterFile:
    """Check a local adapter folder and read its config and header; no tensor is read.

    Args:
        folder: a local directory with `adapter_config.json` and `adapter_model.safetensors`.
        allow_pickle_bin: also take `adapter_model.bin` where the safetensors file is missing.

    Raises:
        AdapterNotFoundError: the folder or one of the files is not there.
        AdapterFormatError: a file is damaged, hostile or of another format.
        UnsupportedError: a pickle is allowed, but this torch is too old to read one.
    """
    path = _existing(folder)
    if present(path, WEIGHTS_NAME):
        config, repaired, header, stamp = _read_pair(path)
        weights = SafetensorsSource(path, stamp, header.tensors, header.places(stamp[2]))
        return AdapterFile(path, config, header.tensors, header.metadata, repaired, weights)
    if not present(path, PICKLE_NAME):
        raise AdapterNotFoundError(
            f"{path}: no {WEIGHTS_NAME} in this folder; is it where the adapter was saved?"
        )
    if not allow_pickle_bin:
        raise AdapterFormatError(
            f"{path / PICKLE_NAME}: a pickle, and no {WEIGHTS_NAME} beside it; ask its author for a safetensors "
            "file, or pass allow_pickle_bin=True to read it with the restricted unpickler"
        )
    config = _parsed(read_small(path, CONFIG_NAME), path / CONFIG_NAME)
    source, tensors = open_pickle(path)
    return AdapterFile(path, config, tensors, {}, repaired=False, source=source)


def read_config_dict(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of a local adapter folder, as parsed JSON; the weights may be missing.

    Raises:
        AdapterNotFoundError: the folder or the config is not there.
        AdapterFormatError: the config, or the header of the weights beside it, is damaged.
    """
    path = _existing(folder)
    if present(path, WEIGHTS_NAME):
        return _read_pair(path)[0]
    return _parsed(read_small(path, CONFIG_NAME), path / CONFIG_NAME)


def _is_finite(tensor: Tensor) -> bool:
    # extremes are NaN if any number is; one pass without a mask, 9 times as fast as isfinite
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def non_finite(name: str, tensor: Tensor) -> list[str]:
    """One line that counts NaN and infinity in a tensor, or none."""
    if _is_finite(tensor):
        return []
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return [f"{name}: {nan:,} NaN and {inf:,} infinite of {tensor.numel():,}"]


def _existing(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not path.is_dir():
        kind = "not a folder" if os.path.lexists(path) else "no such folder"
        raise AdapterNotFoundError(
            f"{path}: {kind}; an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    return path


def _read_pair(folder: Path) -> tuple[dict[str, Any], bool, Header, Stamp]:
    """The config that counts, whether it is the copy, the header, and the version of the weights file."""
    for _ in range(_ATTEMPTS):
        with open_regular(folder, WEIGHTS_NAME) as (descriptor, status):
            where = str(folder / WEIGHTS_NAME)
            header = parse_header(partial(read_up_to, descriptor), status.st_size, where)
            pending = _is_pending(folder, header.metadata)
            file = read_small(folder, CONFIG_NAME) if present(folder, CONFIG_NAME) else None
            with open_regular(folder, WEIGHTS_NAME) as (_, now):
                unchanged = stamp_of(now) == stamp_of(status)
        if unchanged:
            config, repaired = _choose(folder, header.metadata, file, pending=pending)
            return config, repaired, header, stamp_of(status)
    raise AdapterFormatError(
        f"{folder}: another process kept replacing the adapter while it was read; try again"
    )


def _is_pending(folder: Path, metadata: Mapping[str, str]) -> bool:
    digest = metadata.get(DIGEST_FIELD)
    return digest is not None and CONFIG_FIELD in metadata and present(folder, pending_config_name(digest))


def _choose(
    folder: Path, metadata: Mapping[str, str], file: bytes | None, *, pending: bool
) -> tuple[dict[str, Any], bool]:
    copy = metadata.get(CONFIG_FIELD)
    if copy is None:
        if file is None:
            raise AdapterNotFoundError(
                f"{folder / CONFIG_NAME}: no such file, and {WEIGHTS_NAME} carries no copy"
            )
        return _parsed(file, folder / CONFIG_NAME), False
    kept = copy.encode("utf-8", "surrogatepass")
    where = f"{folder / WEIGHTS_NAME}, config copy"
    if file == kept:
        return _parsed(file, folder / CONFIG_NAME), False
    if file is None:
        return _parsed(kept, where), True
    if pending:
        warnings.warn(
            f"{folder / CONFIG_NAME}: older than the weights, a save was cut; the copy kept in the weights is used. "
            f"Save the adapter again, or delete {pending_config_name(metadata[DIGEST_FIELD])} to use the file",
            UserWarning,
            stacklevel=2,
        )
        return _parsed(kept, where), True
    return _edited(_parsed(file, folder / CONFIG_NAME), _parsed(kept, where), folder), False


def _edited(now: dict[str, Any], saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    fields = sorted(
        key for key in {*now, *saved} if (key in now, now.get(key)) != (key in saved, saved.get(key))
    )
    if fields:
        warnings.warn(
            f"{folder / CONFIG_NAME}: changed after the adapter was saved ({ascii(fields)[1:-1][:500]}); "
            "the changed file is used; delete it to return to the copy kept in the weights file",
            UserWarning,
            stacklevel=2,
        )
    return now


def _parsed(raw: bytes, where: str | Path) -> dict[str, Any]:
    config = strict_json.loads(raw, where=str(where), max_bytes=1 << 20)
    if isinstance(config, dict):
        return config
    raise AdapterFormatError(f"{where}: holds a {type(config).__name__}, wanted an object of fields")
