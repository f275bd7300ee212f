"""One projection, forward and backward: lorakit's two ops against PEFT's layer and the frozen base.

Run `python -m benchmarks.one_layer` from the root of the repository. The input requires a gradient, the base weight is
frozen, adapters are float32 with r=16. One thread, CPU time of that thread, the candidates interleaved, medians.
A first step compares outputs and gradients, and stops if they disagree. `lora_linear` computes the base product too;
`lora_add` adds to what any base gave: the table has a row for each. The base of "nf4" is a bf16 weight in
bitsandbytes' `Linear4bit` with quantised scales; PEFT's side is the layer that it gives to models loaded in 4 bits.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, NamedTuple

import bitsandbytes
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear

from benchmarks.timing import Row, keeps, save, summarise
from lorakit.ops import Term, lora_add, lora_linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RANK, ALPHA = 16, 32
OURS = {"lora_add", "lora_linear"}
# without bf16 arithmetic one bf16 product of these sizes takes seconds, and says nothing of the layers
KINDS = "fp32,bf16,nf4" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}  # of x
AGREE = {"fp32": 2e-6, "bf16": 2e-2, "nf4": 2e-2}  # relative, Frobenius


class Case(NamedTuple):
    """One row of the table; shape is (in, out), kind says how the base weight is stored."""

    shape: tuple[int, int]
    kind: str
    dropout: float
    tokens: int


class Candidates(NamedTuple):
    """The same layer on each side, and its tensors; those of ours are in `OURS`."""

    forwards: dict[str, Callable[[Tensor], Tensor]]
    parameters: list[Tensor]
    x: Tensor
    dy: Tensor


def frozen_base(case: Case) -> torch.nn.Linear:
    """A linear layer without a bias."""
    features, out = case.shape
    base = torch.nn.Linear(features, out, bias=False, dtype=DTYPE[case.kind])
    if case.kind == "nf4":
        weight = bitsandbytes.nn.Params4bit(base.weight.detach(), requires_grad=False, quant_type="nf4")
        base = bitsandbytes.nn.Linear4bit(features, out, bias=False, compute_dtype=torch.bfloat16)
        base.weight = weight
        base = base.to("cpu")  # which quantises
    return base.requires_grad_(requires_grad=False)


def build(case: Case) -> Candidates:
    torch.manual_seed(0)
    features, out = case.shape
    base = frozen_base(case)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout)
    kind = PeftLinear4bit if case.kind == "nf4" else PeftLinear
    layer = kind(base, "default", config=config, r=RANK, lora_alpha=ALPHA)
    layer.lora_A.float()  # the layer alone makes them in the base's dtype; get_peft_model then widens them
    layer.lora_B.float()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B, std=0.02)
    terms = [Term(A, B, None, ALPHA / RANK, case.dropout)]
    forwards = {"frozen": base, "PEFT": layer, "lora_add": lambda x: lora_add(base(x), x, terms)}
    if case.kind != "nf4":
        forwards["lora_linear"] = lambda x: lora_linear(x, base.weight, None, terms)
    x = torch.randn(case.tokens, features, dtype=DTYPE[case.kind], requires_grad=True)
    return Candidates(forwards, [A, B], x, torch.randn(case.tokens, out, dtype=DTYPE[case.kind]))


def step(forward: Callable[[Tensor], Tensor], c: Candidates) -> list[Tensor]:
    y = forward(c.x)
    y.backward(c.dy)
    grads = [t.grad for t in (c.x, *c.parameters)]
    for t in (c.x, *c.parameters):
        t.grad = None
    return [y.detach(), *[g for g in grads if g is not None]]


def check(case: Case) -> None:
    """Stop unless ours give PEFT's outputs and gradients without dropout."""
    c = build(case._replace(dropout=0.0))
    wanted = step(c.forwards["PEFT"], c)
    for name in OURS & c.forwards.keys():
        for label, got, want in zip(("y", "dx", "dA", "dB"), step(c.forwards[name], c), wanted, strict=True):
            error = float((got.double() - want.double()).norm() / want.double().norm())
            if not error <= AGREE[case.kind]:
                raise SystemExit(f"{case}: {label} of {name} is {error:.1e} from PEFT's")


def measure(case: Case, repeats: int) -> list[Row]:
    """One forward and backward of each candidate; a row for each of ours."""
    c = build(case)
    for forward in c.forwards.values():
        step(forward, c)
    times: dict[str, list[float]] = {name: [] for name in c.forwards}
    for _ in range(repeats):
        for name, forward in c.forwards.items():
            start = time.thread_time()
            step(forward, c)
            times[name].append(time.thread_time() - start)
    peers = {name: values for name, values in times.items() if name not in OURS}
    features, out = case.shape
    head = f"{features} x {out}, {case.kind}, p={case.dropout:g}"
    return [
        summarise(f"{head}, {name}", {"lorakit": values, **peers})
        for name, values in times.items()
        if name in OURS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--shapes", default="1024x1024,2816x1024,4096x4096", help="in x out, comma-separated")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--quick", action="store_true", help="fp32 at the smaller shapes, few repeats")
    args = parser.parse_args()
    full = vars(args) == vars(parser.parse_args([]))  # other sizes are not those on record
    if args.quick:
        args.repeats, args.shapes, args.kinds = 5, "1024x1024,2816x1024", "fp32"
    torch.set_num_threads(1)
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    rows = []
    print(f"{'in x out':<44}{'frozen ms':>10}{'PEFT ms':>9}{'PEFT/ours':>16}{'ours/frozen':>13}")
    for kind in args.kinds.split(","):
        for shape in shapes:
            check(Case(shape, kind, 0.0, args.tokens))
            for dropout in (0.0, 0.05):
                for row in measure(Case(shape, kind, dropout, args.tokens), args.repeats):
                    rows.append(row)
                    print(
                        f"{row.name:<44}{row.milliseconds['frozen']:>10.1f}{row.milliseconds['PEFT']:>9.1f}"
                        f"{row.ratio['PEFT']:>10.2f} ±{row.spread['PEFT']:.2f}{1 / row.ratio['frozen']:>13.2f}",
                        flush=True,
                    )
    if keeps(full=full):
        save("one_layer", rows)


if __name__ == "__main__":
    main()
