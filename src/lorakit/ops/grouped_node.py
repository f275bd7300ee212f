"""The autograd node of a mixed batch: every sample through its own adapter, differentiable in all of them.

Guarantees, against training each adapter alone on its own samples:
- equal gradients, up to rounding: what one adapter or sample holds, NaN included, reaches no other adapter;
- an adapter that no sample goes through gets no gradient (and not one of zeros, by which an optimizer would move it);
- kept for backward are x itself, once, and `A x`, (rows, r); neither a sorted x, a dropped x, a mask, nor gathered
  factors: those are made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import UnsupportedError
from lorakit.ops.dropout import draw_dropped, draw_seeds, zero_, zeroed
from lorakit.ops.fused import _is_fresh
from lorakit.ops.grouped_compose import compose_terms
from lorakit.ops.grouped_costs import block_size
from lorakit.ops.grouped_paths import add_biases_, add_block_products_, alphas, block_factors, by_sample, take
from lorakit.ops.terms import Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.bank import Bank
    from lorakit.ops.grouped_paths import Alphas
    from lorakit.ops.groups import Blocks, Groups


class Call(NamedTuple):
    """What the forward and the backward of one call share beside tensors."""

    bank: Bank
    groups: Groups
    products: torch.dtype
    """The dtype of the operands of the matrix products."""
    size: int
    """Samples in a block."""
    dropouts: tuple[float, ...]
    """By adapter."""
    seed: int

    @staticmethod
    def of(bank: Bank, groups: Groups, tokens: int, products: torch.dtype) -> Call:
        """A call for samples of so many tokens; draws a seed if an adapter in use has a dropout."""
        dropouts = tuple([0.0 if term is None else term.dropout for term in bank.terms])
        dropping = any(dropouts[i] for i in groups.used)
        seed = draw_seeds(1)[0] if dropping else 0
        return Call(bank, groups, products, block_size(bank, groups, tokens), dropouts, seed)

    @property
    def alphas(self) -> Alphas:
        """The scaling of each block with dropout's `1 / (1 - p)` folded in."""
        scalings = tuple([s / (1.0 - p) for s, p in zip(self.bank.scalings, self.dropouts, strict=True)])
        return alphas(self.groups, scalings, self.size, self.products)

    def dropped(self, shape: Sequence[int]) -> Tensor | None:
        """What the dropouts take from an x of (N, S, in), the same at every call; None without dropout."""
        groups = self.groups
        found = {self.dropouts[i] for i in groups.used}
        if not any(found):
            return None
        device, count = groups.ids.device, shape[0] * shape[1] * shape[2]
        if len(found) == 1:  # what it takes from a sample of the base alone nobody reads
            return draw_dropped(count, found.pop(), self.seed, device)
        return _draw_kept(
            shape, [self.dropouts[i] if i >= 0 else 0.0 for i in groups.samples], self.seed, device
        )


def _draw_kept(shape: Sequence[int], dropouts: Sequence[float], seed: int, device: torch.device) -> Tensor:
    """Which elements of (N, S, in) are kept when each sample has its own probability; bool, met to 2**-31."""
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty(tuple(shape), dtype=torch.int32, device=device).random_(
        generator=generator
    )  # 0 to 2**31 - 1
    limits = torch.tensor([round(p * 2**31) for p in dropouts], dtype=torch.int64, device=device)
    return words >= limits.view(-1, 1, 1)


def used_tensors(bank: Bank, groups: Groups) -> list[Tensor | None]:
    """(A, B, bias) of each adapter that a sample goes through and that is there."""
    return [tensor for term in _used_terms(bank, groups) for tensor in term[:3]]


def _used_terms(bank: Bank, groups: Groups) -> list[Term]:
    return [term for term in [bank.terms[i] for i in groups.used] if term is not None]


