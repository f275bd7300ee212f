"""The factors of all adapters on one layer, stacked so that one product serves them all.

Ranks may differ: the rows of every A, and the columns of every B, stand one after another with their true ranks, so
nothing is padded in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.ops.reference import PLAIN, can_read
from lorakit.ops.stamps import Stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.ops.terms import Term


class Stack(NamedTuple):
    """Factors one below the other; the last row of both is zero, for whoever has no factor."""

    A: Tensor
    """(rows + 1, in): the A of each adapter in turn."""
    B: Tensor
    """(rows + 1, out): the transposed B of each adapter in turn."""


@dataclass(frozen=True, eq=False)
class Bank:
    """The adapters of one layer: their parameters, and copies of them stacked for the products.

    The parameters get the gradients. The copies are made when first needed, in each dtype once, and never change: make a
    new bank when `is_current` says so.

    Attributes:
        terms: the adapters; None for one that is not on this layer, whose samples get the base alone.
        ranks: the true rank of each; 0 for one that is not there.
        scalings: the scaling of each; empty where one of them must stay a tensor.
        shape: (out, in).
        is_plain: whether every factor is a plain tensor, every scaling a number, and every dropout below 1.
        has_dropout: whether any adapter has a dropout.
        has_bias: whether any adapter has a bias.
    """

    terms: tuple[Term | None, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    shape: tuple[int, int]
    is_plain: bool
    has_dropout: bool
    has_bias: bool
    _stamp: Stamp | None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def stack(terms: Sequence[Term | None]) -> Bank:
        """A bank of these adapters; at least one is there, and all that are have the same (out, in).

        Args:
            terms: one for each adapter that ids may name; ranks, dtypes, biases and dropouts may differ.
        """
        there = [term for term in terms if term is not None]
        assert len(there) > 0, "a bank of no adapters"
        shape = (there[0].B.shape[0], there[0].A.shape[1])
        for term in there:
            assert (term.B.shape[0], term.A.shape[1]) == shape, (
                f"{term.B.shape}, {term.A.shape} beside {shape}"
            )
        scalings = _numbers(terms)
        return Bank(
            tuple(terms),
            tuple([0 if term is None else term.A.shape[0] for term in terms]),
            scalings,
            shape,
            bool(scalings)
            and all(type(t.A) in PLAIN and type(t.B) in PLAIN and 0.0 <= t.dropout < 1.0 for t in there),
            any(term.dropout for term in there),
            any(term.bias is not None for term in there),
            _stamp(terms),
        )

    def is_current(self, terms: Sequence[Term | None] | None = None) -> bool:
        """Whether the bank still says what its parameters say: 0.1 us for each of them.

        Args:
            terms: what the bank is to hold; None asks only whether its own parameters were written to.
        """
        if terms is not None and not _same(self.terms, terms):
            return False
        return self._stamp is not None and self._stamp.holds()

    @property
    def first_rows(self) -> tuple[int, ...]:
        """Where in a stack each adapter begins, and the end."""
        first: tuple[int, ...] = self._once("first", lambda: (0, *accumulate(self.ranks)))
        return first

    def stacked(self, dtype: torch.dtype) -> Stack:
        """All factors in `dtype`, not differentiable."""
        stack: Stack = self._once(dtype, lambda: self._stack(dtype))
        return stack

    @torch.no_grad()
    def _stack(self, dtype: torch.dtype) -> Stack:
        there = [term for term in self.terms if term is not None]
        some = there[0].A
        A = [term.A.to(dtype) for term in there]
        B = [term.B.t().to(dtype) for term in there]
        zeros = [torch.zeros(1, width, dtype=dtype, device=some.device) for width in self.shape]
        return Stack(torch.cat([*A, zeros[1]]), torch.cat([*B, zeros[0]]))

    def select(self, adapters: tuple[int, ...], dtype: torch.dtype) -> Stack:
        """The factors of these adapters alone, one below the other, without the row of zeros.

        A copy is made where they are not neighbours, and the last one kept: a batch that is decoded asks for the same
        adapters at every step.
        """
        kept = self._made.get("selected")
        if kept is None or kept[0] != (adapters, dtype):
            kept = ((adapters, dtype), self._select(adapters, self.stacked(dtype)))
            self._made["selected"] = kept
        selected: Stack = kept[1]
        return selected

    def _select(self, adapters: tuple[int, ...], everything: Stack) -> Stack:
        first = self.first_rows
        start, stop = first[adapters[0]], first[adapters[-1] + 1]
        if stop - start == sum([self.ranks[i] for i in adapters]):
            return Stack(everything.A[start:stop], everything.B[start:stop])
        rows = [row for i in adapters for row in range(first[i], first[i + 1])]
        index = torch.tensor(rows, device=everything.A.device)
        return Stack(*[factor.index_select(0, index) for factor in everything])

    def on_device(self, name: str) -> Tensor:
        """`first_rows`, (count + 1,) int32, or `scalings`, (count,) float32, where the factors are."""
        dtype = torch.int32 if name == "first_rows" else torch.float32
        device = next(term.A.device for term in self.terms if term is not None)
        table: Tensor = self._once(
            name, lambda: torch.tensor(getattr(self, name), dtype=dtype, device=device)
        )
        return table

    def is_finite(self, dtype: torch.dtype) -> bool:
        """Whether no factor or scaling holds NaN or infinity; only then may one adapter's numbers meet another's."""
        finite: bool = self._once(("finite", dtype), lambda: self._is_finite(dtype))
        return finite

    def _is_finite(self, dtype: torch.dtype) -> bool:
        # a sum takes half the time of `aminmax`, and a twentieth of `isfinite().all()`
        wide = torch.promote_types(dtype, torch.float32)
        sums = [factor.sum(dtype=wide) for factor in self.stacked(dtype)]
        return all(math.isfinite(s) for s in self.scalings) and bool(torch.stack(sums).isfinite().all())

    def biases(self) -> Tensor:
        """(count + 1, out): scaling times bias of each adapter, zero for one that lacks it and in the last row."""
        biases: Tensor = self._once("biases", self._biases)
        return biases

    @torch.no_grad()
    def _biases(self) -> Tensor:
        some = next(term.bias for term in self.terms if term is not None and term.bias is not None)
        zero = torch.zeros_like(some)
        rows = [
            zero if term is None or term.bias is None else term.bias * scaling
            for term, scaling in zip(self.terms, self.scalings, strict=True)
        ]
        return torch.stack([*rows, zero])

    def _once(self, key: Any, make: Any) -> Any:
        made = self._made
        if key not in made:
            made[key] = make()
        return made[key]


def _same(ours: Sequence[Term | None], theirs: Sequence[Term | None]) -> bool:
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a is b:
            continue
        if a is None or b is None or a.dropout != b.dropout:
            return False
        if a.A is not b.A or a.B is not b.B or a.bias is not b.bias:
            return False
        if a.scaling is not b.scaling and (
            isinstance(a.scaling, torch.Tensor)
            or isinstance(b.scaling, torch.Tensor)
            or a.scaling != b.scaling
        ):
            return False
    return True


def _numbers(terms: Sequence[Term | None]) -> tuple[float, ...]:
    """The scalings as numbers; none at all if one of them must stay a tensor."""
    scalings = [0.0 if term is None else term.scaling for term in terms]
    if any(isinstance(scaling, torch.Tensor) for scaling in scalings) and (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not all(can_read(scaling) for scaling in scalings)
    ):
        return ()
    return tuple([float(scaling) for scaling in scalings])


def _stamp(terms: Sequence[Term | None]) -> Stamp | None:
    """The present state of every tensor; None where tensors have no such state."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    tensors = [t for term in terms if term is not None for t in term if isinstance(t, torch.Tensor)]
    return Stamp.of(tensors) if all(type(t) in PLAIN for t in tensors) else None
