"""A parameter plus low-rank changes, which the forward of its module may use as if it were the parameter.

The dense change is built only where the module does something else with its parameter than select, transpose and
multiply. Experts of a mixture are used in just these ways, so their change stays factored: r·(in + out) numbers for an
expert, not in·out.

It is no tensor: `isinstance(w, torch.Tensor)` and `torch.is_tensor(w)` say no, and code that takes a tensor's memory
without asking torch (a kernel) fails loudly instead of computing without the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear

from lorakit.errors import UnsupportedError
from lorakit.layers import stacks
from lorakit.layers.hooks import outside_autocast
from lorakit.layers.stacks import Stack, grouped_add, is_aligned
from lorakit.ops import Term, lora_linear
from lorakit.ops.terms import emulated_dtypes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor


class Change(NamedTuple):
    """A low-rank change of a matrix, or of each of a stack: `scaling · left^T right`."""

    left: Stack
    """(..., r, rows)."""
    right: Stack
    """(..., r, columns)."""
    scaling: float | Tensor

    def added_to(self, weight: Tensor) -> Tensor:
        """`weight` plus the change, computed in the dtype of the weight; where a CPU emulates that, in float32."""
        emulated = weight.device.type == "cpu" and weight.dtype in emulated_dtypes()
        dtype = torch.float32 if emulated else weight.dtype
        left, right = self.left.rows(dtype), self.right.rows(dtype)
        add: Callable[..., Tensor] = torch.addmm if weight.ndim == 2 else torch.baddbmm
        with outside_autocast(weight.device):
            if isinstance(self.scaling, torch.Tensor):
                return add(weight.to(dtype), left.mT, right * self.scaling.to(dtype)).to(weight.dtype)
            return add(weight.to(dtype), left.mT, right, alpha=self.scaling).to(weight.dtype)


class FactoredWeight:
    """`base + sum of changes`, (..., rows, columns), that is not built unless it must be.

    Args:
        base: the parameter itself.
        changes: low-rank changes of its shape; cast to the dtype of the product where they are multiplied.
    """

    def __init__(self, base: Tensor, changes: Sequence[Change]) -> None:
        self.base, self.changes = base, tuple(changes)
        self._dense: dict[bool, Tensor] = {}

    def dense(self) -> Tensor:
        """The sum as one tensor, built when first asked for."""
        graded = torch.is_grad_enabled()
        if graded not in self._dense:
            total = self.base
            for change in self.changes:
                total = change.added_to(total)
            self._dense[graded] = total
        return self._dense[graded]

    # ---- selecting and transposing ----------------------------------------------------------------------

    def __getitem__(self, index: Any) -> FactoredWeight | Tensor:
        """Select one matrix of the stack by a number, or some by a vector of numbers; else from the dense sum."""
        dtype = _product_dtype(self.base)
        if self.base.ndim == 3 and _is_number(index):
            matrix, number = self.base[index], int(index)
            chosen = [
                Change(left.one(number, dtype), right.one(number, dtype), s)
                for left, right, s in self.changes
            ]
            return FactoredWeight(matrix, chosen)
        if self.base.ndim == 3 and _is_vector_of_numbers(index):
            return FactoredWeight(
                self.base[index],
                [
                    Change(left.some(index, dtype), right.some(index, dtype), s)
                    for left, right, s in self.changes
                ],
            )
        return self.dense()[index]

    def __iter__(self) -> Iterator[FactoredWeight | Tensor]:
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self.base)

    def transpose(self, one: int, other: int) -> FactoredWeight | Tensor:
        """Exchange rows and columns; other dimensions are exchanged in a dense tensor."""
        if {one % self.base.ndim, other % self.base.ndim} != {self.base.ndim - 2, self.base.ndim - 1}:
            return self.dense().transpose(one, other)
        return FactoredWeight(self.base.mT, [Change(right, left, s) for left, right, s in self.changes])

    def t(self) -> FactoredWeight | Tensor:
        """As `transpose` of a matrix."""
        return self.transpose(0, 1) if self.base.ndim == 2 else self.dense().t()

    @property
    def T(self) -> FactoredWeight | Tensor:  # noqa: N802 - torch's name
        """As `t`."""
        return self.t() if self.base.ndim == 2 else self.dense().T

    @property
    def mT(self) -> FactoredWeight | Tensor:  # noqa: N802 - torch's name
        """Rows and columns exchanged."""
        return self.transpose(-2, -1)

    # ---- multiplying ------------------------------------------------------------------------------------

    def __matmul__(self, other: Tensor) -> Tensor:
        return _matmul(self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _matmul(other, self)

    # ---- all the rest -----------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach the parameter or a change of it."""
        tensors = [self.base, *(stack.factor for change in self.changes for stack in change[:2])]
        return any(tensor.requires_grad for tensor in tensors)

    def __getattr__(self, name: str) -> Any:
        """What does not depend on the numbers is asked of the base; what does, of the dense sum."""
        if name.startswith("_") or name in {"base", "changes"}:
            raise AttributeError(name)
        if name in _SHAPE_ONLY:
            return getattr(self.base, name)
        if name == "data" or _writes(name):
            raise UnsupportedError(_NO_WRITING.format(name))
        return getattr(self.dense(), name)

    def __repr__(self) -> str:
        shape = tuple(self.base.shape)
        return f"FactoredWeight(shape={shape}, dtype={self.base.dtype}, changes={len(self.changes)})"

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
        name = getattr(func, "__name__", "")
        first = next(iter((*args, *kwargs.values())), None)
        writes_first = isinstance(first, FactoredWeight) and (_writes(name) or kwargs.get("inplace"))
        if writes_first or isinstance(kwargs.get("out"), FactoredWeight):
            raise UnsupportedError(_NO_WRITING.format(name))
        return func(*_made_dense(args), **{key: _made_dense([value])[0] for key, value in kwargs.items()})