class LoraGrouped(torch.autograd.Function):
    """The node of `lora_grouped`; its tensors are `used_tensors`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: Call, *flat: Tensor | None) -> Tensor:
        """Add into y, or into a copy of it where it is not fresh."""
        if _is_fresh(y, x):
            ctx.mark_dirty(y)
            out = y
        else:
            out = y.clone(memory_format=torch.contiguous_format)
        needs = ctx.needs_input_grad[3:]
        h = add_by_blocks(out, x, call)
        ctx.call = call
        ctx.x_shape, ctx.x_dtype, ctx.device_type = x.shape, x.dtype, x.device.type
        ctx.save_for_backward(x if any(needs[0::3]) else None, h if any(needs[1::3]) else None, *flat)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of y, x and the factors."""
        need_y = ctx.needs_input_grad[0]
        if torch.is_grad_enabled():
            grads = _differentiable(ctx, dy)
        elif torch.is_autocast_enabled(ctx.device_type):
            with torch.autocast(ctx.device_type, enabled=False):
                grads = _gradients(ctx, dy)
        else:
            grads = _gradients(ctx, dy)
        return (dy if need_y else None, grads[0], None, *grads[1:])


def add_by_blocks(out: Tensor, x: Tensor, call: Call) -> Tensor:
    """Add the adapters into `out`; returns `A drop(x)` by blocks, (blocks, size * S, r), zero where repeated."""
    bank, groups = call.bank, call.groups
    x3 = by_sample(x, call.products)
    out3 = out.view(*x3.shape[:2], out.shape[-1])
    blocks = groups.blocks(call.size)
    A, B = block_factors(bank, groups, call.size, call.products)
    dropped = call.dropped(x3.shape)
    h = torch.bmm(take(blocks, x3 if dropped is None else zeroed(x3, dropped)), A.transpose(1, 2))
    _zero_repeated_(h, blocks)
    add_block_products_(out3, h, B, blocks, call.alphas)
    add_biases_(out3, bank, groups)
    return h


def _zero_repeated_(h: Tensor, blocks: Blocks) -> None:
    """Set to zero, in (blocks, size * S, r), what belongs to a sample that stands there again to fill its block."""
    if blocks.real is not None:
        h.view(len(blocks.real), -1).masked_fill_(~blocks.real.unsqueeze(1), 0)


def _gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The gradients of x and of every tensor in `used_tensors`."""
    call: Call = ctx.call
    bank, groups = call.bank, call.groups
    x, h, *flat = ctx.saved_tensors
    need_x, _, *needs = ctx.needs_input_grad[1:]
    blocks = groups.blocks(call.size)
    A, B = block_factors(bank, groups, call.size, call.products)
    alpha = call.alphas
    dy3 = by_sample(dy, call.products)
    by_block = take(blocks, dy3)
    dA = dB = dx = None
    if need_x or x is not None:
        x_shape = (*dy3.shape[:2], A.shape[-1])
        dropped = call.dropped(x_shape)
        dh = alpha.times(torch.bmm(by_block, B.transpose(1, 2)))
        _zero_repeated_(dh, blocks)
        if x is not None:
            x3 = by_sample(x, call.products)
            x_blocks = take(blocks, x3 if dropped is None else zeroed(x3, dropped))
            dA = _sum_by_adapter(torch.bmm(dh.transpose(1, 2), x_blocks), blocks, groups)
        if need_x:
            dx = _input_gradient(torch.bmm(dh, A), blocks, x_shape)
            dx = (dx if dropped is None else zero_(dx, dropped)).to(ctx.x_dtype).view(ctx.x_shape)
    if h is not None:
        dB = _sum_by_adapter(torch.bmm(alpha.times(h).transpose(1, 2), by_block), blocks, groups)
    dbias = _bias_gradients(dy3, bank, groups) if any(needs[2::3]) else None
    return [dx, *_split(flat, needs, bank, groups, sums=(dA, dB, dbias))]


def _input_gradient(placed: Tensor, blocks: Blocks, shape: Sequence[int]) -> Tensor:
    """(blocks, size * S, in) -> (N, S, in), contiguous; zero for samples of the base alone."""
    if blocks.take is None:
        return placed.view(*shape)
    assert blocks.back is not None
    own = placed.view(len(blocks.owners) * blocks.size, *shape[1:]).index_select(0, blocks.back)
    if blocks.active is None:
        return own
    return own.new_zeros(*shape).index_copy_(0, blocks.active, own)


def _sum_by_adapter(parts: Tensor, blocks: Blocks, groups: Groups) -> Tensor:
    """(blocks, r, features) -> (adapters in use, r, features); several parts are summed in float32 at least."""
    if blocks.owners == groups.used:
        return parts
    wide = torch.promote_types(parts.dtype, torch.float32)
    index = groups.once(("sum", blocks.size), lambda: _positions(blocks, groups))
    total = torch.zeros(len(groups.used) + 1, *parts.shape[1:], dtype=wide, device=parts.device)
    return total.index_add_(0, index, parts.to(wide))


def _positions(blocks: Blocks, groups: Groups) -> Tensor:
    """Where in `used` the adapter of each block stands, (blocks,) int64; after the last for base alone."""
    place = {adapter: at for at, adapter in enumerate(groups.used)}
    return torch.tensor([place.get(i, len(place)) for i in blocks.owners], device=blocks.owner.device)


def _bias_gradients(dy: Tensor, bank: Bank, groups: Groups) -> Tensor:
    """(adapters in use + 1, out): scaling times the sum of dy over the samples of each adapter."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    sums = dy.sum(dim=1, dtype=wide)
    single = groups.blocks(1)
    index = groups.once(("sum", 1), lambda: _positions(single, groups))
    total = torch.zeros(len(groups.used) + 1, dy.shape[-1], dtype=wide, device=dy.device)
    total.index_add_(0, index, sums)
    for at, adapter in enumerate(groups.used):
        total[at] *= bank.scalings[adapter]
    return total


