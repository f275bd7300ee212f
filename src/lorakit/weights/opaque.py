"""Quantised linear layers that can be called but not read: of these only the shape is known.

An adapter beside one trains and infers. Merging would need the weight, and is refused.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from lorakit.errors import UnsupportedError
from lorakit.layouts import Layout, matrix_layout
from lorakit.weights.codec import WeightState
from lorakit.weights.dense import FLOATS, is_dense
from lorakit.weights.torchao import is_torchao, reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

_OF_TRANSFORMERS = (
    "AutoBitLinear",
    "BitLinear",
    "CompressedTensorsFP8Linear",
    "FP8Linear",
    "FbgemmFp8Linear",
    "HiggsLinear",
    "MetalLinear",
    "NVFP4Linear",
    "QuantizedLinear",
)
_OF_AWQ = ("Exllama", "ExllamaV2", "GEMM", "GEMV", "GEMVFast", "IPEX", "Marlin")

BACKENDS: Mapping[tuple[str, str], str] = {
    ("auto_gptq", "QuantLinear"): "GPTQ",
    ("gptqmodel", "BaseQuantLinear"): "GPTQ",
    ("gptqmodel", "AWQuantLinear"): "AWQ",
    **{("awq", f"WQLinear_{kind}"): "AWQ" for kind in _OF_AWQ},
    ("aqlm", "QuantizedLinear"): "AQLM",
    ("eetq", "EetqLinear"): "EETQ",
    ("transformers", "EetqLinear"): "EETQ",
    ("neural_compressor", "PatchedLinear"): "INC",
    ("transformer_engine", "Linear"): "Transformer Engine",
    ("compressed_tensors", "CompressedLinear"): "compressed-tensors",
    ("fp_quant", "FPQuantLinear"): "FP-Quant",
    ("optimum", "QLinear"): "Quanto",
    ("spqr_quant", "QuantizedLinear"): "SpQR",
    ("vptq", "VQuantLinear"): "VPTQ",
    **{("transformers", kind): kind for kind in _OF_TRANSFORMERS},
}
"""What a layer is called in messages, by the package and the name of its class, or of a class that it comes from."""


_MULTIPLY_OTHERWISE = frozenset({"AutoBitLinear", "INC", "Transformer Engine"})
"""Backends whose layers may hold plain floating-point numbers and multiply something else."""


def backend_of(base: nn.Module) -> str | None:
    """What a layer that can only be called is known as; None for any other module."""
    found = _known_as(type(base))  # type: ignore[arg-type]  # mypy takes no class for hashable
    if found is not None:
        plain = is_dense(base._parameters.get("weight"))
        return None if plain and found not in _MULTIPLY_OTHERWISE else found
    return _kind_of_linear(base) if isinstance(base, nn.Linear) else None


def may_be_opaque(kind: type[nn.Module]) -> bool:
    """Whether a class is a known one, so that it depends on the module's weight whether it is read or only called."""
    return _known_as(kind) is not None  # type: ignore[arg-type]  # as above


@lru_cache(maxsize=1024)  # a model has hundreds of modules and a dozen classes
def _known_as(kind: type[nn.Module]) -> str | None:
    """What layers of a class, or of one that it comes from, are called."""
    names = ((each.__module__.partition(".")[0], each.__name__) for each in kind.__mro__)
    return next((BACKENDS[name] for name in names if name in BACKENDS), None)


def _kind_of_linear(base: nn.Linear) -> str | None:
    """The name of a linear layer that stores its weight in a way that nobody here knows."""
    weight = base._parameters.get("weight")
    if is_torchao(weight):
        return None if reads(weight) else f"torchao {type(weight).__name__}"
    unknown = weight is None or (type(weight) is nn.Parameter and weight.dtype not in FLOATS)
    return type(base).__name__ if unknown and type(base).forward is not nn.Linear.forward else None


class OpaqueCodec:
    """A layer of which only the shape is known."""

    name = "opaque"
    names = ("weight", "bias")
    can_read = can_write = False
    on_grid = True

    def owns(self, base: nn.Module) -> bool:
        """One of the known classes, or a linear layer that stores its weight in a way of its own."""
        return backend_of(base) is not None and _shape(base) is not None

    def layout(self, base: nn.Module) -> Layout:
        """From the numbers of features that the layer names."""
        shape = _shape(base)
        assert shape is not None
        return matrix_layout(*shape)

    def dtype(self, base: nn.Module) -> torch.dtype:
        """Of its first floating-point tensor, scales for the most part; fp32 where it has none."""
        return next((tensor.dtype for tensor in _tensors(base) if tensor.dtype in FLOATS), torch.float32)

    def gives_fresh(self, base: nn.Module) -> bool:  # noqa: ARG002
        """Not known."""
        return False

    def guard(self, base: nn.Module) -> Sequence[RemovableHandle]:  # noqa: ARG002
        """None is needed."""
        return ()

    def read(self, base: nn.Module, dtype: torch.dtype, state: WeightState | None = None) -> NoReturn:  # noqa: ARG002
        """Refused.

        Raises:
            UnsupportedError: always; says what to do instead.
        """
        _refuse(base)

    peek = read

    def state(self, base: nn.Module) -> WeightState:
        """One of its tensors, to tell where it is, and the bias."""
        first = next(_tensors(base), None)
        if first is None:
            _refuse(base)
        bias = getattr(base, "bias", None)
        return WeightState(cast("nn.Parameter", first), bias if isinstance(bias, torch.Tensor) else None)  # type: ignore[arg-type]

    def encode(self, base: nn.Module, W: Tensor) -> NoReturn:  # noqa: ARG002
        """As `read`."""
        _refuse(base)

    def merged(self, base: nn.Module, *_: Any) -> NoReturn:
        """As `read`."""
        _refuse(base)

    def swap(self, base: nn.Module, state: WeightState) -> NoReturn:  # noqa: ARG002
        """As `read`."""
        _refuse(base)

    def moved(self, base: nn.Module, state: WeightState) -> WeightState:  # noqa: ARG002
        """Nothing is ever kept aside."""
        return state


def _refuse(base: nn.Module) -> NoReturn:
    raise UnsupportedError(
        f"the weight of a {backend_of(base)} layer ({type(base).__name__}) cannot be read or written here: keep the "
        "adapter beside it, which trains and infers, or load the base in full precision to merge into that"
    )


def _tensors(base: nn.Module) -> Iterator[Tensor]:
    yield from base.parameters()
    yield from base.buffers()


def _shape(base: nn.Module) -> tuple[int, int] | None:
    """(out, in), by either pair of names."""
    for out, inner in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        sizes = getattr(base, out, None), getattr(base, inner, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None
