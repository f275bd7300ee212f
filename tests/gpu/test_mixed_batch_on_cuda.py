"""Mixed-adapter batches on a CUDA device: the Triton kernels, the torch paths and training against the CPU's float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import linear

from lorakit.ops import Bank, Groups, Term, grouped, lora_grouped, lora_grouped_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
IN, OUT, RANKS = 1024, 768, (16, 8, 64, 16, 4)
IDS = [0, 2, -1, 1, 2, 0, 4, 2]


def build(dtype, *, tokens, grad=False):
    torch.manual_seed(0)
    terms = [
        Term(
            torch.randn(r, IN).div(IN**0.5).to("cuda", dtype).requires_grad_(grad),
            torch.randn(OUT, r).to("cuda", dtype).requires_grad_(grad),
            torch.randn(OUT).to("cuda", dtype).requires_grad_(grad) if k % 2 else None,
            0.5 + k,
            0.0,
        )
        for k, r in enumerate(RANKS)
    ]
    x = torch.randn(len(IDS), tokens, IN).to("cuda", dtype).requires_grad_(grad)
    return terms, x, torch.randn(len(IDS), tokens, OUT).to("cuda", dtype)


def reference(terms, x, y, ids=IDS):
    wide = [Term(*(None if q is None else q.detach().double().cpu() for q in t[:3]), *t[3:]) for t in terms]
    return lora_grouped_reference(
        y.double().cpu(), x.detach().double().cpu(), wide, Groups.make(ids, len(RANKS), "cpu")
    )


def error_of(got, want):
    return ((got.detach().double().cpu() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("triton", [pytest.param(True, marks=NEEDS_TRITON), False])
def test_equals_the_float64_reference(dtype, tokens, triton, monkeypatch):
    monkeypatch.setattr(grouped, "_has_triton", lambda: triton)
    terms, x, y = build(dtype, tokens=tokens)
    want = reference(terms, x, y)
    with torch.no_grad():
        got = lora_grouped(y, x, Bank.stack(terms), Groups.make(IDS, len(RANKS), "cuda"))
    assert got.data_ptr() == y.data_ptr()
    assert error_of(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 100])
def test_gradients_equal_the_float64_reference(dtype, tokens):
    terms, x, y = build(dtype, tokens=tokens, grad=True)
    got = lora_grouped(y, x, Bank.stack(terms), Groups.make(IDS, len(RANKS), "cuda"))
    leaves = [x, *(t for k in (0, 1, 2, 4) for t in terms[k][:3] if t is not None)]
    grads = torch.autograd.grad(got, leaves, torch.ones_like(got))
    wide = [
        Term(*(None if q is None else q.detach().double().cpu().requires_grad_() for q in t[:3]), *t[3:])
        for t in terms
    ]
    x64 = x.detach().double().cpu().requires_grad_()
    want = lora_grouped_reference(
        torch.zeros(*y.shape, dtype=torch.float64), x64, wide, Groups.make(IDS, len(RANKS), "cpu")
    )
    own = [x64, *(t for k in (0, 1, 2, 4) for t in wide[k][:3] if t is not None)]
    for a, b in zip(grads, torch.autograd.grad(want, own, torch.ones_like(want)), strict=True):
        assert error_of(a, b) <= TOLERANCE[dtype]


@NEEDS_TRITON
def test_a_captured_graph_serves_another_batch_without_a_word_to_the_host():
    from lorakit.ops.triton import lora_grouped as on_gpu
    from lorakit.ops.triton.schedule import Schedule

    terms, x, y = build(torch.bfloat16, tokens=1)
    bank, groups = Bank.stack(terms), Groups.make(IDS, len(RANKS), "cuda")
    W = torch.randn(OUT, IN, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(y)

    def step():
        out.copy_(on_gpu(linear(x, W), x, bank, groups))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles the kernels and stacks the factors
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    others = [4, -1, 3, 0, 0, 1, 1, 2]
    Schedule.of(groups, 1).copy_(Schedule.of(Groups.make(others, len(RANKS), "cuda"), 1))
    graph.replay()
    want = reference(terms, x, linear(x, W), others)
    assert error_of(out, want) <= TOLERANCE[torch.bfloat16]
