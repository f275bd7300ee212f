"""Factors of a stack of matrices: arranged for products and back, kept while they do not change, multiplied in groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from lorakit.layers.stacks import Arrangement, Stack, StackKeeper, aligned, grouped_add, grouped_mm

MATRICES, IN, OUT = 4, 16, 24


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- arranging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 8])
def test_rows_are_what_files_mean(r):
    A, B = draw(r * MATRICES, IN), draw(OUT, r * MATRICES)
    by_expert, by_rank = Arrangement(MATRICES, by_rank=False), Arrangement(MATRICES, by_rank=True)
    assert by_expert.rank(A) == by_rank.rank(B) == r
    right, left = by_expert.rows(A, A.dtype), by_rank.rows(B, B.dtype)
    assert right.shape == (MATRICES, r, IN)
    assert left.shape == (MATRICES, r, OUT)
    for e in range(MATRICES):
        assert torch.equal(right[e], A[e * r : (e + 1) * r])
        assert torch.equal(left[e], B[:, e::MATRICES].T)
    assert right.data_ptr() == A.data_ptr()


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("r", [3, 4])
def test_gradient_undoes_rows(r, by_rank):
    arrangement = Arrangement(MATRICES, by_rank)
    stored = draw(OUT, r * MATRICES) if by_rank else draw(r * MATRICES, IN)
    rows = aligned(arrangement.rows(stored, stored.dtype))
    assert rows.shape[1] % 4 == 0
    assert torch.equal(arrangement.gradient(rows, stored), stored)


def test_a_single_factor():
    A, B = draw(3, IN), draw(OUT, 3)
    assert torch.equal(Arrangement(0, by_rank=False).rows(A, A.dtype), A)
    assert torch.equal(Arrangement(0, by_rank=True).rows(B, B.dtype), B.T)


# ---- keeping ------------------------------------------------------------------------------------------


def kept_rows(keeper, factor):
    return keeper.stack("a", factor, Arrangement(MATRICES, by_rank=True)).rows(torch.bfloat16)


CHANGES = {
    "write": lambda p: p.mul_(2),
    "write into the data's own counter": lambda p: p.copy_(p + 1),
    "new data": lambda p: setattr(p, "data", p.data * 2),
    "new data, twice": lambda p: [setattr(p, "data", p.data * 2), setattr(p, "data", p.data * 2)],
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_arranged_factors_are_kept_until_they_change(change):
    keeper, factor = StackKeeper(), Parameter(draw(OUT, 2 * MATRICES))
    first = kept_rows(keeper, factor)
    assert kept_rows(keeper, factor) is first
    CHANGES[change](factor)
    again = kept_rows(keeper, factor)
    assert torch.equal(again, Arrangement(MATRICES, by_rank=True).rows(factor, torch.bfloat16))
    assert not torch.equal(again, first)
    assert kept_rows(keeper, factor) is again
    keeper.clear()
    assert kept_rows(keeper, factor) is not again


def test_trained_factors_are_not_kept():
    keeper, factor = StackKeeper(), Parameter(draw(OUT, 2 * MATRICES))
    with torch.no_grad():
        plain = kept_rows(keeper, factor)
    trained = kept_rows(keeper, factor)
    assert trained.requires_grad
    assert kept_rows(keeper, factor) is not trained
    with torch.no_grad():
        assert kept_rows(keeper, factor) is not plain, "what was kept went when training began"
    factor.requires_grad_(False)
    assert kept_rows(keeper, factor) is kept_rows(keeper, factor)


def test_factors_made_under_inference_mode_are_not_kept():
    with torch.inference_mode():
        factor = Parameter(draw(OUT, 2 * MATRICES), requires_grad=False)
        keeper = StackKeeper()
        first = kept_rows(keeper, factor)
        factor.mul_(2)
        assert torch.equal(kept_rows(keeper, factor), first * 2)


def test_rows_made_under_inference_mode_do_not_reach_a_graph():
    keeper, factor = StackKeeper(), Parameter(draw(MATRICES * 4, IN), requires_grad=False)
    other = Parameter(draw(OUT, MATRICES * 4), requires_grad=False)

    def run(x):
        shrink = keeper.stack("A", factor, Arrangement(MATRICES, by_rank=False))
        expand = keeper.stack("B", other, Arrangement(MATRICES, by_rank=True))
        return grouped_add(torch.zeros(8, OUT), x, shrink, expand, 1.0, offsets([2, 2, 2, 2]))

    with torch.inference_mode():
        plain = run(draw(8, IN))
    x = draw(8, IN).requires_grad_()
    run(x).square().sum().backward()
    torch.testing.assert_close(run(x).detach(), plain)
    assert x.grad.isfinite().all()


def test_copies_and_pickles_begin_empty():
    keeper, factor = StackKeeper(), Parameter(draw(OUT, 2 * MATRICES), requires_grad=False)
    first = kept_rows(keeper, factor)
    for twin in (copy.deepcopy(keeper), pickle.loads(pickle.dumps(keeper))):
        assert kept_rows(twin, factor) is not first


# ---- multiplying in groups ----------------------------------------------------------------------------


def offsets(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def problem(counts, r, *, dtype=torch.float32, factors=None, scaling=0.6):
    rows = sum(counts)
    x = draw(rows, IN, dtype=dtype).requires_grad_()
    A = Parameter(draw(r * MATRICES, IN, seed=1, dtype=factors or dtype))
    B = Parameter(draw(OUT, r * MATRICES, seed=2, dtype=factors or dtype))
    W = draw(MATRICES, IN, OUT, seed=3, dtype=dtype)
    return x, A, B, W, offsets(counts), scaling


def ours(x, A, B, W, offs, scaling):
    y = grouped_mm(x, W, offs=offs)
    shrink, expand = (
        Stack(A, Arrangement(MATRICES, by_rank=False)),
        Stack(B, Arrangement(MATRICES, by_rank=True)),
    )
    return grouped_add(y, x, shrink, expand, scaling, offs)


def loop(x, A, B, W, offs, scaling):
    """The specification: one matrix after another."""
    r = A.shape[0] // MATRICES
    ends = [0, *offs.tolist()]
    parts = []
    for e in range(MATRICES):
        own = x[ends[e] : ends[e + 1]]
        parts.append(own @ (W[e] + scaling * (B[:, e::MATRICES] @ A[e * r : (e + 1) * r]).T))
    return torch.cat(parts)


COUNTS = {"all": [3, 5, 1, 4], "some without rows": [0, 7, 0, 2], "one": [0, 0, 0, 6], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("r", [1, 3, 4, 6, 8])
def test_forward_and_gradients_equal_a_loop(r, counts):
    given = problem(counts, r)
    exact = [t.detach().double().requires_grad_() if torch.is_floating_point(t) else t for t in given[:5]]
    wanted = loop(*exact, given[5])
    found = ours(*given)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    probe = draw(*found.shape, seed=9)
    mine = torch.autograd.grad(found, given[:3], probe)
    for grad, other in zip(mine, torch.autograd.grad(wanted, exact[:3], probe.double()), strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["x", "A", "B", "A and B", "all"])
def test_only_what_is_trained_gets_gradients(frozen):
    x, A, B, *_ = given = problem(COUNTS["all"], 3)
    for name, tensor in zip(["x", "A", "B"], (x, A, B), strict=True):
        tensor.requires_grad_(frozen != "all" and name not in frozen.split(" and "))
    found = ours(*given)
    torch.testing.assert_close(found, loop(*given), rtol=1e-5, atol=1e-5)
    trained = [t for t in (x, A, B) if t.requires_grad]
    assert found.requires_grad == bool(trained)
    if trained:
        probe = draw(*found.shape, seed=9)
        wanted = torch.autograd.grad(loop(*given), trained, probe)
        for grad, other in zip(torch.autograd.grad(found, trained, probe), wanted, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", [0.6, torch.tensor(0.6)], ids=["float", "tensor"])
def test_scaling_may_be_a_tensor(scaling):
    given = problem(COUNTS["all"], 4, scaling=scaling)
    torch.testing.assert_close(ours(*given), loop(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32 factors", "half factors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [3, 8])
def test_half_precision(r, dtype, factors):
    given = problem(COUNTS["all"], r, dtype=dtype, factors=factors)
    exact = [t.detach().double().requires_grad_() if torch.is_floating_point(t) else t for t in given[:5]]
    wanted, found = loop(*exact, given[5]), ours(*given)
    close = {"rtol": 0.0, "atol": 8 * torch.finfo(dtype).eps * wanted.abs().max().item()}
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **close)
    probe = draw(*found.shape, seed=9, dtype=dtype)
    mine = torch.autograd.grad(found, given[:3], probe)
    for grad, other, leaf in zip(
        mine, torch.autograd.grad(wanted, exact[:3], probe.double()), given, strict=False
    ):
        assert grad.dtype == leaf.dtype
        close["atol"] = 8 * torch.finfo(dtype).eps * other.abs().max().item()
        torch.testing.assert_close(grad.double(), other, **close)


def test_rows_behind_the_last_group_do_not_matter():
    """Transformers sorts rows that no expert of this process takes to the end, and masks what comes of them."""
    x, A, B, W, _, scaling = problem([3, 5, 1, 4], 3)
    offs = offsets([3, 2, 1, 1])
    known = 7
    found = ours(x, A, B, W, offs, scaling)[:known]
    wanted = loop(x[:known], A, B, W, offs, scaling)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    probe = draw(known, OUT, seed=9)
    for grad, other in zip(
        torch.autograd.grad(found, (A, B), probe), torch.autograd.grad(wanted, (A, B), probe), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


def test_second_derivatives_equal_those_of_a_loop():
    def second(function):
        given = problem(COUNTS["all"], 3)
        y = function(*given)
        first = torch.autograd.grad(y.square().sum(), given[:3], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given[:3])

    for mine, other in zip(second(ours), second(loop), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4 * other.abs().max().item())


def test_what_is_kept_for_backward_is_x_and_r_numbers_a_row():
    given = problem(COUNTS["all"], 4)
    x, A, B, W, offs, scaling = given
    y = grouped_mm(x.detach(), W, offs=offs).requires_grad_(False)
    stored = {t.untyped_storage().data_ptr() for t in (x, A, B, offs)}
    new = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in stored:
            new.append(tuple(t.shape))
        return t

    shrink, expand = (
        Stack(A, Arrangement(MATRICES, by_rank=False)),
        Stack(B, Arrangement(MATRICES, by_rank=True)),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        grouped_add(y, x, shrink, expand, scaling, offs)
    assert new == [(x.shape[0], 4)]
