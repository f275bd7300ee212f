"""Another adapter in the place of a loaded one: lorakit against PEFT, and against reading the file alone.

A Llama of 32 layers, hidden 64, with adapters on all 224 linear layers; the files carry a digest, which lorakit checks
and PEFT does not know of. First both sides must give the same logits after each swap.
Run: python -m benchmarks.hotswap [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file

import lorakit
from benchmarks.models import narrow_llama
from benchmarks.timing import Row, interleave, keeps, save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.utils import hotswap as theirs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

LAYERS, ROOM = 32, 32


class Case(NamedTuple):
    """One line of the table: ranks of the two adapters that take turns, and whether room was made for more."""

    name: str
    ranks: tuple[int, int]
    prepared: bool


CASES = (
    Case("r=16 and r=16", (16, 16), prepared=False),
    Case("r=16 and r=8", (16, 8), prepared=False),
    Case("r=16 and r=8, room for 32", (16, 8), prepared=True),
)


def write(folder: Path, layers: int, rank: int, seed: int) -> Path:
    """An adapter in which no factor is zero."""
    config = lorakit.LoraConfig(
        r=rank, lora_alpha=16 + seed, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = lorakit.get_peft_model(narrow_llama(layers), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def measure(case: Case, layers: int, root: Path, rounds: int) -> tuple[Row, float]:
    places = [write(root / f"{rank} {seed}", layers, rank, seed) for seed, rank in enumerate(case.ranks)]
    models = {
        "lorakit": lorakit.PeftModel.from_pretrained(narrow_llama(layers), places[0]),
        "PEFT": peft.PeftModel.from_pretrained(narrow_llama(layers), str(places[0])).eval(),
    }
    if case.prepared:
        lorakit.prepare_model_for_compiled_hotswap(models["lorakit"], target_rank=ROOM)
        theirs.prepare_model_for_compiled_hotswap(models["PEFT"], target_rank=ROOM)

    def ours(place: Path) -> None:
        lorakit.hotswap_adapter(models["lorakit"], place, "default")

    def other(place: Path) -> None:
        theirs.hotswap_adapter(models["PEFT"], str(place), "default", torch_device="cpu")

    def read(place: Path) -> None:
        load_file(place / "adapter_model.safetensors")

    worst = 0.0
    for place in (*reversed(places), *places):
        ours(place)
        other(place)
        wanted = logits(models["PEFT"])
        worst = max(worst, float((logits(models["lorakit"]) - wanted).norm() / wanted.norm()))
    assert worst <= 1e-5, f"{case}: logits differ by {worst:.1e}"
    variants: dict[str, Callable[[], object]] = {}
    for name, swap in (("lorakit", ours), ("PEFT", other), ("file", read)):
        turns = cycle(reversed(places))
        variants[name] = lambda swap=swap, turns=turns: swap(next(turns))
    return interleave(f"{case.name}, {layers} layers", variants, rounds=rounds), worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four layers, few rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    layers, rounds = (4, 8) if quick else (LAYERS, 40)
    rows, differences = [], {}
    print(f"{'a swap':<42}{'ms':>8}{'PEFT ms':>9}{'PEFT/ours':>16}{'ours/file':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            row, differences[case.name] = measure(case, layers, Path(folder) / case.name, rounds)
            rows.append(row)
            print(
                f"{row.name:<42}{row.milliseconds['lorakit']:>8.1f}{row.milliseconds['PEFT']:>9.1f}"
                f"{row.ratio['PEFT']:>10.2f} ±{row.spread['PEFT']:.2f}{1 / row.ratio['file']:>11.1f}",
                flush=True,
            )
    if keeps(full=not quick):
        save("hotswap", rows, {"difference of logits": differences})


if __name__ == "__main__":
    main()