_SHAPE_ONLY = frozenset(
    {
        *(
            "shape",
            "size",
            "ndim",
            "dim",
            "ndimension",
            "numel",
            "nelement",
            "stride",
            "layout",
            "is_contiguous",
        ),
        *("dtype", "itemsize", "nbytes", "element_size", "is_floating_point", "is_complex", "is_quantized"),
        *("device", "get_device", "is_cpu", "is_cuda", "is_meta", "is_sparse"),
    }
)
_NO_WRITING = (
    "{} would write into a parameter plus its adapters, which exists only for this call; write into the module's own "
    "parameter, or compute a new tensor"
)


def _writes(name: str) -> bool:
    """Whether torch's naming says that a function writes into its first argument."""
    inplace_operator = (
        name.startswith("__i") and name.endswith("__") and name not in {"__invert__", "__index__", "__int__"}
    )
    return inplace_operator or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _operator(name: str) -> Callable[..., Any]:
    def call(self: FactoredWeight, *others: Any) -> Any:
        return getattr(self.dense(), name)(*_made_dense(others))

    return call


def _refused(name: str) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise UnsupportedError(_NO_WRITING.format(name))

    return call


_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow"),
    *("floordiv", "rfloordiv", "mod", "rmod", "neg", "pos", "abs"),
    *("lt", "le", "gt", "ge", "eq", "ne", "contains", "bool", "float", "int", "array"),
)
for _name in _OPERATORS:
    setattr(FactoredWeight, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "setitem"):
    setattr(FactoredWeight, f"__{_name}__", _refused(f"__{_name}__"))


def _is_number(index: Any) -> bool:
    if isinstance(index, torch.Tensor):
        return index.ndim == 0 and index.dtype in {torch.int64, torch.int32}
    return isinstance(index, int) and not isinstance(index, bool)


def _is_vector_of_numbers(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.ndim == 1 and index.dtype in {torch.int64, torch.int32}


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: its dtype, or autocast's."""
    kind = weight.device.type
    known = torch.amp.is_autocast_available(kind)  # not of a meta device
    if weight.dtype != torch.float64 and known and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


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
    if isinstance(one, FactoredWeight) and isinstance(other, FactoredWeight):
        other = other.dense()
    if isinstance(one, FactoredWeight):
        found: Tensor = one.base @ other
        for left, right, scaling in one.changes:
            h = right.rows(other.dtype) @ other * scaling
            found = _plus_product(found, left.rows(other.dtype).mT, h.to(other.dtype))
        return found
    if other.base.ndim == 2:
        return _times_matrix(one, other.mT, None)
    y: Tensor = one @ other.base
    for left, right, scaling in other.changes:
        h = one @ left.rows(one.dtype).mT * scaling
        y = _plus_product(y, h.to(one.dtype), right.rows(one.dtype))
    return y


def _plus_product(y: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`y + one @ other`; y is (..., m, n)."""
    if y.ndim == one.ndim == other.ndim == 3:
        return torch.baddbmm(y, one, other)
    return y + one @ other


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:  # noqa: A002 - the names of torch's function
    if isinstance(weight, FactoredWeight) and weight.base.ndim == 2 and _all_dense(input, bias):
        return _times_matrix(input, weight, bias)
    return linear(*_made_dense([input, weight, bias]))


def _all_dense(*values: Any) -> bool:
    return not any(isinstance(value, FactoredWeight) for value in values)


def _times_matrix(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias`, the base and its changes in one node where torch lets one."""
    terms = [
        Term(right.rows(right.factor.dtype), left.rows(left.factor.dtype).t(), None, scaling, 0.0)
        for left, right, scaling in weight.changes
    ]
    return lora_linear(x, weight.base, bias, terms)


def _bmm(input: Any, mat2: Any) -> Tensor:  # noqa: A002
    return _matmul(input, mat2)


def _grouped_mm(mat_a: Any, mat_b: Any, *, offs: Tensor | None = None, **rest: Any) -> Tensor:
    """X (tokens, in) sorted by matrix, times the stack (matrices, in, out), `offs` being where each matrix's rows end."""
    rest = {key: value for key, value in rest.items() if value is not None}
    known = isinstance(mat_b, FactoredWeight) and _all_dense(mat_a) and (mat_a.ndim, mat_b.ndim) == (2, 3)
    if not known or offs is None or rest or not all(is_aligned(n, mat_b.dtype) for n in mat_b.shape[1:]):
        mat_a, mat_b = _made_dense([mat_a, mat_b])
        found: Tensor = stacks.grouped_mm(mat_a, mat_b, offs=offs, **rest)
        return found
    y: Tensor = stacks.grouped_mm(mat_a, mat_b.base, offs=offs)
    for left, right, scaling in mat_b.changes:
        y = grouped_add(y, mat_a, left, right, scaling, offs)
    return y


_RULES: dict[Any, Callable[..., Any]] = {
    linear: _linear,
    torch.bmm: _bmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.__rmatmul__: lambda self, other: _matmul(other, self),
}
for _module, _name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_module, _name):  # torch 2.8 and 2.10 brought them
        _RULES[getattr(_module, _name)] = _grouped_mm
