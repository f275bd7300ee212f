"""A parameter with its changes kept factored does what the dense sum does, and builds that sum only when it must."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from lorakit.errors import UnsupportedError
from lorakit.layers.factored import Change, FactoredWeight
from lorakit.layers.stacks import Arrangement, Stack

MATRICES, ROWS, COLUMNS = 3, 8, 12


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stacked(*, ranks=(2, 3), dtype=torch.float64, factors=None, transposed=False, scaling=0.7):
    """A factored stack and the leaves that it is made of: the base, then A and B of each change."""
    factors = factors or dtype
    rows, columns = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    leaves, changes = [draw(MATRICES, rows, columns, dtype=dtype).requires_grad_()], []
    for number, r in enumerate(ranks):
        A = draw(r * MATRICES, COLUMNS, seed=10 + number, dtype=factors).requires_grad_()
        B = draw(ROWS, r * MATRICES, seed=20 + number, dtype=factors).requires_grad_()
        leaves += [A, B]
        right, left = (
            Stack(A, Arrangement(MATRICES, by_rank=False)),
            Stack(B, Arrangement(MATRICES, by_rank=True)),
        )
        changes.append(Change(*((right, left) if transposed else (left, right)), scaling))
    return FactoredWeight(leaves[0], changes), leaves


def matrix(*, ranks=(2, 3)):
    leaves, changes = [draw(ROWS, COLUMNS).requires_grad_()], []
    for number, r in enumerate(ranks):
        A, B = (
            draw(r, COLUMNS, seed=10 + number).requires_grad_(),
            draw(ROWS, r, seed=20 + number).requires_grad_(),
        )
        leaves += [A, B]
        changes.append(
            Change(Stack(B, Arrangement(0, by_rank=True)), Stack(A, Arrangement(0, by_rank=False)), 0.7)
        )
    return FactoredWeight(leaves[0], changes), leaves


def truth(leaves, *, transposed=False):
    """The dense sum, spelt out from how files store the factors."""
    total = leaves[0]
    for A, B in zip(leaves[1::2], leaves[2::2], strict=True):
        if leaves[0].ndim == 2:
            total = total + 0.7 * B @ A
            continue
        blocks = torch.einsum("ore,eri->eoi", B.reshape(ROWS, -1, MATRICES), A.reshape(MATRICES, -1, COLUMNS))
        total = total + 0.7 * (blocks.mT if transposed else blocks)
    return total


@pytest.fixture
def built(monkeypatch):
    """How often a dense sum was asked for."""
    calls, dense = [], FactoredWeight.dense

    def counted(self):
        calls.append(self)
        return dense(self)

    monkeypatch.setattr(FactoredWeight, "dense", counted)
    return calls


X, BATCH = draw(5, COLUMNS, seed=1), draw(MATRICES, 5, COLUMNS, seed=2)
PICKED = torch.tensor([2, 0, 2, 1, -1])
STAYS = {
    "number": lambda w: F.linear(X, w[1], draw(ROWS, seed=3)),
    "negative number": lambda w: F.linear(X, w[-1]),
    "number in a tensor": lambda w: F.linear(X, w[torch.tensor(2)]),
    "iterating": lambda w: torch.stack([F.linear(X, each) for each in w]),
    "x @ transposed": lambda w: X @ w[0].T,
    "x @ t()": lambda w: X @ w[0].t(),
    "matmul": lambda w: torch.matmul(X, w[0].transpose(0, 1)),
    "method": lambda w: X.matmul(w[0].mT),
    "matrix @ x": lambda w: w[0] @ X.T,
    "more dimensions": lambda w: F.linear(draw(2, 3, COLUMNS, seed=4), w[0]),
    "bmm": lambda w: torch.bmm(BATCH, w.transpose(1, 2)),
    "bmm from the left": lambda w: torch.bmm(w, BATCH.mT),
    "stack @ x": lambda w: w @ BATCH.mT,
    "batch method": lambda w: BATCH.bmm(w.mT),
    "one x for all": lambda w: X @ w.mT,
    "vector of numbers": lambda w: torch.bmm(w[PICKED], X.unsqueeze(-1)),
    "vector of numbers, transposed": lambda w: torch.bmm(X.unsqueeze(1), w[PICKED].mT),
    "vector of int32": lambda w: torch.bmm(w[PICKED.int()], X.unsqueeze(-1)),
    "length": lambda w: torch.tensor(len(w)),
    "shape": lambda w: torch.tensor([*w.shape, w.size(0), w.ndim, w.numel(), *w.stride()]),
    "dtype and device": lambda w: torch.zeros(1, dtype=w.dtype, device=w.device),
}


@pytest.mark.parametrize("case", STAYS)
def test_products_stay_factored(case, built):
    weight, leaves = stacked()
    same_as_dense(STAYS[case], weight, leaves, truth(leaves))
    assert not built


MATRIX_STAYS = {
    "linear": lambda w: F.linear(X, w, draw(ROWS, seed=3)),
    "keywords": lambda w: F.linear(input=X, weight=w, bias=None),
    "x @ T": lambda w: X @ w.T,
    "w @ x": lambda w: w @ X.T,
}


@pytest.mark.parametrize("case", MATRIX_STAYS)
def test_products_with_a_matrix_stay_factored(case, built):
    weight, leaves = matrix()
    same_as_dense(MATRIX_STAYS[case], weight, leaves, truth(leaves))
    assert not built


OTHERS = {
    "slice": lambda w: w[1:],
    "tuple": lambda w: w[1, 2:5, ::3],
    "mask": lambda w: w[torch.tensor([True, False, True])],
    "bool": lambda w: w[True],
    "none": lambda w: w[None, 0],
    "ellipsis": lambda w: w[..., 0],
    "list": lambda w: w[[0, 2]],
    "numbers of two dimensions": lambda w: w[torch.tensor([[0, 1], [2, 2]])],
    "einsum": lambda w: torch.einsum("bi,eoi->beo", X, w),
    "cat": lambda w: torch.cat([w, w, torch.ones(1, ROWS, COLUMNS, dtype=w.dtype)]),
    "stack": lambda w: torch.stack((w, torch.ones(MATRICES, ROWS, COLUMNS, dtype=w.dtype), w)),
    "unbind": lambda w: torch.stack(w.unbind(0)),
    "split": lambda w: torch.cat(w.split(1)),
    "chunk": lambda w: w.chunk(2, dim=-1)[1],
    "to": lambda w: w.to(torch.float32),
    "single": lambda w: w.float(),
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "view": lambda w: w.view(-1, COLUMNS),
    "permute": lambda w: w.permute(2, 0, 1),
    "transpose of experts": lambda w: w.transpose(0, 1),
    "arithmetic": lambda w: (2 * w + 1 - w / 3) ** 2 - (-w) * w,
    "tensor on the left": lambda w: torch.ones(COLUMNS, dtype=w.dtype) * w + torch.ones(1, dtype=w.dtype) - w,
    "comparison": lambda w: (w > 0) | (w <= -1) | (w == 0) | ~(w != 0),
    "remainder": lambda w: w % 0.3,
    "floor": lambda w: ((w // 0.5) + (2.0 // w)).detach(),
    "containment": lambda w: torch.tensor([3.25 in w, w.detach()[0, 0, 0] in w]),
    "abs": lambda w: abs(w) + w.abs() + torch.abs(w),
    "norm": lambda w: torch.linalg.vector_norm(w, dim=-1),
    "function": lambda w: F.normalize(torch.sigmoid(w), dim=1),
    "float": lambda w: torch.tensor(float((w[:1, 0, 0] + 0).detach())),
    "product of two": lambda w: w @ w.mT,
    "linear with a stack": lambda w: F.linear(X, w[0, :, :]),
    "written from": lambda w: torch.zeros(MATRICES, ROWS, COLUMNS, dtype=w.dtype).copy_(w),
    "keyword": lambda w: torch.where(condition=torch.tensor(True), input=w, other=w),
}


@pytest.mark.parametrize("case", OTHERS)
def test_all_else_is_computed_with_the_dense_sum(case):
    weight, leaves = stacked()
    same_as_dense(OTHERS[case], weight, leaves, truth(leaves))


def same_as_dense(operation, weight, leaves, wanted):
    found, expected = operation(weight), operation(wanted)
    torch.testing.assert_close(
        found, expected, rtol=1e-6, atol=1e-6 if found.dtype == torch.float32 else 1e-12
    )
    assert found.requires_grad == expected.requires_grad
    if expected.requires_grad:
        probe = draw(*expected.shape, seed=7).to(expected.dtype)
        both = [torch.autograd.grad(y, leaves, probe, materialize_grads=True) for y in (found, expected)]
        for mine, other in zip(*both, strict=True):
            torch.testing.assert_close(
                mine, other, rtol=1e-6, atol=1e-6 if found.dtype == torch.float32 else 1e-11
            )


WRITING = {
    "method": lambda w: w.add_(1),
    "zero": lambda w: w.zero_(),
    "function": lambda w: torch.relu_(w),
    "inplace": lambda w: F.relu(w, inplace=True),
    "out": lambda w: torch.add(X, X, out=w),
    "data": lambda w: w.data,
    "element": lambda w: w.__setitem__(0, 1.0),
    "requires_grad_": lambda w: w.requires_grad_(),
    "init": lambda w: torch.nn.init.normal_(w),
    "augmented": lambda w: w.__imul__(2),
    "augmented, as a statement": lambda w: exec("w += 1", {"w": w}),
}


@pytest.mark.parametrize("case", WRITING)
def test_writing_into_it_is_refused(case):
    weight, leaves = stacked()
    before = [leaf.detach().clone() for leaf in leaves]
    with pytest.raises(UnsupportedError, match="write into the module's own parameter"), torch.no_grad():
        WRITING[case](weight)
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


def test_it_is_no_tensor_and_says_what_it_is():
    weight, _ = stacked()
    assert not isinstance(weight, torch.Tensor)
    assert not torch.is_tensor(weight)
    assert repr(weight) == "FactoredWeight(shape=(3, 8, 12), dtype=torch.float64, changes=2)"
    assert weight.requires_grad
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = weight.no_such_thing
    again = copy.deepcopy(FactoredWeight(weight.base.detach(), ()))
    assert torch.equal(again.dense(), weight.base)
    with pytest.raises(IndexError):
        weight[MATRICES]


def test_the_dense_sum_is_built_once_a_call_and_mode():
    weight, _ = stacked()
    assert weight.dense() is weight.dense()
    with torch.no_grad():
        plain = weight.dense()
        assert not plain.requires_grad
    assert weight.dense().requires_grad
    assert torch.equal(plain, weight.dense())


@pytest.mark.parametrize("scaling", [0.7, torch.tensor(0.7, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "operation", [STAYS["x @ t()"], STAYS["bmm"], OTHERS["view"], STAYS["vector of numbers"]]
)
def test_scalings_may_be_tensors(operation, scaling):
    weight, leaves = stacked(scaling=scaling)
    torch.testing.assert_close(operation(weight), operation(truth(leaves)), rtol=1e-12, atol=1e-12)


STORED = {
    "stack": lambda w, x: x @ w,
    "bmm": lambda w, x: torch.bmm(x, w),
    "one": lambda w, x: x[0] @ w[1],
    "some": lambda w, x: torch.bmm(x, w[torch.tensor([1, 1, 0])]),
    "sum": lambda w, x: w + x.sum(),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", STORED)
def test_a_stack_stored_either_way(case, transposed):
    weight, leaves = stacked(transposed=transposed)
    x = draw(MATRICES, 5, weight.shape[1], seed=3)
    same_as_dense(lambda w: STORED[case](w, x), weight, leaves, truth(leaves, transposed=transposed))


@pytest.mark.parametrize("operation", ["number", "bmm", "vector of numbers", "view", "x @ t()"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_worse_than_the_dense_sum(operation, dtype):
    """fp32 factors over a half-precision base: error to fp64 at most that of rounding the whole sum, plus the product."""
    apply = {**STAYS, **OTHERS}[operation]
    weight, leaves = stacked(dtype=dtype, factors=torch.float32)
    exact = truth([leaf.double() for leaf in leaves])

    def run(w):
        torch_x = {"X": X.to(dtype), "BATCH": BATCH.to(dtype)}
        return eval_with(apply, torch_x, w)

    found = run(weight)
    assert found.dtype == dtype
    wanted = eval_with(apply, {"X": X.to(dtype).double(), "BATCH": BATCH.to(dtype).double()}, exact)
    error = (found.double() - wanted).norm() / wanted.norm()
    allowed = (run(exact.to(dtype)).double() - wanted).norm() / wanted.norm()
    assert error <= 1.5 * allowed + torch.finfo(dtype).eps


def eval_with(operation, names, weight):
    """An operation of the tables, with X and BATCH in another dtype."""
    from types import FunctionType

    scope = {
        **operation.__globals__,
        **names,
        "draw": lambda *shape, seed=0: draw(*shape, seed=seed, dtype=names["X"].dtype),
    }
    return FunctionType(operation.__code__, scope)(weight)


def test_one_gradient_for_a_stack_however_many_are_picked(built):
    """Cut out one by one, each matrix would get a gradient as large as the stack: time quadratic in their number."""
    weight, leaves = stacked(ranks=(2,))
    total = sum(F.linear(X, weight[number]).sum() for number in (0, 1, 2, 0))
    seen = []
    for leaf in leaves[1:]:
        leaf.register_hook(lambda grad: seen.append(grad.shape))
    nodes, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [following for following, _ in node.next_functions]
    names = [node.name() for node in nodes]
    assert names.count("UnbindBackward0") == 2
    total.backward()
    assert seen == [leaf.shape for leaf in leaves[1:]]
