"""A batch in which every sample has its own adapter: lorakit against PEFT and the bare base, one layer and a whole model.

Both sides get the same base, the same adapters (r=16; float32, as `get_peft_model` leaves them, or the dtype of the base)
and the same assignment of samples to adapters, in turn; they must agree on the output before anything is timed. lorakit
reads the assignment once a forward for all layers; `first` is a layer that pays for that alone. Two floors stand beside
them: the base and one read of the bytes of the factors in use (`bytes`), and the base and two dense products with all of
them, stacked beforehand (`products`): nothing is checked, masked or scaled there.
Run: python -m benchmarks.mixed_batch [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
import transformers
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear

import lorakit
from benchmarks.timing import Row, interleave, keeps, save
from lorakit.layers.linear import Linear as LoraLinear
from lorakit.ops import Bank, Groups, Term, lora_grouped
from lorakit.ops.grouped_costs import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

WIDTH, SAMPLES, RANK, ALPHA = 1024, 64, 16, 32
# without bf16 arithmetic one bf16 product of these sizes takes seconds, and says nothing of the layers
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES = DTYPES[:1]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DEPTH = 32  # layers of the whole model
DEEP = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # of its logits: bf16 rounds in every layer
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


class Stacked:
    """The factors of one layer stacked, and what is the least that can be done with them."""

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype, samples: int) -> None:
        self.A = torch.cat([a.detach() for a in A]).to(dtype)  # (rows, in)
        self.B = torch.cat([b.detach().t() for b in B]).to(dtype)  # (rows, out)
        self.x = torch.randn(samples, self.A.shape[1], dtype=dtype)
        self.y = torch.zeros(samples, self.B.shape[1], dtype=dtype)

    def read(self) -> None:
        """One read of every byte: as fp32, whose sum needs no conversion."""
        self.A.view(torch.float32).sum()
        self.B.view(torch.float32).sum()

    def multiply(self) -> None:
        """The two dense products."""
        self.y.addmm_(torch.nn.functional.linear(self.x, self.A), self.B)


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

    def floor(do: Callable[[Stacked], None]) -> Tensor:
        y: Tensor = base(x)
        do(stacked)
        return y

    stacked = Stacked([t.A for t in terms], [t.B for t in terms], case.base, SAMPLES * case.tokens)
    path = " ".join(map(str, choose(bank, groups, case.tokens, case.base)))
    return {
        "lorakit": lambda: ours(groups),
        "first": lambda: ours(Groups.make(ids, case.adapters, "cpu")),
        "PEFT": lambda: layer(x, adapter_names=of_samples),
        "base": lambda: base(x),
        "bytes": lambda: floor(Stacked.read),
        "products": lambda: floor(Stacked.multiply),
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


FLOORS = f"{'PEFT/bytes':>12}{'PEFT/products':>15}"


def over_floors(row: Row) -> str:
    """How many times a floor PEFT takes."""
    ms = row.milliseconds
    return f"{ms['PEFT'] / ms['bytes']:>12.2f}{ms['PEFT'] / ms['products']:>15.2f}"


def layers(quick: bool) -> list[Row]:
    """The table of one layer."""
    print(
        f"{'one layer, 64 samples':<36}{'base us':>9}{'PEFT':>8}{'lorakit':>9}{'first':>8}{'PEFT/ours':>15}{FLOORS}  path"
    )
    rows = []
    for base, factors in DTYPES:
        for tokens in (1,) if quick else (1, 32):
            for adapters in (1, 16) if quick else (1, 4, 16, 64):
                row, path = one_layer(Case(base, factors, tokens, adapters), rounds=8 if quick else 60)
                rows.append(row)
                us = {key: 1e3 * value for key, value in row.milliseconds.items()}
                print(
                    f"{row.name:<36}{us['base']:>9.0f}{us['PEFT']:>8.0f}{us['lorakit']:>9.0f}{us['first']:>8.0f}"
                    f"{row.ratio['PEFT']:>9.2f} ±{row.spread['PEFT']:.2f}{over_floors(row)}  {path}",
                    flush=True,
                )
    return rows


def whole_model(width: int, adapters: int, dtype: torch.dtype, tokens: int, rounds: int) -> Row:
    """A 32-layer Llama whose samples are spread over the adapters: one forward, which for one token is a decode step."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=DEPTH,
        num_attention_heads=max(1, width // 64),
        vocab_size=256,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype).eval()
    names = [f"adapter{k}" for k in range(adapters)]
    fields = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    mine = lorakit.get_peft_model(copy.deepcopy(base), lorakit.LoraConfig(**fields), names[0])
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields), names[0])
    for name in names[1:]:
        mine.add_adapter(name, lorakit.LoraConfig(**fields))
        theirs.add_adapter(name, peft.LoraConfig(**fields))
    for model in (mine, theirs):
        torch.manual_seed(1)
        for key, tensor in sorted(model.named_parameters()):
            if ".lora_A." in key or ".lora_B." in key:
                torch.nn.init.normal_(tensor, std=0.02)
        model.eval()
    ids = torch.randint(256, (max(adapters, 8), tokens))
    of_samples = [names[row % adapters] for row in range(len(ids))]
    runs: dict[str, Callable[[], Tensor]] = {
        "lorakit": lambda: mine(ids, adapter_names=of_samples, use_cache=False).logits,
        "PEFT": lambda: theirs(ids, adapter_names=of_samples, use_cache=False).logits,
        "base": lambda: base(ids, use_cache=False).logits,
    }
    found, wanted, plain = (run().double() for run in runs.values())
    stacks = [
        Stacked(
            [a.weight for a in module.lora_A.values()],
            [b.weight for b in module.lora_B.values()],
            dtype,
            ids.numel(),
        )
        for module in mine.modules()
        if isinstance(module, LoraLinear)
    ]

    def floor(do: Callable[[Stacked], None]) -> Tensor:
        logits: Tensor = runs["base"]()
        for stacked in stacks:
            do(stacked)
        return logits

    runs |= {"bytes": lambda: floor(Stacked.read), "products": lambda: floor(Stacked.multiply)}
    error = float((found - wanted).norm() / wanted.norm())
    assert error <= DEEP[dtype], f"logits differ by {error:.1e}"
    assert float((found - plain).norm() / wanted.norm()) > DEEP[dtype], "the adapters do nothing"
    name = f"{SHORT[dtype]}, d={width}, {adapters} adapters, {len(ids)}x{tokens} tokens"
    return interleave(name, runs, rounds=rounds)


