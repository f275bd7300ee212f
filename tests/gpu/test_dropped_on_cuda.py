"""The Triton kernels of one adapter with dropout, and of DoRA's norm, on a CUDA device against the CPU's float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import linear

from lorakit.ops import Term, dora, fused, lora_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed"),
]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
P, SCALING = 0.1, 2.0


def error_of(got, want):
    return ((got.detach().double().cpu() - want.detach().cpu()).norm() / want.norm().cpu()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "features", "out", "rank"),
    [(2048, 4096, 1024, 16), (333, 1000, 770, 5), (100, 512, 512, 128), (1, 64, 64, 33)],
)
def test_outputs_and_gradients_equal_the_float64_reference(dtype, rows, features, out, rank):
    from lorakit.ops.triton.dropped import keep_mask

    torch.manual_seed(0)
    x, A, B, W, dy = (
        torch.randn(*shape).div(shape[-1] ** 0.5).to("cuda", dtype)
        for shape in ((rows, features), (rank, features), (out, rank), (out, features), (rows, out))
    )
    leaves = [t.requires_grad_() for t in (x, A, B)]
    assert fused.decides_in_registers(A, rows, dtype)
    torch.manual_seed(5)
    y = lora_linear(x, W, None, [Term(A, B, None, SCALING, P)])
    torch.manual_seed(5)
    (seed,) = fused.draw_seeds(1)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    kept = keep_mask(x.numel(), P, seed, x.device).view(x.shape)
    want = linear(wide[0], W.double())
    want = want + SCALING / (1 - P) * linear(linear(wide[0] * kept, wide[1]), wide[2])
    assert error_of(y, want) <= TOLERANCE[dtype]
    got = torch.autograd.grad(y, leaves, dy)
    for mine, theirs in zip(got, torch.autograd.grad(want, wide, dy.double()), strict=True):
        assert error_of(mine, theirs) <= TOLERANCE[dtype]
    assert abs(1 - kept.double().mean().item() - P) < 5 * (P * (1 - P) / kept.numel()) ** 0.5


def test_nothing_as_large_as_the_input_is_made_for_dropout():
    """Neither a mask nor a dropped copy: 64 MiB of input, and a forward that takes less than a tenth of it."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    A, B = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in ((16, 4096), (64, 16))
    )
    W = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    terms = [Term(A, B, None, SCALING, P)]
    lora_linear(x, W, None, terms)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lora_linear(x, W, None, terms)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_row_norms_equal_those_of_the_dense_sum(dtype, transposed):
    torch.manual_seed(0)
    W = torch.randn(1000, 777).to("cuda", dtype)
    A, B = torch.randn(24, 777, device="cuda"), torch.randn(1000, 24, device="cuda")
    stored = dora.Matrix(W.t().contiguous() if transposed else W, transposed)
    assert dora._on_kernels(stored.values, A, B)
    got = dora.row_norms(stored, dora.row_squares(stored), A, B, 0.5)
    assert error_of(got, (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)) <= 1e-5
