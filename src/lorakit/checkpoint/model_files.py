"""The weights of a whole model on disk, read one tensor at a time: `model.safetensors`, or shards with an index.

Nothing is downloaded, and no model class is built.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import safetensors

from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, AdapterNotFoundError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX = 64 << 20


@dataclass(frozen=True)
class ModelFiles:
    """Where each tensor of a model is.

    Attributes:
        place: the folder or file, for messages.
        files: by the name of the tensor.
    """

    place: Path
    files: Mapping[str, Path]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header.

        Raises:
            AdapterNotFoundError: its file is not there.
            AdapterFormatError: its file is damaged, or does not have it.
        """
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU; errors as `shape`."""
        with _opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def open_model_files(path: str | os.PathLike[str]) -> ModelFiles:
    """The tensors of a safetensors file, of an index (`*.index.json`), or of a folder with one of either.

    Raises:
        AdapterNotFoundError: there is none.
        AdapterFormatError: it is damaged.
    """
    given = Path(path).expanduser()
    found = given
    if given.is_dir():
        found = next((given / name for name in (SINGLE, INDEX) if (given / name).is_file()), given)
    if not found.is_file():
        raise AdapterNotFoundError(
            f"{given}: neither a safetensors file nor a folder with {SINGLE} or {INDEX}"
        )
    if found.suffix == ".json":
        return ModelFiles(found, _from_index(found))
    with _opened(found) as file:
        return ModelFiles(found, dict.fromkeys(file.keys(), found))


def in_hub_cache(repository: str) -> Path:
    """The folder of a model in the hub's cache; no network is asked.

    Raises:
        AdapterNotFoundError: it is not there.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise AdapterNotFoundError(
            f"{repository!r}: neither a folder nor a model in the hub's cache; pass the folder of its safetensors files"
        ) from error


def _from_index(path: Path) -> dict[str, Path]:
    if path.stat().st_size > _MAX_INDEX:
        raise AdapterFormatError(f"{path}: more than {_MAX_INDEX:,} bytes; not an index of weights")
    content = strict_json.loads(path.read_bytes(), where=str(path), max_bytes=_MAX_INDEX, max_depth=8)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(_is_plain(file) for file in files.values()):
        raise AdapterFormatError(f"{path}: wanted a weight_map from names of tensors to files beside it")
    return {name: path.parent / file for name, file in files.items()}


def _is_plain(file: object) -> bool:
    return isinstance(file, str) and PurePath(file).name == file


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise AdapterNotFoundError(f"{path}: no such file, though the index names it") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: {error}; copy or download it again") from error