@torch.no_grad()
def models(quick: bool) -> list[Row]:
    """The table of the whole model."""
    print(
        f"\n{f'Llama, {DEPTH} layers':<42}{'base ms':>9}{'PEFT':>8}{'lorakit':>9}{'PEFT/ours':>15}{'overhead':>10}{FLOORS}"
    )
    cases = [(64, 8, 1)] if quick else [(64, 8, 1), (64, 32, 1), (1024, 8, 1), (1024, 32, 1), (1024, 8, 64)]
    rows = []
    dtypes = list(dict.fromkeys(base for base, _ in DTYPES))
    for dtype in dtypes[-1:] if quick else dtypes:
        for width, adapters, tokens in cases:
            row = whole_model(width, adapters, dtype, tokens, rounds=5 if quick or tokens > 1 else 15)
            rows.append(row)
            ms = row.milliseconds
            overhead = (ms["PEFT"] - ms["base"]) / (ms["lorakit"] - ms["base"])
            print(
                f"{row.name:<42}{ms['base']:>9.1f}{ms['PEFT']:>8.1f}{ms['lorakit']:>9.1f}"
                f"{row.ratio['PEFT']:>9.2f} ±{row.spread['PEFT']:.2f}{overhead:>10.1f}{over_floors(row)}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one token a sample, one dtype of the model, few rounds"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = layers(quick) + models(quick)
    if keeps(full=not quick):
        save("mixed_batch", rows)


if __name__ == "__main__":
    main()
