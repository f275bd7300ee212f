"""Writing an adapter folder: after any failure, and after a kill at any point, it holds the old adapter or the new.

The order of a save, under the folder's lock:

1. refuse what must not be saved, before anything is touched;
2. write the weights, with the config and the digest in their header, under a temporary name, and read the header back;
3. write the config under a temporary name that holds the digest of these weights;
4. rename the weights: from here on the save counts;
5. rename the config, flush the folder, and only then touch the README.

Between 4 and 5 the folder holds new weights and an old config; the temporary config is then still there, and
`reading` uses the copy inside the weights. If step 5 fails it is tried once more, and else the temporary config is
left in place for that purpose. A mode is kept from the file that is replaced. Equal input gives equal bytes.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.atomic import (
    flush_folder,
    locked,
    made,
    naming,
    remove_leftovers,
    write_all,
    write_new,
)
from lorakit.checkpoint.digest import DIGEST_LENGTH, Digest, digest_order, raw_bytes
from lorakit.checkpoint.files import (
    CONFIG_NAME,
    MAX_CONFIG,
    README_NAME,
    WEIGHTS_NAME,
    open_regular,
    present,
    read_small,
    read_up_to,
)
from lorakit.checkpoint.header import DTYPE_CODES, TensorInfo, build_header, parse_header
from lorakit.checkpoint.layout import CONFIG_FIELD, DIGEST_FIELD, SUFFIX, TEMPORARY, pending_config_name
from lorakit.checkpoint.reading import non_finite
from lorakit.config import strict_json
from lorakit.errors import AdapterError, AdapterFormatError, NonFiniteError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

README_MARK = "<!-- Rewritten by lorakit at every save; delete this line to keep your own text. -->"
_SURROGATE = re.compile("[\\ud800-\\udfff]")


def write_adapter(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    readme: str | None = None,
) -> list[Path]:
    """Save an adapter as `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: made if it is missing.
        config: the fields of the config; sets are written as sorted lists.
        tensors: file keys to tensors of f64, f32, f16 or bf16 and any strides, on any device.
        readme: the text of a README.md, written only if there is none or it carries our mark.

    Returns:
        The files written.

    Raises:
        ConfigError: the config cannot be written as JSON.
        AdapterFormatError: a tensor is of another dtype, has no data or a name that a file cannot hold.
        NonFiniteError: tensors hold NaN or infinity.
        OSError: the disk is full, the folder cannot be written and the like; it names the folder.
    """
    path = Path(folder)
    text = strict_json.dumps(dict(config))
    _refuse(path, text, tensors)
    with naming(path, "the adapter was not saved"), made(path), locked(path) as alone:
        if alone:
            remove_leftovers(path)
        _replace_pair(path, text, tensors)
        written = [path / CONFIG_NAME, path / WEIGHTS_NAME]
        if readme is not None and _may_write_readme(path):
            _replace_readme(path, readme)
            written.append(path / README_NAME)
    return written


def _refuse(path: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    strict_json.loads(config, where=f"{path / CONFIG_NAME} (to be written)", max_bytes=MAX_CONFIG)
    problems = [
        f"{name!r}: {problem}" for name, tensor in tensors.items() if (problem := _problem(name, tensor))
    ]
    if problems:
        raise AdapterFormatError(bullet_list(f"{path}: nothing was saved, these tensors cannot be", problems))
    bad = [line for name, tensor in tensors.items() for line in non_finite(name, tensor.detach())]
    if bad:
        raise NonFiniteError(
            bullet_list(
                f"{path}: nothing was saved, these tensors are not finite", bad, "The training diverged."
            )
        )


def _problem(name: object, tensor: object) -> str:
    """Why a tensor cannot be saved, or an empty text."""
    if not isinstance(name, str) or name in ("", "__metadata__") or _SURROGATE.search(name):
        return "not a name for a tensor"
    if not isinstance(tensor, torch.Tensor) or type(tensor.detach()) is not torch.Tensor:
        return f"a {type(tensor).__name__}, wanted a plain tensor; gather or dequantise it first"
    if tensor.is_meta:
        return "on the meta device, it has no data; load or initialise it first"
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPE_CODES:
        return f"{tensor.dtype}, {tensor.layout}; wanted a dense tensor of {', '.join(DTYPE_CODES.values())}"
    return ""


def _replace_pair(folder: Path, config: bytes, tensors: Mapping[str, Tensor]) -> None:
    weights = folder / WEIGHTS_NAME
    new_weights = folder / f"{TEMPORARY}weights-{os.getpid()}-{os.urandom(8).hex()}{SUFFIX}"
    target = folder / CONFIG_NAME
    new_config = None
    try:
        digests: list[str] = []
        fill = partial(_write_weights, config=config, tensors=tensors, digests=digests)
        write_new(new_weights, fill, like=weights)
        _read_back(new_weights, tensors)
        new_config = folder / pending_config_name(digests[0])
        write_new(new_config, partial(write_all, data=config), like=target)
        os.replace(new_weights, weights)  # noqa: PTH105
        os.replace(new_config, target)  # noqa: PTH105
        flush_folder(folder)
    except BaseException:
        # an interrupt may come right after a rename: what is on the disk says how far the save came
        committed = (
            new_config is not None and os.path.lexists(new_config) and not os.path.lexists(new_weights)
        )
        with suppress(OSError):
            if new_config is not None and committed:
                os.replace(new_config, target)  # noqa: PTH105
        if not committed:
            for leftover in (new_weights, new_config):
                with suppress(OSError):
                    if leftover is not None:
                        os.unlink(leftover)  # noqa: PTH108
        raise


def _write_weights(descriptor: int, config: bytes, tensors: Mapping[str, Tensor], digests: list[str]) -> None:
    infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.numel() * t.itemsize) for name, t in tensors.items()}
    infos = {name: infos[name] for name in digest_order(infos)}
    metadata = {"format": "pt", CONFIG_FIELD: config.decode(), DIGEST_FIELD: "0" * DIGEST_LENGTH}
    write_all(descriptor, build_header(infos, metadata))
    digest = Digest(config)
    for name in infos:
        tensor = tensors[name].detach().to("cpu").contiguous().resolve_neg()
        digest.add(name, tensor)
        write_all(descriptor, raw_bytes(tensor))
    metadata[DIGEST_FIELD] = digest.text()
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, build_header(infos, metadata))
    digests.append(digest.text())


def _read_back(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open_regular(path.parent, path.name) as (descriptor, status):
        header = parse_header(partial(read_up_to, descriptor), status.st_size, str(path))
    if set(header.tensors) != set(tensors):
        raise AdapterFormatError(
            f"{path}: read back with other tensors than were written; the disk is at fault"
        )


def _may_write_readme(folder: Path) -> bool:
    """Whether there is no README, or one of ours; an unreadable one is not ours."""
    if not present(folder, README_NAME):
        return True
    try:
        return README_MARK.encode() in read_small(folder, README_NAME)
    except AdapterError:
        return False


def _replace_readme(folder: Path, readme: str) -> None:
    text = readme if README_MARK in readme else f"{readme.rstrip()}\n\n{README_MARK}\n"
    new = folder / f"{TEMPORARY}readme-{os.getpid()}-{os.urandom(8).hex()}{SUFFIX}"
    try:
        write_new(new, partial(write_all, data=text.encode()), like=folder / README_NAME)
        os.replace(new, folder / README_NAME)  # noqa: PTH105
    except BaseException:
        with suppress(OSError):
            os.unlink(new)  # noqa: PTH108
        raise
