"""PiSSA, OLoRA and MiCA against full decompositions in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorakit.init import initialise
from lorakit.init.spectral import PRINCIPAL_TOL, balanced
from lorakit.layouts import Layout
from lorakit.ops.low_rank import truncated_svd
from models import spec_of

SIZES = [(300, 260, 8), (260, 300, 8), (40, 30, 30), (30, 40, 7), (12, 12, 1)]
sizes = pytest.mark.parametrize(("out", "inner", "r"), SIZES)


def spectrum(out, inner, seed=0):
    """A matrix whose singular values fall slowly."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out, inner)
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in (out, inner)
    )
    return (left * torch.arange(1, k + 1) ** -0.5) @ right.T


def begin(name, W, r, *, alpha=6.0, dtype=torch.float32):
    (result,) = initialise(
        spec_of(tuple(W.shape), dtype, r=r, alpha=alpha, init=name), lambda wanted: W.to(wanted)
    )
    return result


@sizes
@pytest.mark.parametrize("alpha", [6.0, -2.0])
def test_pissa_is_the_best_of_its_rank(out, inner, r, alpha):
    W = spectrum(out, inner)
    U, S, Vh = torch.linalg.svd(W)
    best = (U[:, :r] * S[:r]) @ Vh[:r]
    result = begin("pissa", W, r, alpha=alpha)
    assert (result.factors.delta(torch.float64) - best).norm() <= PRINCIPAL_TOL * best.norm()
    # A and B share the singular values evenly, up to the scaling
    wanted = (S[:r] / abs(alpha / r)).sqrt()
    for norms in (result.factors.A.norm(dim=1), result.factors.B.norm(dim=0)):
        assert torch.allclose(norms.double(), wanted, rtol=1e-3)


@sizes
def test_olora_is_the_beginning_of_a_whole_qr(out, inner, r):
    W = spectrum(out, inner)
    Q, R = torch.linalg.qr(W)  # signs and all
    result = begin("olora", W, r, dtype=torch.float64)
    assert (result.factors.B - Q[:, :r]).abs().max() <= 1e-10
    assert (result.factors.A - R[:r]).abs().max() <= 1e-10
    assert torch.equal(result.factors.A[:, :r], result.factors.A[:, :r].triu())


def test_olora_of_a_group_is_that_of_its_own_channels():
    layout = Layout(24, (6, 5), groups=3)
    W = spectrum(24, 10)
    spec = replace(spec_of((1, 1), torch.float64, r=12, init="olora"), kind="conv", layout=layout)
    for group, result in enumerate(initialise(spec, lambda _dtype: W)):
        own = W[8 * group : 8 * group + 8]
        Q, R = torch.linalg.qr(own)
        wanted = torch.zeros(4, 30, dtype=torch.float64)
        wanted[:, 10 * group : 10 * group + 10] = R[:4]
        assert (result.factors.B - Q[:, :4]).abs().max() <= 1e-12
        assert (result.factors.A - wanted).abs().max() <= 1e-12


def test_olora_of_columns_that_depend_on_each_other():
    W = spectrum(30, 20)
    W[:, 1] = 2 * W[:, 0]
    W[:, 2] = 0
    result = begin("olora", W, 5)
    A, B = result.factors.A.double(), result.factors.B.double()
    assert (B.T @ B - torch.eye(5)).abs().max() <= 1e-5
    assert (B @ A - B @ (B.T @ W)).abs().max() <= 1e-6


@sizes
def test_mica_is_the_smallest_part(out, inner, r):
    W = spectrum(out, inner)
    result = begin("mica", W, r, dtype=torch.float64)
    B = result.factors.B
    assert (result.factors.A == 0).all()
    assert (B.T @ B - torch.eye(r)).abs().max() <= 1e-12
    k = min(out, inner)
    values = torch.linalg.svdvals(W)[k - r :]
    assert torch.allclose(
        (B.T @ W).norm(dim=1), values, rtol=1e-9
    )  # each is its own singular vector, falling
    assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_rank_that_the_weight_does_not_have_is_left_to_train():
    W = spectrum(30, 2) @ spectrum(2, 40)
    W[:, 3:] = 0
    W[:, :3] = torch.eye(30, 3, dtype=torch.float64)[:, [0, 0, 1]]  # exactly of rank 2
    svd = truncated_svd(W.float(), 5)
    svd = svd._replace(S=svd.S * (torch.arange(5) < 2))
    factors = balanced(svd, 0.5)
    assert (factors.delta() - W).abs().max() <= 1e-6
    assert (factors.B[:, 2:] == 0).all()
    assert torch.allclose(factors.A[2:].norm(dim=1), torch.tensor(3**-0.5))
