"""Making layers and the small modules that hold their factors, without running torch's constructors.

A layer with an adapter takes seven modules, and a model has hundreds of layers. A constructor of torch takes 7
microseconds for an empty module, and each attribute set on one takes 2, since `nn.Module` looks at whatever is set.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


_M = TypeVar("_M", bound=nn.Module)

_START = dict(nn.Module().__dict__)
"""What a module begins with: flags, and empty containers, of which each module needs its own."""
_CONTAINERS = tuple(
    (kind, tuple(name for name, value in _START.items() if type(value) is kind))
    for kind in (dict, set, OrderedDict)
)
assert all(type(value) in {bool, type(None), dict, set, OrderedDict} for value in _START.values())


def begin(module: nn.Module) -> None:
    """Do what `nn.Module.__init__` does, at a fifth of its cost."""
    state = module.__dict__
    state.update(_START)
    for kind, names in _CONTAINERS:
        for name in names:
            state[name] = kind()


def bare(kind: type[_M]) -> _M:
    """A module of a class that adds nothing to what `nn.Module.__init__` makes, such as `nn.ModuleDict`."""
    made = kind.__new__(kind)
    begin(made)
    return made


def let_go(name: str, *holders: nn.ModuleDict | nn.ParameterDict) -> None:
    """Drop what is held under a name; an adapter that was put on only in part is not in all of them."""
    for holder in holders:
        if type(holder) is nn.ModuleDict:
            holder._modules.pop(name, None)
        elif name in holder:
            del holder[name]


def acting_rate(dropout: nn.Module) -> float:
    """The probability with which an adapter's dropout zeroes an element now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` that takes these very tensors as its parameters.

    They want no gradients until their adapter is active. The constructor of `nn.Linear` would allocate and fill a
    weight first: 20 times the cost of this.
    """
    linear = bare(nn.Linear)
    out_features, in_features = weight.shape
    state = linear.__dict__
    state["in_features"], state["out_features"] = in_features, out_features
    parameters = state["_parameters"]
    parameters["weight"], parameters["bias"] = _untrained(weight), None if bias is None else _untrained(bias)
    return linear


def _untrained(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


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
    made.weight = _untrained(weight)
    return made


def pointwise_conv(weight: Tensor, bias: Tensor | None, *, groups: int) -> Convolution:
    """The 1 x 1 convolution with `weight` (out, r / groups, 1, ...)."""
    kind = _CONVOLUTIONS[weight.ndim - 2]
    made = kind(weight.shape[1] * groups, weight.shape[0], 1, groups=groups, bias=False, device="meta")
    made.weight = _untrained(weight)
    made.register_parameter("bias", None if bias is None else _untrained(bias))
    return made
