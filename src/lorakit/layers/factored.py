"""A stack of matrices plus low-rank changes, which the forward of its module may use as if it were the stack.

The dense change is built only where the module does something else with its parameter than select, transpose and
multiply. Experts of a mixture are used in just these ways, so their change stays factored: r·(in + out) numbers for an
expert, not in·out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class Change(NamedTuple):
    """A low-rank change of each matrix of a stack: `scaling * left @ right`."""

    left: Tensor
    """(..., rows, r)."""
    right: Tensor
    """(..., r, columns)."""
    scaling: float | Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(..., rows, columns), computed in the factors' own dtype."""
        return (self.left @ self.right * self.scaling).to(dtype)


class FactoredWeight:
    """`base + sum of changes`, (..., rows, columns), that is not built unless it must be.

    Args:
        base: the parameter itself.
        changes: low-rank changes of its shape; cast to the base's dtype where they are multiplied.
    """

    def __init__(self, base: Tensor, changes: Sequence[Change]) -> None:
        self.base, self.changes = base, tuple(changes)

    def dense(self) -> Tensor:
        """The sum as one tensor."""
        total = self.base
        for change in self.changes:
            total = total + change.dense(self.base.dtype)
        return total

    def __getitem__(self, index: Any) -> FactoredWeight | Tensor:
        """Select matrices of the stack, by one number or a tensor of them; anything else gives a dense tensor."""
        first = self.base.ndim == 3 and (
            isinstance(index, int) or (isinstance(index, torch.Tensor) and not index.is_floating_point())
        )
        if not first:
            return self.dense()[index]
        return FactoredWeight(
            self.base[index],
            [Change(left[index], right[index], scaling) for left, right, scaling in self.changes],
        )

    def transpose(self, one: int, other: int) -> FactoredWeight | Tensor:
        """Exchange rows and columns; other dimensions are exchanged in a dense tensor."""
        if {one % self.base.ndim, other % self.base.ndim} != {self.base.ndim - 2, self.base.ndim - 1}:
            return self.dense().transpose(one, other)
        return FactoredWeight(
            self.base.transpose(one, other), [Change(right.mT, left.mT, s) for left, right, s in self.changes]
        )

    def t(self) -> FactoredWeight | Tensor:
        """As `transpose` of a matrix."""
        return self.transpose(0, 1)

    @property
    def T(self) -> FactoredWeight | Tensor:  # noqa: N802 - torch's name
        """As `t`."""
        return self.t()

    @property
    def mT(self) -> FactoredWeight | Tensor:  # noqa: N802 - torch's name
        """Rows and columns exchanged."""
        return self.transpose(-2, -1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """`self @ other`."""
        return _matmul(self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """`other @ self`."""
        return _matmul(other, self)

    def __getattr__(self, name: str) -> Any:
        """What does not depend on the numbers is asked of the base; what does, of the dense sum."""
        if name.startswith("__") or name in {"base", "changes"}:
            raise AttributeError(name)
        return getattr(self.base if name in _SHAPE_ONLY else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Products stay factored, all other functions get the dense sum."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            return rule(*args, **kwargs)
        return func(*_made_dense(args), **{key: _made_dense([value])[0] for key, value in kwargs.items()})


_SHAPE_ONLY = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "size",
        "dim",
        "numel",
        "is_floating_point",
        "requires_grad",
        "is_cuda",
        "layout",
    }
)


def _made_dense(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, FactoredWeight):
            found.append(value.dense())
        elif isinstance(value, (list, tuple)) and any(isinstance(item, FactoredWeight) for item in value):
            found.append(type(value)(_made_dense(value)))
        else:
            found.append(value)
    return found


def _matmul(one: Any, other: Any) -> Tensor:
    """A product of which one side is factored; the change is multiplied from the side of the other."""
    if isinstance(other, FactoredWeight):
        x: Tensor = one.dense() if isinstance(one, FactoredWeight) else one
        y = x @ other.base
        for left, right, scaling in other.changes:
            y = y + (x @ left.to(x.dtype) * scaling).to(x.dtype) @ right.to(x.dtype)
        return y
    assert isinstance(one, FactoredWeight)
    found: Tensor = one.base @ other
    for left, right, scaling in one.changes:
        found = found + left.to(other.dtype) @ (right.to(other.dtype) @ other * scaling).to(other.dtype)
    return found


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - the names of torch's function
    if not isinstance(weight, FactoredWeight) or weight.base.ndim != 2:
        dense_input, dense_weight = _made_dense([input, weight])
        return linear(dense_input, dense_weight, bias)
    x = input
    y = linear(x, weight.base, bias)
    for left, right, scaling in weight.changes:
        y = y + linear((linear(x, right.to(x.dtype)) * scaling).to(x.dtype), left.to(x.dtype))
    return y


def _bmm(input: Any, mat2: Any) -> Tensor:  # noqa: A002
    return _matmul(input, mat2)


def _grouped_mm(
    mat_a: Tensor, mat_b: Any, *, offs: Tensor | None = None, bias: Tensor | None = None, **rest: Any
) -> Tensor:
    """X (tokens, in) sorted by matrix, times the stack (matrices, in, out), `offs` being where each matrix's end."""
    grouped = torch.nn.functional.grouped_mm
    y: Tensor = grouped(mat_a, mat_b.base, offs=offs, bias=bias, **rest)
    for left, right, scaling in mat_b.changes:
        h = grouped(mat_a, _aligned(left.to(mat_a.dtype), -1), offs=offs)
        y = y + grouped((h * scaling).to(mat_a.dtype), _aligned(right.to(mat_a.dtype), -2), offs=offs, **rest)
    return y


_ALIGNMENT = 16  # bytes: what grouped_mm wants each stride to be a multiple of


def _aligned(factor: Tensor, dim: int) -> Tensor:
    """A factor with zeros up to the next rank that `grouped_mm` takes, and dense strides."""
    step = _ALIGNMENT // factor.element_size()
    lacking = -factor.shape[dim] % step
    if lacking:
        shape = list(factor.shape)
        shape[dim] = lacking
        factor = torch.cat([factor, factor.new_zeros(shape)], dim=dim)
    return factor.contiguous()


_RULES: dict[Any, Callable[..., Any]] = {
    linear: _linear,
    torch.bmm: _bmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.__rmatmul__: lambda self, other: _matmul(other, self),
    torch.nn.functional.grouped_mm: _grouped_mm,
    torch._grouped_mm: _grouped_mm,
}
