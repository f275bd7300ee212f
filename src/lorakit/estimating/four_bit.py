"""A skeleton whose linear layers are as bitsandbytes would make them in 4 bits, without bitsandbytes.

Which layers those are is transformers' rule: all but the output embedding, what is tied, and the module of the last
parameter if that is a weight. What else the model has becomes fp32, as `prepare_model_for_kbit_training` leaves it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from lorakit.weights.dense import is_conv1d

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

BLOCK, GROUP = (
    64,
    256,
)  # weights that share a scale; scales that share a scale of their own under double quantisation


class Scheme(NamedTuple):
    """A way of storing weights in 4 bits.

    Attributes:
        double: whether the scales are quantised too, to one byte (Dettmers et al., 2023, arXiv:2305.14314).
    """

    double: bool

    def nbytes(self, numbers: int) -> int:
        """Bytes of the codes and their scales."""
        scales = math.ceil(numbers / BLOCK)
        codes = math.ceil(numbers / 2)
        return codes + (scales + 4 * math.ceil(scales / GROUP) if self.double else 4 * scales)


SCHEMES: Mapping[str, Scheme] = {"nf4": Scheme(double=False), "nf4_double": Scheme(double=True)}


class FourBit(nn.Linear):
    """Stands for `bitsandbytes.nn.Linear4bit` on the meta device."""

    def __init__(self, layer: nn.Linear, compute: torch.dtype, scheme: Scheme) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        codes = torch.empty(scheme.nbytes(layer.weight.numel()), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the compute dtype; the result has the dtype of x."""
        shape = (self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.to(self.compute)
        y: Tensor = MatMul4Bit.apply(x.to(self.compute), shape, bias)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


class MatMul4Bit(torch.autograd.Function):
    """As bitsandbytes' node of this name: unpacks the weight in forward and again in backward, and keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        """X times the weight, (..., out)."""
        ctx.shape = shape
        return linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        return dy @ dy.new_empty(ctx.shape), None, None


def quantise_skeleton(model: nn.Module, compute: torch.dtype, scheme: Scheme) -> None:
    """Make a skeleton's linear layers 4-bit ones, and the rest of it fp32, in place.

    Args:
        model: of transformers, on the meta device, without adapters.
        compute: dtype of the products.
        scheme: how weights are stored.
    """
    kept = _kept(model)
    chosen = [
        path
        for path, module in model.named_modules()
        if (type(module) is nn.Linear or is_conv1d(module)) and path not in kept
    ]
    for path in chosen:
        module = model.get_submodule(path)
        if is_conv1d(module):
            inner, out = module.weight.shape  # type: ignore[misc]
            plain = nn.Linear(inner, out, device="meta")  # it has a bias always
        else:
            plain = module  # type: ignore[assignment]
        model.set_submodule(path, FourBit(plain, compute, scheme))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _kept(model: Any) -> set[str]:
    """Paths of modules that stay as they are."""
    head = model.get_output_embeddings()
    kept = {path for path, module in model.named_modules() if head is not None and module is head}
    kept.add(list(model.named_parameters())[-1][0].removesuffix(".weight"))  # a bias there keeps nothing
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return kept.union(*(paths for paths in owners.values() if len(paths) > 1))
