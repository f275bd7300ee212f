"""PEFT as the judge of the combiners that bear its names: the same delta out of the same adapters."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils import merge_utils
from torch.nn import Linear

from lorakit.combiners import METHODS, CombineOptions, combine
from lorakit.types import Factors
from parity.models import NAMED_WARNINGS, build, peft, randomize

pytestmark = NAMED_WARNINGS

OWN = {"sum", "della", "sce", "slerp"}
NAMES = [name for name in METHODS if name not in OWN]
F32, F64 = torch.float32, torch.float64
# PEFT computes in float32 and takes LAPACK's SVD of the dense delta: 1e-6 of what it combines is its own rounding.
TOLERANCE = 5e-6
RULES = {
    "linear": merge_utils.task_arithmetic,
    "svd": merge_utils.task_arithmetic,
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
WEIGHTS = {1: [0.7], 2: [0.7, -0.4], 3: [0.7, -0.4, 1.1]}


def parts_of(shape, count, r=8, dtype=F32):
    generator = torch.Generator().manual_seed(count)
    return [
        Factors(
            torch.randn(r, shape[1], generator=generator, dtype=F64).to(dtype),
            torch.randn(shape[0], r, generator=generator, dtype=F64).to(dtype),
            (1.5, 2.0, 0.3)[n],
        )
        for n in range(count)
    ]


def size(parts, weights):
    return sum(abs(w) * part.delta(F64).norm() for part, w in zip(parts, weights, strict=True))


def judged(parts, weights, name, density, majority, rank):
    """The delta by PEFT's functions, applied as its `add_weighted_adapter` does, and how well it is determined.

    Which rank-r part of a matrix is the best is as uncertain as singular values r and r + 1 are near each other.
    """
    rule = RULES[name if name == "svd" else name.removesuffix("_svd")]
    extra = [] if rule is merge_utils.task_arithmetic else [density]
    extra += [majority] if "ties" in name else []
    if name.endswith("svd"):
        merged = rule([part.delta(part.A.dtype) for part in parts], torch.tensor(weights), *extra)
        U, S, Vh = torch.linalg.svd(merged)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank], float(S[rank - 1] / (S[rank - 1] - S[rank]))
    products = [weight * part.scaling for part, weight in zip(parts, weights, strict=True)]
    signed = torch.tensor([math.copysign(abs(p) ** 0.5, p) for p in products])
    A = rule([part.A for part in parts], signed, *extra)
    B = rule([part.B for part in parts], signed.abs(), *extra)
    return B @ A, 1.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cat"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(64, 48), (24, 90)])
@pytest.mark.parametrize("density", [0.2, 0.75])
def test_same_delta_as_its_functions(name, majority, count, shape, density):
    """Also for random pruning: from one state of the default generator both draw the same masks."""
    parts, weights = parts_of(shape, count), WEIGHTS[count]
    options = CombineOptions(density=density, majority_sign_method=majority)
    torch.manual_seed(5)
    found = combine(parts, weights, name, options).factors.delta(F64)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    wanted, doubt = judged(parts, weights, name, density, majority, 8)
    assert torch.equal(torch.get_rng_state(), after)
    assert (found - wanted).norm() <= max(1.0, doubt / 10) * TOLERANCE * size(parts, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "dare_linear"])
def test_half_precision(name, dtype):
    """PEFT rounds after every step, we once: we are nearer to the exact result, and within its rounding of it."""
    parts, weights = parts_of((64, 48), 2, dtype=dtype), WEIGHTS[2]
    wide = [Factors(part.A.double(), part.B.double(), part.scaling) for part in parts]
    torch.manual_seed(5)
    found = combine(parts, weights, name, CombineOptions(density=0.5)).factors.delta(F64)
    torch.manual_seed(5)
    theirs = judged(parts, weights, name, 0.5, "total", 8)[0].double()
    torch.manual_seed(5)
    exact = combine(
        [Factors(p.A.float(), p.B.float(), p.scaling) for p in wide],
        weights,
        name,
        CombineOptions(density=0.5),
    )
    exact = exact.factors.delta(F64)
    assert (found - exact).norm() <= torch.finfo(dtype).eps * size(parts, weights)
    if name == "linear":
        assert (theirs - exact).norm() <= 4 * torch.finfo(dtype).eps * size(parts, weights)


@pytest.fixture(scope="module")
def model():
    """PEFT's, with three adapters of rank 4 and one of 6, of unlike scalings, one of them rsLoRA's."""
    fields = {"target_modules": ["first", "middle", "head"], "lora_bias": False}
    model = peft.get_peft_model(
        build("plain"), peft.LoraConfig(r=4, lora_alpha=6, **fields), adapter_name="one"
    )
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=2, **fields))
    model.add_adapter("three", peft.LoraConfig(r=4, lora_alpha=9, use_rslora=True, **fields))
    model.add_adapter("six", peft.LoraConfig(r=6, lora_alpha=6, **fields))
    for seed, name in enumerate(("one", "two", "three", "six")):
        model.set_adapter(name)
        randomize(model, seed)
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), Linear)]


def factors_of(layer, name):
    return Factors(
        layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("adapters", "weights", "rank"),
    [
        (["one", "two"], [1.0, 1.0], None),
        (["one", "two", "three"], [0.7, -0.4, 1.1], None),
        (["one", "six"], [-0.5, 2.0], None),
        (["one", "three"], [1.0, 0.5], 3),
        (["two"], [-0.6], None),
    ],
)
def test_same_adapter_as_add_weighted_adapter(model, name, adapters, weights, rank, monkeypatch):
    if METHODS[name].equal_ranks and "six" in adapters:
        with pytest.raises(ValueError, match="same r"):
            model.add_weighted_adapter(adapters, weights, "sum", combination_type=name, density=0.6)
        with pytest.raises(ValueError, match="equal ranks"):
            parts = [factors_of(layers_of(model)[0], adapter) for adapter in adapters]
            combine(parts, weights, name, CombineOptions(density=0.6))
        return
    inject = model.base_model.inject_adapter

    def inject_then_seed(*args, **kwargs):  # making the new adapter draws too
        inject(*args, **kwargs)
        torch.manual_seed(9)

    monkeypatch.setattr(model.base_model, "inject_adapter", inject_then_seed)
    model.add_weighted_adapter(adapters, weights, "sum", combination_type=name, svd_rank=rank, density=0.6)
    try:
        torch.manual_seed(9)
        for layer in layers_of(model):
            parts = [factors_of(layer, adapter) for adapter in adapters]
            found = combine(parts, weights, name, CombineOptions(density=0.6, rank=rank)).factors
            assert found.rank == layer.r["sum"]
            if name.endswith("svd") and len(parts) > 1 and found.rank > min(found.shape):
                continue  # see test_a_rank_that_peft_cannot_give
            theirs = layer.get_delta_weight("sum").detach().double()
            assert (found.delta(F64) - theirs).norm() <= TOLERANCE * size(parts, weights)
    finally:
        model.delete_adapter("sum")


@pytest.mark.parametrize("clamp", [0.9, 0.99, 1.0])
def test_same_quantile_as_its_clamp(clamp):
    """The quantile is one of signed entries, so it depends on the signs of the vectors: PEFT's steps, on ours."""
    parts, weights = parts_of((64, 48), 2), WEIGHTS[2]
    plain = combine(parts, weights, "svd").factors
    entries = torch.cat([plain.B.flatten(), plain.A.flatten()])
    high = torch.quantile(entries, clamp)
    found = combine(parts, weights, "svd", CombineOptions(svd_clamp=clamp)).factors
    torch.testing.assert_close(found.B, plain.B.clamp(-high, high))
    torch.testing.assert_close(found.A, plain.A.clamp(-high, high))


def test_a_rank_that_peft_cannot_give():
    """Above the smaller dimension PEFT's A and B do not fit each other; here the rank is filled up."""
    model = peft.get_peft_model(
        build("plain"), peft.LoraConfig(r=2, target_modules=["head"]), adapter_name="one"
    )
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["head"]))
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        randomize(model, seed)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "nine", combination_type="svd", svd_rank=9)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layers_of(model)[0].get_delta_weight("nine")
    parts = [factors_of(layers_of(model)[0], adapter) for adapter in ("one", "two")]
    found = combine(parts, [1.0, 1.0], "svd", CombineOptions(rank=9)).factors
    assert found.rank == 9
    exact = sum(part.delta(F64) for part in parts)
    assert (found.delta(F64) - exact).norm() <= TOLERANCE * exact.norm()
