"""Which weights to adapt, by their condition numbers (KappaTune, arXiv:2506.16289).

A weight with a small condition number is far from singular: it treats all directions alike, and holds little that a
change of rank r would overwrite.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm.auto import tqdm

from lorakit.api import find_inner
from lorakit.errors import ConfigError, UnsupportedError, at_path
from lorakit.layers.hooks import outside_autocast
from lorakit.ops.condition import singular_range
from lorakit.surgery import describe
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from lorakit.surgery import Description, Node

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Ends of the names that stacks of expert matrices have in transformers."""
_LEAST = 1e-8  # added to the smallest singular value: a part of the published definition


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The linear layers and the stacks of experts whose weights have the smallest condition numbers.

    The condition number is the largest singular value over the smallest one plus 1e-8, of a stack the mean over its
    matrices; good to 0.1 % and to the rounding of fp32 (`lorakit.ops.condition`). Quantised weights are read through
    their codec. One matrix is held in fp32 at a time. The same model gives the same answer.

    Args:
        model: any model; of one that carries adapters the base is looked at.
        top_p: the share to choose, in (0, 1]; at least one of each kind is chosen.
        max_dim_size_to_analyze: weights with a larger dimension are passed over.
        moe_param_suffixes: ends of the names of three-dimensional parameters to look at; None takes `EXPERTS`.
        show_progress: show a progress bar.

    Returns:
        "target_modules" and "target_parameters", best first, as `LoraConfig` takes them; the second is None where the
        model has no stacks of experts.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedError: there is no weight to look at, or it is on the meta device.
        NonFiniteError: a weight holds NaN or infinity.

    Warns:
        UserWarning: naming linear layers whose weight cannot be read.
    """
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise ConfigError(f"top_p: got {top_p!r}, wanted a number in (0, 1]")
    suffixes = EXPERTS if moe_param_suffixes is None else moe_param_suffixes
    if isinstance(suffixes, str) or not all(isinstance(suffix, str) for suffix in suffixes):
        raise ConfigError(f"moe_param_suffixes: got {suffixes!r}, wanted a tuple of texts")
    found = condition_numbers(
        model, limit=max_dim_size_to_analyze, suffixes=suffixes, show_progress=show_progress
    )
    return {
        "target_modules": _best(found.modules, top_p),
        "target_parameters": _best(found.parameters, top_p) or None,
    }


class ConditionNumbers(NamedTuple):
    """Condition numbers by path of the linear layer, and by name of the three-dimensional parameter."""

    modules: dict[str, float]
    parameters: dict[str, float]


class _Weight(NamedTuple):
    """One weight to look at: `read` gives its matrices one after another."""

    name: str
    is_stack: bool
    matrices: Callable[[], Iterator[Tensor]]


def condition_numbers(
    model: nn.Module, *, limit: int = 16384, suffixes: Sequence[str] = EXPERTS, show_progress: bool = True
) -> ConditionNumbers:
    """The condition number of every weight that `find_kappa_target_modules` chooses from, in the model's order.

    Args:
        model: any model; of one that carries adapters the base is looked at.
        limit: weights with a larger dimension are passed over.
        suffixes: ends of the names of three-dimensional parameters to look at.
        show_progress: show a progress bar.

    Raises:
        UnsupportedError, NonFiniteError: as `find_kappa_target_modules`.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"max_dim_size_to_analyze: got {limit!r}, wanted an integer >= 1")
    description = describe(find_inner(model))
    unread: list[str] = []
    weights = [*_linear(description, limit, unread), *_stacks(description, limit, tuple(suffixes))]
    found = ConditionNumbers({}, {})
    for weight in tqdm(weights, desc="condition numbers", unit="weight", disable=not show_progress):
        try:
            with at_path(weight.name):
                numbers = [_condition(matrix) for matrix in weight.matrices()]
        except UnsupportedError:  # a codec that knows no more than the shape
            unread.append(weight.name)
            continue
        kind = found.parameters if weight.is_stack else found.modules
        kind[weight.name] = sum(numbers) / len(numbers)
    if not (found.modules or found.parameters):
        raise UnsupportedError(
            f"this model has no linear layer and no stack of experts that can be read and is within {limit} in each "
            f"dimension (not readable: {unread or 'none'}); name the targets yourself"
        )
    if unread:
        warnings.warn(
            f"passed over, since their weights cannot be read: {unread}; name them yourself to adapt them",
            stacklevel=3,
        )
    return found


def _condition(matrix: Tensor) -> float:
    with outside_autocast(matrix.device):
        largest, smallest = singular_range(matrix)
    return largest / (smallest + _LEAST)


def _linear(description: Description, limit: int, unread: list[str]) -> Iterator[_Weight]:
    """The linear layers of some size; those that no codec owns are noted."""
    for node in description.nodes.values():
        if node.kind is None or not node.kind.is_linear:
            continue
        codec = find_codec(node.module) if node.layer is None else node.layer.codec
        if codec is None:
            unread.append(node.path)
        elif max(codec.layout(node.module).shape) <= limit:
            _check_loaded(node.path, (*node.module.parameters(), *node.module.buffers()))
            yield _Weight(node.path, is_stack=False, matrices=partial(_whole, node))


def _whole(node: Node) -> Iterator[Tensor]:
    codec = find_codec(node.module)
    if node.layer is not None:  # which knows the weight from before a merge
        yield node.layer.read_weight(torch.float32)
    elif codec is not None:
        yield codec.read(node.module, torch.float32)


def _stacks(description: Description, limit: int, suffixes: tuple[str, ...]) -> Iterator[_Weight]:
    """The three-dimensional parameters with such names."""
    for node in description.nodes.values():
        wrapped = {wrapper.parameter_name: wrapper.original_weight for wrapper in node.wrappers}
        for attribute, held in node.module.named_parameters(recurse=False):
            parameter = wrapped.get(attribute, held)
            name = f"{node.path}.{attribute}" if node.path else attribute
            if name.endswith(suffixes) and parameter.ndim == 3 and max(parameter.shape[1:]) <= limit:
                _check_loaded(name, [parameter])
                yield _Weight(name, is_stack=True, matrices=partial(_each, parameter))


def _each(stack: Tensor) -> Iterator[Tensor]:
    for matrix in stack.detach():
        yield matrix.to(torch.float32)


def _check_loaded(name: str, tensors: Sequence[Tensor]) -> None:
    if any(tensor.is_meta for tensor in tensors):
        raise UnsupportedError(f"{name}: its weight is on the meta device; load the model first")


def _best(numbers: dict[str, float], share: float) -> list[str]:
    order = sorted(numbers, key=lambda name: numbers[name])
    return order[: max(1, int(len(order) * share))]
