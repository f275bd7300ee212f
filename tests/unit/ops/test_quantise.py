"""Quantisers against the definition, entry by entry, and against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import quantise
from lorakit.ops.quantise import NF4, round_int8, round_nf4, round_uniform

SHAPES = [(8, 64), (7, 100), (3, 5), (1, 1), (40, 130)]
QUANTISERS = {
    "nf4": (round_nf4, NF4, 64),
    "2 bits": (lambda W: round_uniform(W, 4), (-1.0, -1 / 3, 1 / 3, 1.0), 64),
    "3 levels, blocks of 32": (lambda W: round_uniform(W, 3, 32), (-1.0, 0.0, 1.0), 32),
    "int8": (round_int8, tuple(k / 127 for k in range(-127, 128)), None),
}
every = pytest.mark.parametrize("name", list(QUANTISERS))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(W, levels, block):
    """The nearest level for each entry of each block, in fp64."""
    flat, out = W.double().flatten().tolist(), []
    for start in range(0, len(flat), block):
        values = flat[start : start + block]
        scale = max(map(abs, values))
        places = [level * scale for level in levels]
        out += [min(places, key=lambda near: abs(near - value)) for value in values]
    return torch.tensor(out, dtype=torch.float64).view(W.shape)


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_nearest_value_of_the_block(name, shape, dtype):
    quantiser, levels, block = QUANTISERS[name]
    W = normal(*shape, dtype=dtype)
    found, wanted = quantiser(W), naive(W, levels, block or shape[1])
    assert found.dtype == dtype
    assert found.shape == W.shape
    assert (found - wanted).abs().max() <= 1e-6 * W.abs().max()


@every
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_again_changes_nothing(name, shape):
    quantiser = QUANTISERS[name][0]
    once = quantiser(normal(*shape))
    assert torch.equal(quantiser(once), once)


@every
def test_few_values_in_a_block_and_the_largest_is_kept(name):
    quantiser, levels, block = QUANTISERS[name]
    W = normal(16, 320)
    blocks, rounded = (M.view(-1, block or 320) for M in (W, quantiser(W)))
    for before, after in zip(blocks, rounded, strict=True):
        assert after.unique().numel() <= len(levels)
        assert after.abs().max() == before.abs().max()
        assert after[before.abs().argmax()] == before[before.abs().argmax()]


@every
def test_zeros_and_sizes(name):
    quantiser = QUANTISERS[name][0]
    W = normal(4, 128)
    W[1] = 0
    W[2] *= 1e-30
    W[3] *= 1e30
    found = quantiser(W)
    assert (found[1] == 0).all()
    assert found.isfinite().all()
    for row in (2, 3):
        alone = quantiser(W[row : row + 1])[0]
        assert torch.equal(found[row], alone)
        assert (found[row] - W[row]).norm() <= 0.8 * W[row].norm()


@every
def test_a_tensor_that_is_no_plain_block_of_memory(name):
    quantiser = QUANTISERS[name][0]
    W = normal(300, 200)
    assert torch.equal(quantiser(W.mT), quantiser(W.mT.contiguous()))
    assert torch.equal(W, normal(300, 200))


def test_chunks_make_no_difference(monkeypatch):
    W = normal(300, 200)
    whole = round_nf4(W), round_int8(W)
    monkeypatch.setattr(quantise, "_CHUNK", 64)
    assert torch.equal(round_nf4(W), whole[0])
    assert torch.equal(round_int8(W), whole[1])


def test_the_levels_come_out_exactly():
    W = torch.tensor([NF4] * 4)
    assert torch.equal(round_nf4(W), W)


# Where rows are no multiple of 64 long and even, bitsandbytes' own kernel for the CPU gives scales to the wrong blocks.
@pytest.mark.parametrize("shape", [(8, 64), (7, 65), (3, 5), (1, 1), (1024, 1024)], ids=str)
def test_nf4_is_that_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(*shape, seed=3)
    packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    assert torch.equal(round_nf4(W), functional.dequantize_4bit(packed, state))
    again, state_again = functional.quantize_4bit(round_nf4(W), quant_type="nf4", blocksize=64)
    assert torch.equal(packed, again)
    assert torch.equal(state.absmax, state_again.absmax)


@pytest.mark.parametrize("shape", [(64, 128), (33, 70)], ids=str)
def test_int8_is_that_of_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(*shape, dtype=torch.float16, seed=3)  # what it takes
    codes, scale, _ = functional.int8_vectorwise_quant(W)
    theirs = functional.int8_vectorwise_dequant(codes, scale)
    step = scale.float()[:, None] / 127
    ours = round_int8(W.float())
    assert ((ours - theirs).abs() <= 1.01 * step).all()  # it scales in float16
    assert ((ours - theirs).abs() > 0.5 * step).float().mean() <= 0.05
    again, _, _ = functional.int8_vectorwise_quant(ours.half())
    assert torch.equal(again.float(), (ours / step).round())
    assert (ours - W.float()).norm() <= (theirs - W.float()).norm()
