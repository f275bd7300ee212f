"""The Triton kernels of one adapter, run by Triton's interpreter on the CPU, and compiled for the GPUs in use.

The interpreter is chosen when a kernel is defined, so the cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import linear

from lorakit.ops import Term, dora, fused, lora_add, lora_linear

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed")

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
P, SCALING = 0.3, 1.7

# name: (rows, in, out, rank)
SHAPES = {
    "ragged": (70, 100, 130, 5),
    "one row": (1, 24, 40, 16),
    "two blocks of rows, rank no power of two": (80, 64, 72, 33),
    "ranks beyond one block": (9, 40, 24, 80),
    "rank one": (65, 16, 16, 1),
    "no rows": (0, 24, 40, 4),
}
WANTED = {
    "all": (True, True, True),
    "no x": (False, True, True),
    "A frozen": (True, False, True),
    "B frozen": (True, True, False),
}


def error_of(got, want):
    return ((got.double() - want).norm() / (want.norm() or 1.0)).item()


def build(name, dtype, wanted=(True, True, True)):
    rows, features, out, rank = SHAPES[name]
    torch.manual_seed(0)
    shapes = ((rows, features), (rank, features), (out, rank))
    made = [torch.randn(*s).to(dtype).requires_grad_(want) for s, want in zip(shapes, wanted, strict=True)]
    bias = torch.randn(out).to(dtype).requires_grad_()
    return (*made, bias, torch.randn(out, features).to(dtype), torch.randn(rows, out).to(dtype))


def outputs_and_gradients(name, dtype, wanted, op):
    """What `op` gives, and the same in float64 with the mask that the kernels write down."""
    from lorakit.ops.triton.dropped import keep_mask

    x, A, B, bias, W, dy = build(name, dtype, wanted)
    torch.manual_seed(5)
    y = op(x, W, Term(A, B, bias, SCALING, P))
    torch.manual_seed(5)
    (seed,) = fused.draw_seeds(1)
    leaves = [t for t in (x, A, B, bias) if t.requires_grad]
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, A, B, bias)]
    kept = keep_mask(x.numel(), P, seed, x.device).view(x.shape) if x.numel() else torch.ones_like(x)
    base = linear(wide[0], W.double())
    want_y = base + SCALING * (linear(linear(wide[0] * kept / (1 - P), wide[1]), wide[2]) + wide[3])
    want = [want_y, *torch.autograd.grad(want_y, [t for t in wide if t.requires_grad], dy.double())]
    return max(error_of(g, w) for g, w in zip(got, want, strict=True)), [g.dtype == dtype for g in got]


def by_linear(x, W, term):
    return lora_linear(x, W, None, [term])


def by_add(x, W, term):
    return lora_add(linear(x, W), x, [term])


def second_derivative(found):
    """A gradient of a gradient uses the mask of the forward."""
    x, A, B, bias, W, dy = build("ragged", torch.float32)

    def penalty():
        torch.manual_seed(5)
        y = lora_linear(x, W, None, [Term(A, B, bias, SCALING, P)])
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return dx.square().sum()

    torch.manual_seed(5)
    (seed,) = fused.draw_seeds(1)
    from lorakit.ops.triton.dropped import keep_mask

    kept = keep_mask(x.numel(), P, seed, x.device).view(x.shape)
    A64, B64 = (t.detach().double().requires_grad_() for t in (A, B))
    dx = dy.double() @ W.double() + SCALING / (1 - P) * kept * (dy.double() @ B64 @ A64)
    want = torch.autograd.grad(dx.square().sum(), (A64, B64))
    got = torch.autograd.grad(penalty(), (A, B))
    found["second derivative"] = max(error_of(g, w) for g, w in zip(got, want, strict=True))


def statistics(found):
    from lorakit.ops.triton.dropped import keep_mask

    count = 2**17
    for p in (0.05, 0.5, 0.9):
        first, second = (keep_mask(count, p, seed, torch.device("cpu")) for seed in (7, 8))
        dropped, other = (~first).double(), (~second).double()
        deviation = (p * (1 - p) / count) ** 0.5
        pairs = {
            "next": dropped[1:] * dropped[:-1],
            "row": dropped[64:] * dropped[:-64],
            "seed": dropped * other,
        }
        wide = (p**2 * (1 - p**2) / count) ** 0.5
        found[f"statistics {p}"] = {
            "mean": (dropped.mean().item() - p) / deviation,
            **{name: (both.mean().item() - p**2) / wide for name, both in pairs.items()},
        }
    found["the same seed"] = bool(
        torch.equal(
            keep_mask(5000, 0.3, 2**62 + 3, torch.device("cpu"))[:3000],
            keep_mask(3000, 0.3, 2**62 + 3, torch.device("cpu")),
        )
    )


def norms(found):
    for dtype in TOLERANCE:
        for out, features, rank, transposed in (
            (70, 100, 5, False), (33, 64, 16, True), (16, 16, 1, False), (40, 130, 80, True),
        ):  # fmt: skip
            torch.manual_seed(0)
            W = torch.randn(out, features).to(getattr(torch, dtype))
            A, B = torch.randn(rank, features), torch.randn(out, rank)
            stored = dora.Matrix(W.t().contiguous() if transposed else W, transposed)
            got = dora.row_norms(stored, dora.row_squares(stored), A, B, 0.5)
            want = (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
            found[f"norms {dtype} {out} {transposed}"] = error_of(got, want)
    W = torch.randn(20, 8)
    A, B = torch.randn(8, 8), torch.empty(20, 8)
    B = -torch.linalg.solve(A.T, W.T).T  # W + B A is zero
    cancelled = dora.row_norms(dora.Matrix(W), dora.row_squares(dora.Matrix(W)), A, B, 1.0)
    found["cancelled"] = bool((cancelled > 0).all() and (cancelled < 0.05 * W.norm(dim=1)).all())


def run_cases():
    """What the tests below look at, by name. Runs where TRITON_INTERPRET is set, with the kernels chosen on the CPU."""
    fused.decides_in_registers = lambda *_: True
    dora._on_kernels = lambda *_: True
    found = {}
    for dtype in TOLERANCE:
        for name in SHAPES:
            found[f"{name}, {dtype}"] = outputs_and_gradients(
                name, getattr(torch, dtype), WANTED["all"], by_linear
            )
    for wanted, needs in WANTED.items():
        for op in (by_linear, by_add):
            found[f"{wanted}, {op.__name__}"] = outputs_and_gradients("ragged", torch.float32, needs, op)
    second_derivative(found)
    statistics(found)
    norms(found)
    return found


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_equal_the_float64_reference(found, name, dtype):
    error, dtypes = found[f"{name}, {dtype}"]
    assert error <= TOLERANCE[dtype]
    assert all(dtypes)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("op", ["by_linear", "by_add"])
def test_frozen_parts_and_both_entry_points(found, wanted, op):
    error, dtypes = found[f"{wanted}, {op}"]
    assert error <= TOLERANCE["float32"]
    assert len(dtypes) == 2 + sum(WANTED[wanted])


def test_a_second_derivative_drops_the_same_elements(found):
    assert found["second derivative"] <= TOLERANCE["float32"]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_elements_are_dropped_with_probability_p_and_independently(found, p):
    """Seeds are fixed, so this cannot flicker; 4 standard deviations are exceeded once in 16,000."""
    assert {name: abs(value) < 4 for name, value in found[f"statistics {p}"].items()} == dict.fromkeys(
        ("mean", "next", "row", "seed"), True
    )


def test_the_mask_is_a_function_of_seed_and_index(found):
    assert found["the same seed"]


def test_row_norms_equal_those_of_the_dense_sum(found):
    errors = {name: error for name, error in found.items() if name.startswith("norms ")}
    assert len(errors) == 8
    assert all(error <= 1e-6 for error in errors.values()), errors


def test_norms_of_rows_that_cancel_are_small_and_positive(found):
    assert found["cancelled"]


def test_the_kernels_are_not_chosen_on_the_cpu():
    A, B = torch.randn(4, 8), torch.randn(8, 4)
    assert not fused.decides_in_registers(A, 10, torch.float32)
    assert not dora._on_kernels(torch.randn(8, 8), A, B)


class OnGPU(NamedTuple):
    """What the choice looks at of an A on a GPU."""

    shape: tuple[int, int]
    is_cuda: bool = True


@pytest.mark.parametrize(
    ("rank", "rows", "products", "chosen"),
    [
        (16, 8192, torch.bfloat16, True),
        (128, 8192, torch.float16, True),
        (16, 8192, torch.float32, False),
        (129, 8192, torch.bfloat16, False),
        (16, 2**19, torch.bfloat16, False),  # 2**31 elements
        (16, 8192, torch.float64, False),
    ],
)
def test_what_the_kernels_do_not_take_goes_the_other_way(rank, rows, products, chosen):
    assert fused.decides_in_registers(OnGPU((rank, 4096)), rows, products) is chosen


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.ops.triton import dropped_kernels as k
from lorakit.ops.triton.norms import row_norms_kernel

kernels = (k.keep_kernel, k.shrink_dropped_kernel, k.read_dy_kernel, k.down_gradient_kernel, k.add_kept_kernel, row_norms_kernel)
tensors = ("x", "A", "B", "W", "dy", "h", "dh", "dx")
wide = ("dA", "dB", "gram", "squares", "norms")
for capability, names in ((80, ("bf16",)), (90, ("fp16",))):
    for name in names:
        for kernel in kernels:
            dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[name]
            rank = 128 if kernel in (k.read_dy_kernel, row_norms_kernel) else 64
            sizes = dict(BLOCK_ROWS=64, BLOCK_RANK=rank, BLOCK_K=64, BLOCK_OUT=64, BLOCK=1024, PRODUCTS=dtype)
            sizes |= dict(BLOCK_ROWS=32, BLOCK_K=32) if kernel is row_norms_kernel else {}
            types = dict.fromkeys(tensors, "*" + name) | dict.fromkeys(wide, "*fp32") | {"kept": "*i8", "seed": "i64"}
            if kernel is row_norms_kernel:
                types |= {"A": "*fp32", "B": "*fp32"}
            types |= dict.fromkeys(("p", "alpha", "least"), "fp32") | dict.fromkeys(sizes, "constexpr")
            source = ASTSource(
                fn=kernel,
                signature={argument: types.get(argument, "i32") for argument in kernel.arg_names},
                constexprs={key: value for key, value in sizes.items() if key in kernel.arg_names},
            )
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            products = kernel not in (k.keep_kernel, row_norms_kernel)
            print(capability, name, products, "mma" in made.asm["ptx"], made.metadata.shared)
"""
SHARED_MEMORY = {"80": 163 * 1024, "90": 227 * 1024}  # bytes of a block, at most


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path):
    """No GPU is needed to compile; products of half precisions come out as tensor core instructions."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 12
    for capability, _, products, tensor_cores, shared in rows:
        assert tensor_cores == products
        assert int(shared) <= SHARED_MEMORY[capability]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run_cases()))
