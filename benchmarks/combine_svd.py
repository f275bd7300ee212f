"""Combining adapters of one weight: lorakit's SVD of factors and its pruning, against PEFT's on dense deltas.

PEFT's side is the method that its `add_weighted_adapter` calls for each layer, with its default `svd_full_matrices=True`.
Each run combines the adapters of several layers, one after the other as in a model, and times are for one layer.
Before timing, both sides must give the same delta. Run: python -m benchmarks.combine_svd [--quick]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from peft.utils.merge_utils import magnitude_based_pruning
from torch import nn

from benchmarks.timing import Row, interleave, keeps, save
from lorakit.combiners import CombineOptions, combine
from lorakit.combiners.pruning import largest
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Relative, Frobenius. Singular values r and r + 1 of random sums are 0.3 to 3 % apart, which lifts float32's rounding to
# 2e-6 to 4e-5 on PEFT's side and 2e-6 to 7e-6 on ours, both against float64.
AGREE = {
    "svd": 1e-4,
    "ties_svd": 1e-3,
}  # of equal elements at a threshold, PEFT keeps another one: 2e-4 in one layer of 8


class Case(NamedTuple):
    """One row of the table: adapters of an (out, in) weight."""

    method: str
    shape: tuple[int, int]
    rank: int
    adapters: int
    rounds: int = 9
    layers: int = 8
    quick: bool = True
    density: float = 0.5

    def __str__(self) -> str:
        return f"{self.method}, {self.adapters} x r={self.rank}, {self.shape[0]}x{self.shape[1]}"


CASES = [
    Case("svd", (1024, 1024), 16, 2),
    Case("svd", (2816, 1024), 16, 2, quick=False),
    Case("svd", (4096, 4096), 16, 2, rounds=5, layers=1, quick=False),
    Case("svd", (1024, 1024), 16, 8),
    Case("svd", (1024, 1024), 64, 4, quick=False),
    Case("ties_svd", (1024, 1024), 16, 2),
]
PRUNED = [
    ("magnitude prune, 4.2 M elements, density 0.2", 0.2),
    ("magnitude prune, 4.2 M elements, density 0.5", 0.5),
]


class Sides(NamedTuple):
    """The same work done twice; each gives its delta, or what stands for it, on demand."""

    ours: Callable[[], Tensor | list[Factors]]
    theirs: Callable[[], Tensor | list[tuple[Tensor, Tensor]]]


def peft_model(case: Case) -> tuple[nn.Module, list[nn.Module], list[str]]:
    """PEFT's model around some Linears, its layers, and the names of its random adapters."""
    torch.manual_seed(0)
    out, features = case.shape
    names = [f"adapter_{n}" for n in range(case.adapters)]
    base = nn.Sequential(*(nn.Linear(features, out, bias=False) for _ in range(case.layers)))
    targets = [str(n) for n in range(case.layers)]
    config = peft.LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=targets, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.base_model, list(model.base_model.model), names


def sides(case: Case) -> Sides:
    tuner, layers, names = peft_model(case)
    weights = [0.7 - 0.1 * n for n in range(case.adapters)]
    parts = [
        [
            Factors(
                layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]
            )
            for name in names
        ]
        for layer in layers
    ]
    options = CombineOptions(density=case.density)
    merge = tuner._svd_generalized_task_arithmetic_weighted_adapter

    def theirs_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
        shapes = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        rest = (*shapes, case.density, "total")
        return merge(case.method, names, weights, case.rank, layer, *rest, full_matrices=True)

    @torch.no_grad()
    def theirs() -> list[tuple[Tensor, Tensor]]:
        return [theirs_of(layer) for layer in layers]

    def ours() -> list[Factors]:
        return [combine(each, weights, case.method, options).factors for each in parts]

    return Sides(ours, theirs)


def difference(case: Case, both: Sides) -> float:
    """Largest relative difference of two deltas; refuses to time two sides that compute different things."""
    errors = []
    for found, (A, B) in zip(both.ours(), both.theirs(), strict=True):
        wanted = B.double() @ A.double()
        errors.append(float((found.delta(torch.float64) - wanted).norm() / wanted.norm()))
    assert max(errors) <= AGREE[case.method], f"{case}: the deltas differ by {max(errors):.1e}"
    return max(errors)


def per_layer(row: Row, layers: int) -> Row:
    return replace(row, milliseconds={side: ms / layers for side, ms in row.milliseconds.items()})


def pruning_sides(density: float) -> Sides:
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    k = int(density * x.numel())
    both = Sides(lambda: largest(x, k), lambda: magnitude_based_pruning(x, density))
    apart = both.ours() != both.theirs()
    # equals at the threshold: which of them stay is PEFT's chance and our rule
    assert x[apart].abs().unique().numel() <= 1, "pruned elements differ"
    return both


def show(row: Row) -> None:
    print(
        f"{row.name:<48}{row.milliseconds['lorakit']:>10.2f}{row.milliseconds['PEFT']:>12.1f}"
        f"{row.ratio['PEFT']:>10.1f} ±{row.spread['PEFT']:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1024 x 1024 alone, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows, apart = [], {}
    print(f"{'combining':<48}{'ours ms':>10}{'PEFT ms':>12}{'PEFT/ours':>12}")
    for case in CASES:
        if quick and not case.quick:
            continue
        case = case._replace(layers=1) if quick else case  # noqa: PLW2901
        both = sides(case)
        apart[str(case)] = difference(case, both)
        rounds = min(case.rounds, 2) if quick else case.rounds
        row = interleave(str(case), {"lorakit": both.ours, "PEFT": both.theirs}, rounds=rounds, warmup=1)
        rows.append(per_layer(row, case.layers))
        show(rows[-1])
    for name, density in PRUNED[:1] if quick else PRUNED:
        both = pruning_sides(density)
        rows.append(
            interleave(name, {"lorakit": both.ours, "PEFT": both.theirs}, rounds=3 if quick else 9, warmup=1)
        )
        show(rows[-1])
    if keeps(full=not quick):
        save("combine_svd", rows, {"difference": apart})


if __name__ == "__main__":
    main()
