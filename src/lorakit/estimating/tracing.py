"""One training step on meta tensors, and how many bytes are alive at its worst moment.

The real code of the model and of the adapters runs, forward and backward, with shapes in the place of numbers. So what
is counted is what a step allocates: what layers keep for backward, each storage once, what gradient checkpointing
computes again, and temporaries. Two functions would run otherwise without a device than on one, and are put right:
attention, which keeps its inputs and output and one number a row (FlashAttention, arXiv:2205.14135) and no matrix of
scores; and dropout, which keeps one byte an element.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.ops.reference import nodes_on_meta

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


_NOTHING_KEPT = (False, False)  # retain_graph and create_graph


@dataclass
class Peak:
    """Bytes alive at the worst moment of a step, without parameters and their gradients.

    Attributes:
        wide: in tensors whose last dimension is the vocabulary: logits, their logarithms and gradients.
        rest: in all others.
    """

    wide: int = 0
    rest: int = 0


def trace_step(model: nn.Module, inputs: Mapping[str, Tensor], vocabulary: int) -> Peak:
    """Run one step on meta tensors.

    Args:
        model: of transformers, on the meta device, in train mode.
        inputs: its arguments, on the meta device.
        vocabulary: the last dimension of what counts as logits.

    Raises:
        NotImplementedError, RuntimeError: the model asks for a number that a tensor without data does not have.
    """
    tracker = _Tracker(vocabulary)
    handles = [
        parameter.register_post_accumulate_grad_hook(tracker.set_aside)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with ExitStack() as stack:
            for context in (nodes_on_meta(), _AsOnDevice(), tracker):
                stack.enter_context(context)
            loss = _loss(model(**inputs))  # as Trainer does, which lets go of the logits before the backward
            _backward(loss)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return tracker.peak


def _loss(output: Any) -> Tensor:
    """A model's own loss; of one that has none the mean of what it gives."""
    found: Tensor | None = output.get("loss")
    return output[0].mean() if found is None else found


def _backward(loss: Tensor) -> None:
    """`torch.autograd.backward`, which would leave `_AsOnDevice` for as long as it runs."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), *_NOTHING_KEPT, (), allow_unreachable=True, accumulate_grad=True
    )


@dataclass
class _Live:
    """The storages that are alive, by identity: bytes, and whether they are as wide as the vocabulary."""

    sizes: dict[int, tuple[int, bool]] = field(default_factory=dict)
    wide: int = 0
    rest: int = 0

    def add(self, key: int, size: int, *, wide: bool) -> None:
        self.sizes[key] = (size, wide)
        self._count(size, wide=wide)

    def drop(self, key: int) -> None:
        size, wide = self.sizes.pop(key, (0, False))
        self._count(-size, wide=wide)

    def _count(self, size: int, *, wide: bool) -> None:
        if wide:
            self.wide += size
        else:
            self.rest += size


class _Tracker(TorchDispatchMode):
    """Counts the storages that operations make, until nobody holds them any more."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self._live = _Live()
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self.peak = Peak()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # models ask whether nothing is padded, and whether nothing is packed
        if func is torch.ops.aten._grouped_mm.default:
            output = _grouped_product(*args, **(kwargs or {}))
            self._note(output, _storage(output))
            return output
        given = {id(storage) for storage in map(_storage, _tensors((args, kwargs or {})))}
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = _storage(tensor)
            if id(storage) not in given and storage not in self._known:
                self._note(tensor, storage)
        return output

    def _note(self, tensor: Tensor, storage: Any) -> None:
        key = id(storage)
        self._known[storage] = None
        self._live.add(key, storage.nbytes(), wide=tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary)
        weakref.finalize(storage, self._live.drop, key)
        if self._live.wide + self._live.rest > self.peak.wide + self.peak.rest:
            self.peak = Peak(self._live.wide, self._live.rest)

    def set_aside(self, parameter: Tensor) -> None:
        """A gradient of a parameter is no activation."""
        if parameter.grad is not None:
            self._live.drop(id(_storage(parameter.grad)))


def _grouped_product(
    a: Tensor, b: Tensor, offsets: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """What `torch._grouped_mm` gives; its own kernel for meta tensors knows but one dtype, and no small ranks."""
    del bias
    groups = [] if a.dim() != b.dim() else [a.shape[0] if offsets is None else len(offsets)]
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _AsOnDevice(TorchFunctionMode):
    """Attention and dropout as they run on a device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (
                *args,
                *(options[name] for name in ("query", "key", "value") if name in options),
            )[:3]
            return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **options)
        return func(*args, **options)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001 - torch's signature
    return torch.native_dropout(input, p, train=True)[0] if training and p else input


class _Attention(torch.autograd.Function):
    """Attention without a matrix of scores: keeps q, k, v, the output, and one fp32 number for each row of q."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        samples, heads, tokens, _ = query.shape
        out = query.new_empty((samples, tokens, heads, value.shape[-1])).transpose(
            1, 2
        )  # as kernels lay it out
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_rest = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
