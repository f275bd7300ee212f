"""The factors of a stack of matrices, laid out for products, and the grouped product with them.

Files and optimisers see A as (r·matrices, in), matrix by matrix, and B as (out, r·matrices), rank by rank. Products want
(matrices, r, features). For A that is a view. For B it is a transposition, done on the whole stack at once: torch
transposes a plain matrix blockwise, 4 MiB in 1.5 ms, where permuting three dimensions takes 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.ops import Term
from lorakit.ops.reference import must_compose
from lorakit.ops.stamps import Stamp

if TYPE_CHECKING:
    from torch import Tensor

grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
"""Torch's product of sorted rows with a stack of matrices; None in a torch that has none."""

_ALIGNMENT = 16  # bytes: what `grouped_mm` wants each stride to be a multiple of


class Arrangement(NamedTuple):
    """How a factor is stored.

    Attributes:
        matrices: how many factors are stacked; 0 for a single one.
        by_rank: stored as B is, (features, r·matrices) rank by rank; else as A is, (r·matrices, features).
    """

    matrices: int
    by_rank: bool

    def rows(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """(matrices, r, features), or (r, features) of a single one; differentiable. Views where nothing is cast."""
        factor = stored.to(dtype)
        if not self.matrices:
            return factor.t() if self.by_rank else factor
        if not self.by_rank:
            return factor.view(self.matrices, -1, factor.shape[-1])
        return factor.t().contiguous().view(-1, self.matrices, factor.shape[0]).transpose(0, 1)

    def rank(self, stored: Tensor) -> int:
        """The rank of one matrix."""
        return stored.shape[1 if self.by_rank else 0] // max(self.matrices, 1)

    def gradient(self, rows: Tensor, stored: Tensor) -> Tensor:
        """The gradient of `stored`, given that of its aligned `rows`; for a stack."""
        rows = rows[:, : self.rank(stored)]
        if self.by_rank:
            return rows.transpose(0, 1).reshape(-1, rows.shape[-1]).t().to(stored.dtype)
        return rows.reshape(stored.shape).to(stored.dtype)


class Stack:
    """One factor of each matrix, as it is stored, arranged when a product asks for it.

    Arranging is done once for each dtype. A stack of factors that nobody trains may be kept from call to call.

    Args:
        factor: as stored.
        arrangement: how it is stored.
    """

    def __init__(self, factor: Tensor, arrangement: Arrangement) -> None:
        self.factor, self.arrangement = factor, arrangement
        self._made: dict[tuple[str, torch.dtype, bool], Any] = {}

    @property
    def trained(self) -> bool:
        """Whether gradients of the factor are recorded now."""
        return self.factor.requires_grad and torch.is_grad_enabled()

    def rows(self, dtype: torch.dtype) -> Tensor:
        """(matrices, r, features), or (r, features); differentiable."""
        key = ("rows", dtype, torch.is_grad_enabled())
        if key not in self._made:
            self._made[key] = self.arrangement.rows(self.factor, dtype)
        rows: Tensor = self._made[key]
        return rows

    def one(self, index: int, dtype: torch.dtype) -> Stack:
        """The factor of one matrix, (r, features).

        All are cut out at once: cut one by one, each would get a gradient as large as the stack.
        """
        key = ("each", dtype, torch.is_grad_enabled())
        if key not in self._made:
            self._made[key] = self.rows(dtype).unbind(0)
        return Stack(self._made[key][index], SINGLE)

    def some(self, indices: Tensor, dtype: torch.dtype) -> Stack:
        """The factors of the matrices of a vector of numbers, (numbers, r, features)."""
        rows = self.rows(dtype)
        return Stack(rows.index_select(0, indices.remainder(rows.shape[0])), SINGLE)

    def aligned(self, dtype: torch.dtype) -> Tensor:
        """As `rows`, with zeros up to the next rank that `grouped_mm` takes."""
        key = ("aligned", dtype, torch.is_grad_enabled())
        if key not in self._made:
            self._made[key] = aligned(self.rows(dtype))
        rows: Tensor = self._made[key]
        return rows


SINGLE = Arrangement(0, by_rank=False)


class StackKeeper:
    """Keeps arranged factors from call to call, while nobody trains or changes them."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Stamp, Stack]] = {}

    def stack(self, key: str, factor: Tensor, arrangement: Arrangement) -> Stack:
        """The stack of a factor, new or kept under a key."""
        trained = factor.requires_grad and torch.is_grad_enabled()
        changes = trained or torch.compiler.is_compiling() or type(factor) is not torch.nn.Parameter
        if (
            changes or factor.is_inference()
        ):  # last: torch.compile cannot ask it, and torch counts no writes there
            self._kept.pop(key, None)
            return Stack(factor, arrangement)
        kept = self._kept.get(key)
        if kept is not None and kept[1].factor is factor and kept[0].holds():
            return kept[1]
        made = Stack(factor, arrangement)
        self._kept[key] = (Stamp.of([factor]), made)
        return made

    def clear(self) -> None:
        """Let everything go."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[StackKeeper], tuple[()]]:
        return StackKeeper, ()  # copies and pickles of a layer begin without any


def aligned(rows: Tensor) -> Tensor:
    """(matrices, r, features) with zeros up to the next rank that `grouped_mm` takes."""
    lacking = -rows.shape[1] % (_ALIGNMENT // rows.element_size())
    return torch.nn.functional.pad(rows, (0, 0, 0, lacking)) if lacking else rows


def is_aligned(features: int, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes rows of so many features."""
    return features * dtype.itemsize % _ALIGNMENT == 0


def grouped_add(
    y: Tensor, x: Tensor, shrink: Stack, expand: Stack, scaling: float | Tensor, offs: Tensor
) -> Tensor:
    """`y + scaling · x shrink^T expand`, each row of x with the factors of its own matrix.

    Trained factors and `x shrink^T`, (tokens, r), are all that is kept for backward beside x; the factors are arranged
    once more there.

    Args:
        y: (tokens, out), of x's dtype. Given away: the sum is written into it.
        x: (tokens, in), sorted by matrix.
        shrink: (matrices, r, in).
        expand: (matrices, r, out).
        scaling: of the adapter.
        offs: (matrices,) int32, where each matrix's rows of x end. Rows behind the last are left undefined.
    """
    if not (shrink.trained or expand.trained) or must_compose(x, [_as_term(shrink, expand)]):
        h = grouped_mm(x, shrink.aligned(x.dtype).mT, offs=offs) * scaling
        part = grouped_mm(h.to(x.dtype), expand.aligned(x.dtype), offs=offs)
        return y + part if torch.is_grad_enabled() else y.add_(part)
    call = _Call(shrink.arrangement, expand.arrangement, scaling)
    added: Tensor = _GroupedAdd.apply(y, x, shrink.factor, expand.factor, offs, call)  # type: ignore[no-untyped-call]
    return added


class _Call(NamedTuple):
    shrink: Arrangement
    expand: Arrangement
    scaling: float | Tensor

    def hidden(self, x: Tensor, rows: Tensor, offs: Tensor) -> Tensor:
        """(tokens, r), scaled."""
        h: Tensor = grouped_mm(x, rows.mT, offs=offs)
        return (h * self.scaling).to(x.dtype)


class _GroupedAdd(torch.autograd.Function):
    """The node of `grouped_add`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, shrink: Tensor, expand: Tensor, offs: Tensor, call: _Call
    ) -> Tensor:
        h = call.hidden(x, aligned(call.shrink.rows(shrink, x.dtype)), offs)
        y.add_(grouped_mm(h, aligned(call.expand.rows(expand, x.dtype)), offs=offs))
        ctx.mark_dirty(y)
        ctx.call = call
        ctx.save_for_backward(x, shrink, expand, offs, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shrink, expand, offs, h = ctx.saved_tensors
        call: _Call = ctx.call
        need_y, need_x, need_shrink, need_expand, *_ = ctx.needs_input_grad
        g = dy.contiguous()
        one = aligned(call.shrink.rows(shrink, x.dtype))
        two = aligned(call.expand.rows(expand, x.dtype))
        dh = (grouped_mm(g, two.mT, offs=offs) * call.scaling).to(x.dtype)
        dx = grouped_mm(dh, one, offs=offs) if need_x else None
        d_shrink = d_expand = None
        if need_shrink:
            d_shrink = call.shrink.gradient(grouped_mm(dh.t(), x, offs=offs), shrink)
        if need_expand:
            if torch.is_grad_enabled():  # a second backward goes through h
                h = call.hidden(x, one, offs)
            d_expand = call.expand.gradient(grouped_mm(h.t(), g, offs=offs), expand)
        return (dy if need_y else None, dx, d_shrink, d_expand, None, None)


def _as_term(shrink: Stack, expand: Stack) -> Term:
    return Term(shrink.factor, expand.factor, None, 1.0, 0.0)
