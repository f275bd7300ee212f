"""Layouts: stored factors and their blocks are the same numbers, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.layouts import Layout, filled, matrix_layout
from models import random_factors

few = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw):
    """Any layout that a codec may give, with a rank for it."""
    kind = draw(st.sampled_from(["matrix", "conv", "experts"]))
    small = st.integers(1, 4)
    r = draw(small)
    if kind == "conv":
        groups = draw(small)
        row = (groups * draw(small), *(draw(small) for _ in range(draw(st.integers(1, 3)))))
        return Layout(groups * draw(small), row, groups=groups), r * groups
    experts = draw(small) if kind == "experts" else 0
    return Layout(draw(small), (draw(small),), experts=experts, transposed=draw(st.booleans())), r


def stored_factors(layout, r, *, bias=False):
    shape_A, shape_B = layout.factor_shapes(r)
    return torch.randn(shape_A), torch.randn(shape_B), torch.randn(layout.out) if bias else None


def blocks_of(layout, r, *, bias=False):
    return [
        random_factors(layout.block_shape, r=layout.block_rank(r), seed=n, bias=bias)
        for n in range(layout.blocks)
    ]


# ---- split and join -------------------------------------------------------------------------------------


@few
@given(layouts(), st.booleans())
def test_join_is_the_inverse_of_split(case, biased):
    layout, r = case
    A, B, bias = stored_factors(layout, r, bias=biased and not layout.experts)
    blocks = layout.split(A, B, 0.5, bias)
    assert len(blocks) == layout.blocks
    assert {block.scaling for block in blocks} == {0.5}
    assert {block.shape for block in blocks} == {layout.block_shape}
    assert {block.rank for block in blocks} == {layout.block_rank(r)}
    again = layout.join(blocks)
    for got, want in zip(again, (A, B, bias), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)
        assert got is None or got.is_contiguous()


@few
@given(layouts(), st.booleans())
def test_split_is_the_inverse_of_join(case, biased):
    layout, r = case
    blocks = blocks_of(layout, r, bias=biased and not layout.experts)
    A, B, bias = layout.join(blocks)
    assert (tuple(A.shape), tuple(B.shape)) == layout.factor_shapes(r)
    for got, want in zip(layout.split(A, B, blocks[0].scaling, bias), blocks, strict=True):
        assert torch.equal(got.A, want.A)
        assert torch.equal(got.B, want.B)
        assert (got.bias is None) == (want.bias is None)
        assert got.bias is None or torch.equal(got.bias, want.bias)


@few
@given(layouts())
def test_blocks_share_memory_with_what_is_stored(case):
    layout, r = case
    A, B, _ = stored_factors(layout, r)
    for block in layout.split(A, B, 1.0):
        block.A.zero_()
        block.B.zero_()
    assert not A.any()
    assert not B.any()


@few
@given(layouts(), st.data())
def test_blocks_of_lesser_rank_keep_their_deltas(case, draw):
    layout, r = case
    most = layout.block_rank(r)
    ranks = [draw.draw(st.integers(1, most)) for _ in range(layout.blocks)]
    blocks = [random_factors(layout.block_shape, r=rank, seed=n) for n, rank in enumerate(ranks)]
    A, B, _ = layout.join(blocks)
    assert (tuple(A.shape), tuple(B.shape)) == layout.factor_shapes(max(ranks) * layout.groups)
    for got, want in zip(layout.split(A, B, blocks[0].scaling), blocks, strict=True):
        torch.testing.assert_close(got.delta(), want.delta())


@few
@given(layouts())
def test_split_and_join_are_differentiable(case):
    layout, r = case
    A, B, _ = stored_factors(layout, r)
    A, B = A.requires_grad_(), B.requires_grad_()
    again_A, again_B, _ = layout.join(layout.split(A, B, 1.0))
    gradients = torch.autograd.grad(again_A.sum() + 2 * again_B.sum(), [A, B])
    assert torch.equal(gradients[0], torch.ones_like(A))
    assert torch.equal(gradients[1], torch.full_like(B, 2))


def test_how_experts_and_groups_lie():
    """A expert by expert and B rank by rank; a group's outputs have the ranks of that group alone."""
    experts = Layout(2, (3,), experts=2)
    A, B = torch.arange(4.0)[:, None].expand(4, 3), torch.arange(4.0).expand(2, 4)
    first, second = experts.split(A, B, 1.0)
    assert first.A[:, 0].tolist() == [0, 1]
    assert second.A[:, 0].tolist() == [2, 3]
    assert first.B[0].tolist() == [0, 2]
    assert second.B[0].tolist() == [1, 3]
    groups = Layout(4, (2, 1), groups=2)
    A, B = torch.arange(4.0)[:, None, None].expand(4, 2, 1), torch.arange(4.0)[:, None, None].expand(4, 2, 1)
    first, second = groups.split(A, B, 1.0, torch.arange(4.0))
    assert first.A[:, 0].tolist() == [0, 1]
    assert second.B[:, 0].tolist() == [2, 3]
    assert first.bias.tolist() == [0, 1]
    assert second.bias.tolist() == [2, 3]


def test_a_single_block_is_not_copied():
    layout = Layout(4, (2, 3, 3))
    (block,) = blocks_of(layout, 2)
    A, B, _ = layout.join([block])
    assert A.data_ptr() == block.A.data_ptr()
    assert B.data_ptr() == block.B.data_ptr()
    (transposed,) = [random_factors((4, 18), r=2)]
    A, B, _ = layout.join([type(block)(transposed.A.t().contiguous().t(), transposed.B, 1.0)])
    assert A.is_contiguous()


