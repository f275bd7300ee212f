"""Principal components of rows that come in pieces, against an SVD of all of them; and who gets which rank."""

from __future__ import annotations

import pytest
import torch

from lorakit.init import eva
from lorakit.init.eva import DenseScatter, ThinScatter, have_settled, new_scatter, spread_ranks

CPU = torch.device("cpu")


def rows(count, dim, seed=0, *, offset=5.0, rank=None):
    """Rows around a mean that is far from zero, with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, rank or dim, generator=generator, dtype=torch.float64)
    X = X * torch.arange(1, X.shape[1] + 1) ** -0.8
    turn = torch.linalg.qr(torch.randn(dim, X.shape[1], generator=generator, dtype=torch.float64)).Q
    return X @ turn.T + offset


def exact(X, k):
    centred = X - X.mean(dim=0)
    svd = torch.linalg.svd(centred, full_matrices=False)
    return svd.S[:k] ** 2, svd.Vh[:k], float(centred.square().sum())


def filled(scatter, X, pieces=(7, 40, 1, 52)):
    for piece in X.split(pieces):
        scatter.add(piece.float())
    return scatter


@pytest.mark.parametrize(
    ("scatter", "dim", "rank"),
    [
        pytest.param(lambda dim: DenseScatter(dim, CPU), 24, None, id="dense, all eigenvectors"),
        pytest.param(lambda dim: DenseScatter(dim, CPU), 300, None, id="dense, wide"),
        pytest.param(lambda dim: DenseScatter(dim, CPU), 600, None, id="dense, wider"),
        pytest.param(lambda dim: ThinScatter(dim, CPU, 24), 24, None, id="thin, as wide as the rows"),
        pytest.param(lambda dim: ThinScatter(dim, CPU, 13), 60, 12, id="thin, rows of a lower rank"),
    ],
)
def test_components_are_those_of_all_rows(scatter, dim, rank):
    X = rows(100, dim, rank=rank)
    values, vectors, total = exact(X, 6)
    found = filled(scatter(dim), X).components(6)
    torch.testing.assert_close(found.values, values, rtol=2e-5, atol=0)
    cosines = (found.vectors.double() * vectors).sum(dim=1).abs()
    assert float(cosines.min()) > 1 - 1e-6
    assert found.total == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(found.ratios, values / total, rtol=3e-5, atol=0)
    largest = found.vectors.gather(1, found.vectors.abs().argmax(dim=1, keepdim=True))
    assert bool((largest > 0).all())


def test_what_a_thin_scatter_cuts_off_costs_little():
    """Twice the wanted directions are kept; the wanted ones come out to a thousandth of their variance."""
    X = rows(600, 80)
    values, _, total = exact(X, 6)
    thin = ThinScatter(80, CPU, 12)
    filled(thin, X, [60] * 10)
    found = thin.components(6)
    torch.testing.assert_close(found.values, values, rtol=2e-2, atol=0)
    assert found.total == pytest.approx(total, rel=1e-6)
    captured = ((X - X.mean(dim=0)) @ found.vectors.double().T).square().sum()
    assert float(captured) > 0.999 * float(values.sum())


def test_a_mean_of_a_thousand_deviations_does_no_harm():
    X = rows(100, 24, offset=1000.0)
    values, vectors, _ = exact(X, 4)
    found = filled(DenseScatter(24, CPU), X).components(4)
    torch.testing.assert_close(found.values, values, rtol=1e-3, atol=0)
    assert float((found.vectors.double() * vectors).sum(dim=1).abs().min()) > 1 - 1e-6


@pytest.mark.parametrize("make", [lambda: DenseScatter(20, CPU), lambda: ThinScatter(20, CPU, 20)])
def test_scatters_add_up(make):
    X = rows(100, 20)
    whole, first, second = filled(make(), X), filled(make(), X[:30], (30,)), filled(make(), X[30:], (70,))
    total = make()
    for part in (first, make(), second):
        total.absorb(part.parts())
    assert total.count == 100
    torch.testing.assert_close(total.mean, whole.mean)
    torch.testing.assert_close(total.components(5).values, whole.components(5).values, rtol=1e-5, atol=0)


def test_no_rows_are_no_rows():
    scatter = DenseScatter(5, CPU)
    scatter.add(torch.empty(0, 5))
    found = scatter.components(3)
    assert (scatter.count, found.significant, found.total) == (0, 0, 0.0)
    assert not found.ratios.any()


def test_followed_components_lag_by_little():
    X = rows(4000, 500)
    scatter = DenseScatter(500, CPU)
    near = None
    for piece in X.split(400):
        scatter.add(piece.float())
        near = scatter.components(8, near).vectors
    true = scatter.components(8).vectors
    assert float((near * true).sum(dim=1).abs().min()) > 0.999


def test_only_what_is_more_than_rounding_counts():
    assert filled(DenseScatter(24, CPU), rows(100, 24, rank=5)).components(12).significant == 5


def test_wide_inputs_are_kept_thin():
    assert isinstance(new_scatter(eva.WIDEST_DENSE, CPU, 16), DenseScatter)
    assert isinstance(new_scatter(eva.WIDEST_DENSE + 1, CPU, 16), ThinScatter)
    assert isinstance(new_scatter(eva.WIDEST_DENSE + 1, CPU, eva.WIDEST_DENSE), DenseScatter)


def test_whitening_divides_by_the_root_of_the_singular_value():
    found = filled(DenseScatter(24, CPU), rows(100, 24)).components(6)
    plain, white = found.start(4, whiten=False), found.start(4, whiten=True)
    assert plain.shape == white.shape == (4, 24)
    torch.testing.assert_close(white * found.values[:4].sqrt().sqrt()[:, None].float(), plain)


def test_settled_is_a_cosine():
    old = torch.eye(4)
    new = torch.tensor([[-1.0, 0, 0, 0], [0.3, 1.0, 0, 0], [0, 1.0, 1.0, 0], [0, 0, 0, 1.0]])
    assert have_settled(new, old, 0.9).tolist() == [False, True, False, True]
    assert have_settled(new, None, 0.0).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("ratios", "budget", "ranks"),
    [
        ({"a": [0.5, 0.1], "b": [0.3, 0.2]}, 2, {"a": 1, "b": 1}),
        ({"a": [0.5, 0.4, 0.3], "b": [0.2, 0.1]}, 3, {"a": 3, "b": 0}),
        ({"a": [0.5, 0.1], "b": [0.5, 0.1], "c": [0.5]}, 4, {"a": 2, "b": 1, "c": 1}),
        ({"a": [0.5], "b": []}, 4, {"a": 1, "b": 0}),
        ({}, 4, {}),
    ],
)
def test_ranks_go_where_they_explain_most(ratios, budget, ranks):
    assert spread_ranks({name: torch.tensor(shares) for name, shares in ratios.items()}, budget) == ranks
