"""The Triton kernels of a mixed batch, run by Triton's interpreter on the CPU, and compiled for the GPUs in use.

The interpreter is chosen when a kernel is defined, so the cases run in a process of their own: this file as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from lorakit.errors import UnsupportedError
from lorakit.ops import Bank, Groups, Term, lora_grouped_reference

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed")

TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 1e-3}

# name: (ids, true ranks, tokens, (in, out), which adapters are not on the layer)
CASES = {
    "one token": ([0], [4], 1, (24, 40), ()),
    "decode": ([2, 0, -1, 1, 2, 2, 0], [4, 16, 33], 1, (100, 40), ()),
    "decode, the sum over the features split": ([1, 0, 1], [16, 8], 1, (2048, 72), ()),
    "ranks beyond one block": ([0, 1, 0, -1], [8, 80], 7, (64, 130), ()),
    "more tokens than a tile": ([3, 1, 3], [16, 2, 16, 16], 40, (520, 64), ()),
    "one not on this layer": ([0, 1, 0, 1], [4, 4], 3, (24, 40), (0,)),
    "base alone": ([-1, -1], [4], 3, (24, 40), ()),
    "no tokens": ([0, 1], [4, 4], 0, (24, 40), ()),
    "an unused adapter": ([2, 2, 0], [4, 64, 8], 5, (32, 32), ()),
}
DTYPES = list(TOLERANCE)


def build(name, dtype):
    ids, ranks, tokens, (features, out), absent = CASES[name]
    torch.manual_seed(0)
    terms = [
        None
        if k in absent
        else Term(
            torch.randn(r, features).to(dtype),
            torch.randn(out, r).to(dtype),
            torch.randn(out).to(dtype) if k % 2 else None,
            0.5 + k,
            0.0,
        )
        for k, r in enumerate(ranks)
    ]
    x, y = torch.randn(len(ids), tokens, features).to(dtype), torch.randn(len(ids), tokens, out).to(dtype)
    return terms, Groups.make(ids, len(ranks), "cpu"), x, y


def in_double(terms, groups, x, y):
    wide = [t and Term(*(None if q is None else q.double() for q in t[:3]), *t[3:]) for t in terms]
    return lora_grouped_reference(y.double(), x.double(), wide, groups)


def error_of(got, want):
    return ((got.double() - want).norm() / (want.norm() or 1.0)).item()


def refusal(call):
    with pytest.raises(UnsupportedError) as raised:
        call()
    return str(raised.value)


def run_cases():
    """What the tests below look at, by name. Runs where TRITON_INTERPRET is set."""
    from lorakit.ops.triton import lora_grouped
    from lorakit.ops.triton.schedule import Schedule

    found = {}
    for name in CASES:
        for dtype in DTYPES:
            terms, groups, x, y = build(name, getattr(torch, dtype))
            want, before = in_double(terms, groups, x, y), y.clone()
            got = lora_grouped(y, x, Bank.stack(terms), groups)
            base = [k for k, i in enumerate(groups.samples) if i < 0 or terms[i] is None]
            found[f"{name}, {dtype}"] = {
                "error": error_of(got, want),
                "in place": got is y,
                "base untouched": torch.equal(got[base], before[base]),
            }
    terms, groups, x, y = build("ranks beyond one block", torch.bfloat16)
    found["y in float32"] = error_of(
        lora_grouped(y.float(), x, Bank.stack(terms), groups), in_double(terms, groups, x, y)
    )
    terms, groups, x, y = build("more tokens than a tile", torch.float32)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    found["strided x"] = error_of(
        lora_grouped(y.clone(), strided, Bank.stack(terms), groups), in_double(terms, groups, x, y)
    )
    deep = lora_grouped(y.clone().view(3, 5, 8, -1), x.view(3, 5, 8, -1), Bank.stack(terms), groups)
    found["more dimensions"] = error_of(deep.view(y.shape), in_double(terms, groups, x, y))
    other = Groups.make([0, -1, 1], 4, "cpu")
    Schedule.of(groups, 40).copy_(Schedule.of(other, 40))
    found["another batch into the same schedule"] = error_of(
        lora_grouped(y.clone(), x, Bank.stack(terms), groups), in_double(terms, other, x, y)
    )
    found["refused"] = [
        refusal(lambda: lora_grouped(y.double(), x.double(), Bank.stack(terms), groups)),
        refusal(lambda: lora_grouped(y.transpose(0, 1), x, Bank.stack(terms), groups)),
    ]
    return found


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_float64_reference(found, name, dtype):
    case = found[f"{name}, {dtype}"]
    assert case["error"] <= TOLERANCE[dtype]
    assert case["in place"]
    assert case["base untouched"]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("y in float32", TOLERANCE["bfloat16"]),
        ("strided x", TOLERANCE["float32"]),
        ("more dimensions", TOLERANCE["float32"]),
        ("another batch into the same schedule", TOLERANCE["float32"]),
    ],
)
def test_other_inputs_equal_the_float64_reference(found, name, tolerance):
    assert found[name] <= tolerance


def test_what_the_kernels_do_not_take_is_refused(found):
    assert len(found["refused"]) == 2
    assert all("call lorakit.ops.lora_grouped" in message for message in found["refused"])


@pytest.mark.parametrize(
    ("ids", "count", "tokens"),
    [([0, 1, 1, -1, 3], 4, 1), ([2] * 9, 3, 33), ([-1], 1, 5), (list(range(40)), 40, 3)],
)
def test_tiles_cover_every_adapted_row_once_and_their_number_is_that_of_every_batch(ids, count, tokens):
    from lorakit.ops.triton.schedule import Schedule

    groups = Groups.make(ids, count, "cpu")
    schedule = Schedule.of(groups, tokens)
    rows = []
    for adapter, start, end in schedule.tiles.tolist():
        if adapter >= 0:
            own = range(start, min(start + schedule.rows, end))
            assert all(ids[schedule.order[row // tokens]] == adapter for row in own)
            rows += own
    first = ids.count(-1) * tokens
    assert rows == list(range(first, len(ids) * tokens))
    for other in ([-1] * len(ids), [0] * len(ids), [k % count for k in range(len(ids))]):
        assert Schedule.of(Groups.make(other, count, "cpu"), tokens).tiles.shape == schedule.tiles.shape


def test_importing_the_ops_does_not_import_triton():
    code = "import sys, lorakit, lorakit.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorakit.ops.triton.kernels import expand_kernel, shrink_kernel

for capability, names in ((80, ("bf16", "fp32")), (90, ("bf16", "fp16"))):
    for name in names:
        for kernel in (shrink_kernel, expand_kernel):
            dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[name]
            sizes = dict(BLOCK_ROWS=16, BLOCK_RANK=16, BLOCK_K=64, BLOCK_OUT=64, SPLIT=2, PRODUCTS=dtype, HAS_BIAS=True)
            types = dict.fromkeys(("x", "A", "B", "y", "biases"), "*" + name) | {"h": "*fp32", "scalings": "*fp32"}
            types |= dict.fromkeys(("order", "tiles", "first_rows"), "*i32")
            types |= dict.fromkeys(("features", "tokens", "rows_total", "widest"), "i32")
            types |= dict.fromkeys(sizes, "constexpr")
            source = ASTSource(
                fn=kernel,
                signature={argument: types[argument] for argument in kernel.arg_names},
                constexprs={key: value for key, value in sizes.items() if key in kernel.arg_names},
            )
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(capability, name, "mma" in made.asm["ptx"])
"""


def test_the_kernels_compile_for_gpus(tmp_path):
    """No GPU is needed to compile; only half precisions come out as tensor core instructions."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 8
    assert all((tensor_cores == "True") == (dtype != "fp32") for _, dtype, tensor_cores in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run_cases()))
