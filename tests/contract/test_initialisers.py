"""Every initialiser keeps the contract. A new one is one more row in `PROMISES`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from lorakit.errors import PlanError
from lorakit.init import INITIALISERS, InitContext, initialise
from lorakit.init.registry import initialiser_name
from models import bits, spec_of

SHAPE, R = (200, 300), 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Promise(NamedTuple):
    """What a scheme promises of the factors it makes for (200, 300), r 16, in fp32."""

    zero_delta: bool
    A_bound: float | None
    B_bound: float | None
    A_std: float
    B_std: float


UNIFORM = 1 / 3**0.5
PROMISES = {
    "default": Promise(True, 300**-0.5, 0.0, 300**-0.5 * UNIFORM, 0.0),
    "gaussian": Promise(True, None, 0.0, 1 / R, 0.0),
    "random": Promise(False, 300**-0.5, R**-0.5, 300**-0.5 * UNIFORM, R**-0.5 * UNIFORM),
    # Each row of A is 0.1 times a sum of r/2 normals, weighted by entries of a random orthogonal matrix.
    "orthogonal": Promise(True, None, None, 0.1 * 0.5**0.5, 0.1 * 0.5**0.5),
}
each = pytest.mark.parametrize("name", list(INITIALISERS))


def unread(_dtype):
    raise AssertionError("a scheme that looks only at shapes read the base weight")


def make(name, *, seed=11, **changes):
    torch.manual_seed(seed)
    return initialise(InitContext(replace(spec_of(SHAPE, r=R, init=name), **changes), unread))


def test_each_initialiser_has_a_row_here():
    assert set(INITIALISERS) == set(PROMISES)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_shapes_dtype_device(name, dtype, lora_bias):
    made = make(name, dtype=dtype, lora_bias=lora_bias)
    factors = made.factors
    assert tuple(factors.A.shape) == (R, SHAPE[1])
    assert tuple(factors.B.shape) == (SHAPE[0], R)
    assert factors.scaling == spec_of(SHAPE, r=R).scaling
    tensors = [factors.A, factors.B] + ([factors.bias] if lora_bias else [])
    assert (factors.bias is not None) == lora_bias
    for tensor in tensors:
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.isfinite().all()


@each
def test_on_meta_nothing_is_allocated(name):
    factors = make(name, device=torch.device("meta"), lora_bias=True).factors
    assert factors.A.is_meta
    assert factors.B.is_meta
    assert factors.bias.is_meta


@each
def test_begins_as_no_change_where_promised(name):
    made = make(name, lora_bias=True)
    delta = made.factors.delta(torch.float64).abs().max().item()
    bias = made.factors.bias.abs().max().item()
    if PROMISES[name].zero_delta:
        assert delta <= 1e-6  # orthogonal: the rounding of fp32
        assert bias == 0
        assert made.base_weight is None
    else:
        assert delta > 1e-2
        assert bias > 1e-2


@each
def test_one_seed_one_result(name):
    first, second, other = make(name).factors, make(name).factors, make(name, seed=12).factors
    assert bits(first.A) == bits(second.A)
    assert bits(first.B) == bits(second.B)
    assert bits(first.A) != bits(other.A)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_numbers_in_every_dtype(name, dtype):
    wide, narrow = make(name).factors, make(name, dtype=dtype).factors
    assert torch.equal(wide.A.to(dtype), narrow.A)
    assert torch.equal(wide.B.to(dtype), narrow.B)


@each
def test_distribution(name):
    promise, factors = PROMISES[name], make(name).factors
    for tensor, bound, std in (
        (factors.A, promise.A_bound, promise.A_std),
        (factors.B, promise.B_bound, promise.B_std),
    ):
        if bound is not None:
            assert tensor.abs().max() <= bound
        # orthogonal has only one small random matrix: its halves vary more than the elements of a plain draw
        assert tensor.std().item() == pytest.approx(std, rel=0.2 if name == "orthogonal" else 0.05)
        assert abs(tensor.mean().item()) <= 0.05 * std + 1e-9


@pytest.mark.parametrize("r", [1, 3, 7])
def test_orthogonal_needs_an_even_rank(r):
    with pytest.raises(PlanError, match=rf"some\.path.*even rank.*r={r}"):
        make("orthogonal", r=r)


@pytest.mark.parametrize(
    ("value", "name"),
    [(True, "default"), (False, "random"), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")],
)
def test_names_of_config_values(value, name):
    assert initialiser_name(value) == name
