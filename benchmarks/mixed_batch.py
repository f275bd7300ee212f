"""One projection under a batch in which every sample has its own adapter: lorakit against PEFT and the bare base.

Both sides get the same base, the same adapters (r=16; float32, as `get_peft_model` leaves them, or the dtype of the base)
and the same assignment of samples to adapters, in turn; they must agree on the output before anything is timed. lorakit
reads the assignment once a forward for all layers; `first` is a layer that pays for that alone.
Run: python -m benchmarks.mixed_batch [--quick]
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear

from benchmarks.timing import Row, interleave, save
from lorakit.ops import Bank, Groups, Term, lora_grouped
from lorakit.ops.grouped_costs import choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDTH, SAMPLES, RANK, ALPHA = 1024, 64, 16, 32
# without bf16 arithmetic one bf16 product of these sizes takes seconds, and says nothing of the layers
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES = DTYPES[:1]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
AGREE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, Frobenius


class Case(NamedTuple):
    """One row of the table."""

    base: torch.dtype
    factors: torch.dtype
    tokens: int
    adapters: int

    @property
    def name(self) -> str:
        base, factors = (SHORT[dtype] for dtype in (self.base, self.factors))
        return f"{base} base, {self.adapters} {factors} adapters, S={self.tokens}"


def peft_layer(base: torch.nn.Linear, names: list[str], dtype: torch.dtype) -> PeftLinear:
    """PEFT's layer with adapters of this dtype whose B is not zero."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA)
    layer = PeftLinear(base, names[0], config, RANK, ALPHA)
    for name in names[1:]:
        layer.update_layer(name, RANK, lora_alpha=ALPHA, config=config)
    for name in names:
        torch.nn.init.normal_(layer.lora_B[name].weight, std=0.02)
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.to(dtype)
    return layer.requires_grad_(requires_grad=False)


def variants(case: Case) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """The same forward on both sides, and the path that lorakit takes."""
    torch.manual_seed(0)
    base = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=case.base)
    names = [f"adapter{k}" for k in range(case.adapters)]
    layer = peft_layer(base, names, case.factors)
    ids = [k % case.adapters for k in range(SAMPLES)]
    of_samples = [names[i] for i in ids]
    terms = [Term(layer.lora_A[n].weight, layer.lora_B[n].weight, None, ALPHA / RANK, 0.0) for n in names]
    bank, groups = Bank.stack(terms), Groups.make(ids, case.adapters, "cpu")
    x = torch.randn(SAMPLES, case.tokens, WIDTH).to(case.base)

    def ours(who: Groups) -> Tensor:
        assert bank.is_current()  # as a layer asks before it uses the factors that it stacked
        return lora_grouped(base(x), x, bank, who)

    path = " ".join(map(str, choose(bank, groups, case.tokens, case.base)))
    return {
        "lorakit": lambda: ours(groups),
        "first": lambda: ours(Groups.make(ids, case.adapters, "cpu")),
        "PEFT": lambda: layer(x, adapter_names=of_samples),
        "base": lambda: base(x),
    }, path


@torch.no_grad()
def one_layer(case: Case, rounds: int) -> tuple[Row, str]:
    """Time one case, after both sides agreed."""
    runs, path = variants(case)
    mine, theirs = runs["lorakit"]().double(), runs["PEFT"]().double()
    error = float((mine - theirs).norm() / theirs.norm())
    assert error <= AGREE[case.base], f"{case.name}: outputs differ by {error:.1e}"
    assert float((mine - runs["base"]().double()).norm() / theirs.norm()) > 1e-2, "the adapters do nothing"
    return interleave(case.name, runs, rounds=rounds), path


def layers(quick: bool) -> list[Row]:
    """The table of one layer."""
    print(
        f"{'one layer, 64 samples':<36}{'base us':>9}{'PEFT':>8}{'lorakit':>9}{'first':>8}{'PEFT/ours':>15}  path"
    )
    rows = []
    for base, factors in DTYPES:
        for tokens in (1,) if quick else (1, 32):
            for adapters in (1, 4, 16, 64):
                row, path = one_layer(Case(base, factors, tokens, adapters), rounds=15 if quick else 60)
                rows.append(row)
                us = {key: 1e3 * value for key, value in row.milliseconds.items()}
                print(
                    f"{row.name:<36}{us['base']:>9.0f}{us['PEFT']:>8.0f}{us['lorakit']:>9.0f}{us['first']:>8.0f}"
                    f"{row.ratio['PEFT']:>9.2f} ±{row.spread['PEFT']:.2f}  {path}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one token a sample, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = layers(quick)
    # A whole model, whose layers share one `Groups`, adds its rows here.
    if not quick:  # the figures on record are those of the full size
        save("mixed_batch", rows)


if __name__ == "__main__":
    main()
