"""The digest that a saved adapter carries: SHA-256 of its config and of every tensor's name, dtype, shape and data.

It does not depend on where the tensors lie in the file. Tensors are taken in the order of `digest_order`.
"""

from __future__ import annotations

import ctypes
import hashlib
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING

from lorakit.checkpoint.header import DTYPE_CODES, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

_PREFIX = "sha256:"
DIGEST_LENGTH = len(_PREFIX) + 64


class Digest:
    """A running digest: made with the config, fed each tensor in `digest_order`, read with `text`."""

    def __init__(self, config: bytes) -> None:
        self._hash = hashlib.sha256(len(config).to_bytes(8, "little") + config)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor, contiguous and on the CPU."""
        self.add_bytes(name, tensor.dtype, tensor.shape, raw_bytes(tensor))

    def add_bytes(self, name: str, dtype: torch.dtype, shape: Sequence[int], raw: memoryview) -> None:
        """Take in one tensor by what it consists of."""
        # as `json.dumps`, a third its cost
        head = f'[{_quoted(name)},"{DTYPE_CODES[dtype]}",[{",".join(map(str, shape))}]]'.encode()
        self._hash.update(len(head).to_bytes(8, "little") + head)
        self._hash.update(raw)

    def text(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return _PREFIX + self._hash.hexdigest()


def digest_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names by element size, the largest first (which keeps a file aligned), then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; valid while the tensor lives."""
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
