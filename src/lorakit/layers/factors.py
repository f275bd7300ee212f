"""Making the small modules that hold the factors, without running their initialisers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def let_go(name: str, *holders: nn.ModuleDict | nn.ParameterDict) -> None:
    """Drop what is held under a name; an adapter that was put on only in part is not in all of them."""
    for holder in holders:
        if name in holder:
            del holder[name]


def acting_rate(dropout: nn.Module) -> float:
    """The probability with which an adapter's dropout zeroes an element now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` that takes these very tensors as its parameters.

    The constructor of `nn.Linear` would allocate and fill a weight first: 20 times the cost of this.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return linear


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def looking_conv(base: Convolution, weight: Tensor) -> Convolution:
    """A convolution that looks where `base` looks, but at all channels, with `weight` (r, in_channels, *kernel)."""
    kind = _CONVOLUTIONS[len(base.kernel_size)]
    made = kind(
        base.in_channels,
        weight.shape[0],
        base.kernel_size,  # type: ignore[arg-type]
        stride=base.stride,  # type: ignore[arg-type]
        padding=base.padding,  # type: ignore[arg-type]
        dilation=base.dilation,  # type: ignore[arg-type]
        padding_mode=base.padding_mode,
        bias=False,
        device="meta",
    )
    made.weight = nn.Parameter(weight)
    return made


def pointwise_conv(weight: Tensor, bias: Tensor | None, *, groups: int) -> Convolution:
    """The 1 x 1 convolution with `weight` (out, r / groups, 1, ...)."""
    kind = _CONVOLUTIONS[weight.ndim - 2]
    made = kind(weight.shape[1] * groups, weight.shape[0], 1, groups=groups, bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return made