def _split(
    flat: Sequence[Tensor | None],
    needs: Sequence[bool],
    bank: Bank,
    groups: Groups,
    *,
    sums: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """The rows of each adapter out of the summed gradients, in the shape and dtype of its tensors."""
    dA, dB, dbias = sums
    grads: list[Tensor | None] = []
    there = [(at, bank.ranks[i]) for at, i in enumerate(groups.used) if bank.terms[i] is not None]
    for k, (at, rank) in enumerate(there):
        own = (
            None if dA is None else dA[at, :rank],
            None if dB is None else dB[at, :rank].t(),
            None if dbias is None else dbias[at],
        )
        for gradient, tensor, need in zip(
            own, flat[3 * k : 3 * k + 3], needs[3 * k : 3 * k + 3], strict=True
        ):
            wanted = gradient if need else None
            grads.append(None if wanted is None or tensor is None else wanted.to(tensor.dtype))
    return grads


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The same gradients as functions of dy, x and the factors: those of the composition, with the dropout drawn again."""
    call: Call = ctx.call
    x, _, *flat = ctx.saved_tensors
    bank, groups = call.bank, call.groups
    if x is None:
        if any(ctx.needs_input_grad[4::3]):
            raise UnsupportedError(
                "second backward through a mixed batch: every lora_A in use is frozen and a lora_B is not, so the layer "
                "did not keep its input, which the second derivative needs; let a lora_A require a gradient, or freeze "
                "every lora_B"
            )
        # with all factors frozen the output is linear in x: any x has the same derivative
        x = dy.new_zeros(ctx.x_shape, dtype=ctx.x_dtype, requires_grad=True)
    terms: list[Term | None] = [None] * groups.count
    there = [i for i in groups.used if bank.terms[i] is not None]
    for k, i in enumerate(there):
        A, B, bias = flat[3 * k : 3 * k + 3]
        assert A is not None
        assert B is not None
        terms[i] = Term(A, B, bias, bank.scalings[i], 0.0)
    with torch.autocast(ctx.device_type, enabled=False):
        x3 = by_sample(x, call.products)
        delta = compose_terms(x3, groups.ids, terms, scale=_scale(call, x3))
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        wanted = [t for t, need in zip([x, *flat], needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(delta, wanted, dy.reshape(delta.shape).to(delta.dtype), create_graph=True)
        )
    return [next(found) if need else None for need in needs]


def _scale(call: Call, x: Tensor) -> Tensor | None:
    """What dropout multiplied x with, (N, S, in)."""
    dropped = call.dropped(x.shape)
    if dropped is None:
        return None
    kept = zeroed(torch.ones_like(x), dropped)
    shares = [1.0 / (1.0 - call.dropouts[i]) if i >= 0 else 1.0 for i in call.groups.samples]
    return kept * x.new_tensor(shares).view(-1, 1, 1)