def test_what_cannot_be_joined_or_split():
    layout = Layout(4, (2,), experts=2)
    blocks = blocks_of(layout, 2)
    with pytest.raises(AssertionError, match="1 blocks for 2"):
        layout.join(blocks[:1])
    with pytest.raises(AssertionError, match="share a scaling"):
        layout.join([blocks[0], random_factors((4, 2), r=2, scaling=9.0)])
    A, B, _ = layout.join(blocks)
    with pytest.raises(AssertionError, match="no bias"):
        layout.split(A, B, 1.0, torch.ones(4))


# ---- shapes ---------------------------------------------------------------------------------------------


@few
@given(layouts())
def test_shapes_agree(case):
    layout, r = case
    out, inner = layout.shape
    assert layout.block_shape == (out // layout.groups, inner)
    assert layout.blocks == max(layout.groups, layout.experts, 1)
    per_block = sum(layout.block_shape) * layout.block_rank(r)
    shape_A, shape_B = layout.factor_shapes(r)
    assert torch.Size(shape_A).numel() + torch.Size(shape_B).numel() == per_block * layout.blocks
    assert len(shape_A) == len(shape_B) == 1 + len(layout.row)


def test_a_matrix():
    layout = matrix_layout(5, 7, transposed=True)
    assert (layout.shape, layout.blocks, layout.transposed) == ((5, 7), 1, True)
    assert layout.factor_shapes(2) == ((2, 7), (5, 2))


# ---- regions and dense weights --------------------------------------------------------------------------


def stored_weight(layout, generator=None):
    """A weight as its module stores it."""
    out, inner = layout.shape
    if layout.experts or len(layout.row) == 1:
        stack = (layout.experts,) if layout.experts else ()
        return torch.randn(
            *stack, *((inner, out) if layout.transposed else (out, inner)), generator=generator
        )
    return torch.randn(out, layout.row[0] // layout.groups, *layout.row[1:], generator=generator)


@few
@given(layouts())
def test_regions_are_the_places_of_the_blocks(case):
    layout, r = case
    dense = layout.make_dense(stored_weight(layout)).contiguous()
    kept = dense.clone()
    blocks = blocks_of(layout, r)
    regions = layout.regions(dense)
    assert len(regions) == layout.blocks
    for region, block in zip(regions, blocks, strict=True):
        delta = block.delta()
        region += delta.T if layout.transposed else delta  # shares memory with `dense`
    deltas = torch.stack([block.delta() for block in blocks])
    deltas = deltas.mT if layout.transposed else deltas
    torch.testing.assert_close(dense - kept, deltas.reshape(dense.shape), rtol=1e-4, atol=1e-5)


@few
@given(layouts())
def test_the_dense_change_is_that_of_the_regions(case):
    layout, r = case
    A, B, _ = stored_factors(layout, r)
    A, B = A.requires_grad_(), B.requires_grad_()
    found = layout.dense(A, B)
    wanted = layout.make_dense(torch.zeros_like(stored_weight(layout)))
    assert found.shape == wanted.shape
    for region, block in zip(layout.regions(wanted), layout.split(A.detach(), B.detach(), 1.0), strict=True):
        delta = block.B @ block.A
        region += delta.T if layout.transposed else delta
    torch.testing.assert_close(found, wanted)
    assert all(
        gradient.shape == part.shape
        for gradient, part in zip(torch.autograd.grad(found.sum(), [A, B]), (A, B), strict=True)
    )


@few
@given(layouts(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_dense_weight_acts_like_the_grouped_one(case, dtype):
    layout, _ = case
    weight = stored_weight(layout).to(dtype)
    dense = layout.make_dense(weight)
    assert dense.dtype == dtype
    if layout.groups == 1:
        assert dense is weight
        return
    assert tuple(dense.shape) == (layout.out, *layout.row)
    assert dense.count_nonzero() == weight.count_nonzero()
    convolve = [torch.conv1d, torch.conv2d, torch.conv3d][len(layout.row) - 2]
    x = torch.randn(2, *(size + 2 for size in layout.row)).to(dtype)[:, : layout.row[0]]
    torch.testing.assert_close(
        convolve(x, dense).double(), convolve(x, weight, groups=layout.groups).double(), rtol=2e-2, atol=2e-2
    )


def test_nothing_of_a_group_gets_into_another():
    layout = Layout(4, (4, 1), groups=2)
    weight = torch.ones(4, 2, 1)
    weight[0, 0] = float("nan")
    dense = layout.make_dense(weight)
    assert dense.isnan().sum() == 1
    assert dense[:2, 2:].abs().sum() == dense[2:, :2].abs().sum() == 0


def test_making_dense_is_differentiable_and_works_on_meta():
    layout = Layout(4, (4, 3), groups=2)
    weight = torch.randn(4, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad((layout.make_dense(weight) * 3).sum(), weight)
    assert torch.equal(gradient, torch.full_like(weight, 3))
    assert layout.make_dense(weight.detach().to("meta")).shape == (4, 4, 3)


# ---- filling up -----------------------------------------------------------------------------------------


@few
@given(st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, 1, -1]))
def test_filled_adds_zeros_at_the_end(size, more, dim):
    tensor = torch.randn(size, size, dtype=torch.float64)
    found = filled(tensor, size + more, dim=dim)
    assert found.dtype == tensor.dtype
    assert found.shape[dim] == size + more
    assert torch.equal(found.narrow(dim, 0, size), tensor)
    assert not found.narrow(dim, size, more).any()


def test_filled_gives_the_tensor_itself_where_nothing_lacks():
    tensor = torch.randn(2, 3)
    assert filled(tensor, 3, dim=1) is tensor
    grown = filled(tensor.requires_grad_(), 5, dim=0)
    assert torch.equal(torch.autograd.grad(grown.sum(), tensor)[0], torch.ones(2, 3))
