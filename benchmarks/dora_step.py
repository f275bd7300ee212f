"""DoRA: a training step and an evaluation of one token, against PEFT's DoRA and against plain LoRA on both sides.

Run `python -m benchmarks.dora_step` from the root of the repository. r=16 and fp32 adapters; a Llama with
`target_modules="all-linear"`, then one layer without a bias. A first step compares outputs and gradients with PEFT's
DoRA, and stops if they disagree: on a bf16 base PEFT computes the norm in bf16, which is 3e-3 off.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from torch import nn

import lorakit
from benchmarks.timing import Row, interleave, keeps, save
from benchmarks.train_step import (
    VOCABULARY,
    base_model,
    check_agreement,
    copy_adapter,
    saved_bytes,
    size_for,
    step,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Run = Callable[[], object]

LORA = {"r": 16, "lora_alpha": 32}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative, Frobenius
MIB = 2**20


class Layer(NamedTuple):
    """One layer of `width` in and out, and how many tokens go through it; 0 trains on 512, else it evaluates."""

    width: int
    dtype: torch.dtype
    evaluated: int

    def __str__(self) -> str:
        kind = "fp32" if self.dtype == torch.float32 else "bf16"
        what = f"eval of {self.evaluated}" if self.evaluated else "step"
        return f"layer {self.width} x {self.width}, {kind}, {what}"


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.only = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        y: Tensor = self.only(x)
        return y


def sides(base: nn.Module, **changes: object) -> dict[str, nn.Module]:
    """The four models on copies of a base, with equal adapters; ours first."""
    arguments = {**LORA, **changes}
    made: dict[str, nn.Module] = {}
    for suffix, dora in (("", True), (" LoRA", False)):
        ours = lorakit.get_peft_model(copy.deepcopy(base), lorakit.LoraConfig(use_dora=dora, **arguments))
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(use_dora=dora, **arguments))
        copy_adapter(ours, theirs)
        made |= {f"lorakit{suffix}": ours, f"PEFT{suffix}": theirs}
    return made


def block(dtype: torch.dtype, dropout: float, *, quick: bool) -> tuple[Row, dict[str, float]]:
    """A training step of a Llama, and what it keeps for backward in MiB."""
    size = size_for(dtype, quick=quick)
    base = base_model(dtype, size)
    base.requires_grad_(requires_grad=False)
    models = sides(base, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    shape = (size.batch, size.sequence)
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    for model in models.values():
        model.eval()
    check_agreement(models["lorakit"], models["PEFT"], ids, TOLERANCE[dtype])
    for model in models.values():
        model.train()
    kind = "fp32" if dtype == torch.float32 else "bf16"
    row = interleave(
        f"Llama d={size.hidden} L={size.layers}, {kind}, p={dropout:g}",
        {name: step(model, ids) for name, model in models.items()},
        rounds=2 if quick else 15,
        warmup=1 if quick else 3,
    )
    return row, {name: saved_bytes(model, ids) / MIB for name, model in models.items()}


def layer(case: Layer, rounds: int) -> Row:
    torch.manual_seed(0)
    base = One(case.width, case.dtype).requires_grad_(requires_grad=False)
    models = sides(base, target_modules=["only"])
    x = torch.randn(case.evaluated or 512, case.width).to(case.dtype)
    dy = torch.randn_like(x)
    agree(models["lorakit"], models["PEFT"], x, dy, TOLERANCE[case.dtype])
    calls = max(1, 64 * 1024**2 // (case.width**2 * case.evaluated)) if case.evaluated else 1
    runs = {
        name: evaluation(model, x, calls) if case.evaluated else training(model, x, dy)
        for name, model in models.items()
    }
    row = interleave(str(case), runs, rounds=rounds)
    return replace(row, milliseconds={name: ms / calls for name, ms in row.milliseconds.items()})


def training(model: nn.Module, x: Tensor, dy: Tensor) -> Run:
    """Forward and backward, the input wanting a gradient."""
    model.train()

    def run() -> None:
        model(x.detach().requires_grad_()).backward(dy)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def evaluation(model: nn.Module, x: Tensor, calls: int) -> Run:
    """Forwards without gradients."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                model(x)

    return run


def agree(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, tolerance: float) -> None:
    """Stop unless outputs and gradients are the same."""
    found = []
    for model in (ours, theirs):
        given = x.detach().requires_grad_()
        y = model(given)
        y.backward(dy)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": given.grad, **grads})
        for parameter in model.parameters():
            parameter.grad = None
    mine, other = found
    assert mine.keys() == other.keys()
    for name in mine:
        error = float((mine[name].float() - other[name].float()).norm() / other[name].float().norm())
        assert error <= tolerance, f"{name} differs by {error:.2e}"


def show(row: Row) -> None:
    ratio, ms = row.ratio, row.milliseconds
    print(
        f"{row.name:<38}{ms['lorakit']:>10.2f}{1 / ratio['lorakit LoRA']:>14.2f}"
        f"{ratio['PEFT']:>12.2f} ±{row.spread['PEFT']:.2f}{ratio['PEFT LoRA']:>12.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one dtype, a smaller Llama, layers of 1024, few rounds"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtypes = [torch.float32, torch.bfloat16] if fast else [torch.float32]
    if quick:
        dtypes = dtypes[-1:]
    print(f"{'DoRA':<38}{'ms':>10}{'/ our LoRA':>14}{'PEFT / ours':>18}{'PEFT LoRA / ours':>18}")
    rows, memory = [], {}
    for dtype in dtypes if quick else (torch.float32, torch.bfloat16):
        for dropout in (0.0,) if quick else (0.0, 0.05):
            row, saved = block(dtype, dropout, quick=quick)
            show(row)
            print("  saved MiB: " + ", ".join(f"{name} {mib:.1f}" for name, mib in saved.items()))
            rows.append(row)
            memory[row.name] = saved
    for dtype in dtypes:
        for width in (1024,) if quick else (1024, 4096):
            for evaluated in (0, 1, 512):
                rounds = 5 if quick or width == 4096 else 15
                row = layer(Layer(width, dtype, evaluated), rounds)
                show(row)
                rows.append(row)
    if keeps(full=not quick):
        save("dora_step", rows, {"saved_mib": memory})


if __name__ == "__main__":
    main()
