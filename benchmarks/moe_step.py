"""Experts with adapters on both of their stacks: lorakit against PEFT and the frozen experts.

Run `python -m benchmarks.moe_step` from the root of the repository. One block of Qwen3-MoE's experts, r=16 on
`gate_up_proj` and `down_proj`, adapters in fp32; the tokens want a gradient, as they do inside a model. Three tables:
forward and backward, forward without gradients, and one token without gradients. A first step compares outputs and
gradients, and stops if they disagree. Memory is what autograd keeps for backward, each storage once, without parameters.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lorakit
from benchmarks.timing import Row, interleave, keeps, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
AGREE = {torch.float32: 5e-6, torch.bfloat16: 3e-2}  # relative, Frobenius
MIB = 2**20


class Case(NamedTuple):
    """One size: `d` features in and out, `f` inside, each token through `top` of the experts."""

    experts: int
    d: int
    f: int
    top: int
    tokens: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"E={self.experts} d={self.d} f={self.f} top-{self.top} T={self.tokens} {kind}"


FULL = [
    Case(32, 512, 256, 4, 256, torch.float32),
    Case(128, 512, 256, 8, 256, torch.float32),
    Case(64, 1024, 512, 4, 512, torch.bfloat16),
]
QUICK = [FULL[0]]


class Block(nn.Module):
    """The experts alone; the router is outside."""

    def __init__(self, case: Case, way: str) -> None:
        super().__init__()
        config = Qwen3MoeConfig(num_experts=case.experts, hidden_size=case.d, moe_intermediate_size=case.f)
        config._experts_implementation = way
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


class Inputs(NamedTuple):
    x: Tensor
    chosen: Tensor
    weights: Tensor
    dy: Tensor


def frozen_block(case: Case, way: str) -> Block:
    torch.manual_seed(0)
    block = Block(case, way)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.03)
    return block.to(case.dtype).requires_grad_(requires_grad=False)


def models(case: Case, way: str) -> dict[str, nn.Module]:
    fields = {"r": 16, "lora_alpha": 32, "target_modules": [], "target_parameters": TARGETS}
    found = {
        "lorakit": lorakit.get_peft_model(frozen_block(case, way), lorakit.LoraConfig(**fields)),
        "PEFT": peft.get_peft_model(frozen_block(case, way), peft.LoraConfig(**fields)),
        "frozen": frozen_block(case, way),
    }
    for model in found.values():
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return found


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    chosen = torch.stack(
        [torch.randperm(case.experts, generator=generator)[: case.top] for _ in range(case.tokens)]
    )
    weights = draw(case.tokens, case.top).softmax(-1)
    return Inputs(draw(case.tokens, case.d).requires_grad_(), chosen, weights, draw(case.tokens, case.d))


def step(model: nn.Module, given: Inputs) -> Callable[[], list[Tensor]]:
    """Forward and backward; the gradients are handed out and dropped."""
    leaves = [given.x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        y = model(given.x, given.chosen, given.weights)
        y.backward(given.dy)
        found = [y.detach(), *(leaf.grad for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None
        return found

    return run


def evaluate(model: nn.Module, given: Inputs, tokens: int) -> Callable[[], Tensor]:
    first = [tensor[:tokens] for tensor in given[:3]]

    def run() -> Tensor:
        with torch.no_grad():
            return model(*first)

    return run


def check(sides: dict[str, nn.Module], given: Inputs, case: Case) -> float:
    """Largest relative difference of an output or a gradient; stops where it is too large."""
    mine, other = (step(sides[name], given)() for name in ("lorakit", "PEFT"))
    worst = max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(mine, other, strict=True)
    )
    if not worst <= AGREE[case.dtype]:
        raise SystemExit(f"{case}: lorakit and PEFT differ by {worst:.1e}")
    return worst


def saved_mib(model: nn.Module, given: Inputs) -> float:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(given.x, given.chosen, given.weights)
    del y
    return sum(kept.values()) / MIB


def rounds_for(case: Case, way: str, *, quick: bool) -> dict[str, int]:
    """PEFT's eager step takes up to 13 s: its gradient of each expert is as large as the stack."""
    if quick:
        return {"rounds": 3, "warmup": 1}
    return {"rounds": 3, "warmup": 1} if way == "eager" and case.experts > 32 else {"rounds": 11, "warmup": 2}


def measure(case: Case, way: str, *, quick: bool) -> tuple[list[Row], dict[str, float]]:
    sides, given = models(case, way), inputs(case)
    numbers = {"difference": check(sides, given, case)}
    numbers |= {f"saved MiB, {name}": saved_mib(model, given) for name, model in sides.items()}
    times = rounds_for(case, way, quick=quick)
    runs = {
        "step": {name: step(model, given) for name, model in sides.items()},
        "eval": {name: evaluate(model, given, case.tokens) for name, model in sides.items()},
        "one token": {name: evaluate(model, given, 1) for name, model in sides.items()},
    }
    return [interleave(f"{case}, {way}, {what}", run, **times) for what, run in runs.items()], numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest size in one way, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows, memory = [], {}
    print(f"{'experts':<68}{'ms':>9}{'PEFT/ours':>17}{'ours/frozen':>13}   saved MiB: ours, PEFT, frozen")
    for case in QUICK if quick else FULL:
        for way in ("grouped_mm",) if quick else ("grouped_mm", "eager"):
            found, numbers = measure(case, way, quick=quick)
            rows += found
            memory[f"{case}, {way}"] = numbers
            saved = "".join(
                f"{numbers[f'saved MiB, {name}']:>9.1f}" for name in ("lorakit", "PEFT", "frozen")
            )
            for row in found:
                print(
                    f"{row.name:<68}{row.milliseconds['lorakit']:>9.2f}{row.ratio['PEFT']:>10.2f} ±{row.spread['PEFT']:<5.2f}"
                    f"{1 / row.ratio['frozen']:>13.2f}{saved if row is found[0] else ''}",
                    flush=True,
                )
    if keeps(full=not quick):
        save("moe_step", rows, {"memory": memory})


if __name__ == "__main__":
    main()
