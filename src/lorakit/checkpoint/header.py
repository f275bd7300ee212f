"""The header of a safetensors file, read strictly and written canonically.

Layout: 8 bytes, little-endian, the length of the header; the header, one JSON object of
`{name: {"dtype", "shape", "data_offsets"}}` and `"__metadata__": {str: str}`; then the data of the tensors.

`parse_header` accepts a file only if the tensors tile the data exactly, from its first byte to its last, and every
size agrees with its dtype and shape. It looks at the header alone: no tensor is read or allocated.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_HEADER = 32 << 20
MAX_TENSORS = 200_000
MAX_DIMS = 16
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
ALL_DTYPES = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What a whole model's checkpoint may hold beside its weights."""
_CODES = {dtype: code for code, dtype in ALL_DTYPES.items()}
_ENTRY = {"dtype", "shape", "data_offsets"}
_SHOWN = 10  # problems listed in one message, after which the check stops


class TensorInfo(NamedTuple):
    """What a header says of one tensor: its dtype, its shape, and its size in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file in the order of their data, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def places(self, size: int) -> dict[str, int]:
        """Where in a file of `size` bytes the data of each tensor begins: the data are the end of the file."""
        begin = size - sum(info.nbytes for info in self.tensors.values())
        found = {}
        for name, info in self.tensors.items():
            found[name] = begin
            begin += info.nbytes
        return found


def parse_header(
    read: Callable[[int], bytes], size: int, where: str, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> Header:
    """Read and check a header.

    Args:
        read: gives the next n bytes of the file, fewer only at its end.
        size: bytes in the whole file.
        where: the file, for messages.
        dtypes: those that its tensors may have, by the format's names.

    Raises:
        AdapterFormatError: the file is not a whole, well-formed safetensors file of tensors of these dtypes.
    """
    start = read(min(8, size))
    if start == b"version ":
        raise AdapterFormatError(
            f"{where}: this is a git-lfs pointer, not the weights; run `git lfs pull` there"
        )
    if len(start) < 8:
        raise AdapterFormatError(f"{where}: {size} bytes, empty or cut off; copy or download it again")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise AdapterFormatError(
            f"{where}: its header claims {length:,} bytes, at most {MAX_HEADER:,} are read; "
            "not a safetensors file, or damaged; copy or download it again"
        )
    if length < 2 or length > size - 8:
        raise AdapterFormatError(
            f"{where}: its header claims {length:,} bytes and the file has {max(size - 8, 0):,} after the length; "
            "cut off or not a safetensors file; copy or download it again"
        )
    raw = read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise AdapterFormatError(
            f"{where}: its header is not a JSON object; not a safetensors file, or damaged; copy or download it again"
        )
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise AdapterFormatError(f"{where}: more than {MAX_TENSORS:,} tensors; an adapter has far fewer")
    entries = strict_json.loads(raw, where=f"{where}, header", max_bytes=MAX_HEADER, max_depth=8)
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    return Header(_tensors(entries, size - 8 - length, where, dtypes), metadata)


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file whose data are `tensors`, in this order, one after another.

    Padded with spaces to a multiple of 8, so that the data are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, begin + info.nbytes],
        }
        begin += info.nbytes
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _metadata(found: object, where: str) -> dict[str, str]:
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    raise AdapterFormatError(
        f"{where}: its __metadata__ is not an object of texts; not a valid safetensors file"
    )


def _tensors(
    entries: dict[str, Any], size: int, where: str, dtypes: Mapping[str, torch.dtype]
) -> dict[str, TensorInfo]:
    if len(entries) > MAX_TENSORS:
        raise AdapterFormatError(f"{where}: more than {MAX_TENSORS:,} tensors; an adapter has far fewer")
    problems: list[str] = []
    placed: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in entries.items():
        problem = _problem(entry, dtypes)
        if problem:
            problems.append(f"{name[:200]!r}: {problem}")
            if len(problems) == _SHOWN:  # a hostile header is not worth more work
                break
            continue
        begin, end = entry["data_offsets"]
        info = TensorInfo(dtypes[entry["dtype"]], tuple(entry["shape"]), end - begin)
        placed.append((begin, end, name, info))
    placed.sort()  # names differ, so nothing behind them is compared
    if not problems:
        problems = _gaps(placed, size)
    if problems:
        shown = problems[:_SHOWN] + ["and maybe more"] * (len(problems) >= _SHOWN)
        hint = "damaged, or not written as such a file; copy or download it again, or convert it"
        if len(shown) == 1:
            raise AdapterFormatError(f"{where}: {shown[0]}; {hint}")
        raise AdapterFormatError(
            bullet_list(f"{where}: its header is not valid", shown, f"The file is {hint}.")
        )
    return {name: info for _, _, name, info in placed}


def _problem(entry: object, dtypes: Mapping[str, torch.dtype]) -> str:
    """What is wrong with one entry, or an empty text."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        return "an entry must have dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        return f"dtype {reprlib.repr(dtype)}, wanted one of {', '.join(dtypes)}"
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        return f"shape {reprlib.repr(shape)}, wanted a list of at most {MAX_DIMS} sizes"
    if not _sizes(offsets) or len(offsets) != 2:
        return f"data_offsets {reprlib.repr(offsets)}, wanted [begin, end]"
    wanted = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        return f"data_offsets {offsets}, but {dtype} of shape {shape} takes {wanted} bytes"
    return ""


def _sizes(value: object) -> bool:
    if type(value) is not list:
        return False
    for size in value:  # noqa: SIM110 - twice as fast as `all` on two sizes, and there are hundreds of such lists
        if type(size) is not int or size < 0:
            return False
    return True


def _gaps(placed: list[tuple[int, int, str, TensorInfo]], size: int) -> list[str]:
    problems = []
    reached = 0
    for begin, end, name, _ in placed:
        if begin != reached:
            kind = "overlaps the tensor before it" if begin < reached else "leaves a gap before it"
            problems.append(f"{name[:200]!r}: starts at byte {begin} of the data, wanted {reached}: {kind}")
        reached = max(reached, end)
        if len(problems) == _SHOWN:
            break
    if not problems and reached != size:
        kind = "cut off" if size < reached else "followed by bytes that belong to no tensor"
        problems.append(f"the tensors take {reached:,} bytes and the file holds {size:,}: {kind}")
    return problems
