"""How cost grows with rank, layers, adapters and size, PEFT beside lorakit.

A training step against the rank, attaching against the number of layers, a mixed batch against the number of adapters,
a merge against the size of the weight; plotted on docs/benchmarks.md. Each point first checks that both sides do the same.
Run: python -m benchmarks.scaling [--quick]
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from torch import nn

import lorakit
from benchmarks import mixed_batch, train_step
from benchmarks.models import narrow_llama
from benchmarks.timing import Row, interleave, keeps, save, summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIBRARIES = {"lorakit": lorakit, "PEFT": peft}
SIZE = train_step.Size(512, 1408, 2, 128)


class Law(NamedTuple):
    """One curve: what is measured at each of its sizes."""

    name: str
    measure: Callable[[int, int], list[Row]]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    rounds: int


def step_of_rank(rank: int, rounds: int) -> list[Row]:
    """A training step of a small Llama in fp32."""
    frozen = train_step.base_model(torch.float32, SIZE)
    frozen.requires_grad_(requires_grad=False)
    fields = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ours, theirs = (
        library.get_peft_model(copy.deepcopy(frozen), library.LoraConfig(**fields))
        for library in LIBRARIES.values()
    )
    train_step.copy_adapter(ours, theirs)
    shape = (SIZE.batch, SIZE.sequence)
    ids = torch.randint(0, train_step.VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    train_step.check_agreement(ours, theirs, ids, 1e-4)
    sides = {"lorakit": ours, "PEFT": theirs, "frozen": frozen}
    runs = {name: train_step.step(model, ids) for name, model in sides.items()}
    return [interleave(f"step, r={rank}", runs, rounds=rounds)]


def attach_of_layers(layers: int, rounds: int) -> list[Row]:
    """`get_peft_model` with adapters on all linear layers of a narrow Llama, seven a layer."""
    plain, ids = narrow_llama(layers), torch.arange(6)[None]
    fields = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    times: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for turn in range(rounds + 1):
        made = {}
        for name, library in LIBRARIES.items():
            model, config = copy.deepcopy(plain), library.LoraConfig(**fields)
            gc.collect()
            start = time.thread_time()
            made[name] = library.get_peft_model(model, config)
            if turn:
                times[name].append(time.thread_time() - start)
        if not turn:
            trained = [
                {key: p.shape for key, p in model.named_parameters() if p.requires_grad}
                for model in made.values()
            ]
            assert trained[0] == trained[1], "the two train different parameters"
            _same(*(model.eval()(ids).logits.detach() for model in made.values()), 1e-5)
    return [summarise(f"attach, {layers} layers", times)]


def mixed_of_adapters(adapters: int, rounds: int) -> list[Row]:
    """One layer of 1024 x 1024 in fp32 and 64 samples of one token spread over the adapters."""
    row, _ = mixed_batch.one_layer(mixed_batch.Case(torch.float32, torch.float32, 1, adapters), rounds)
    # the other variants have their place in mixed_batch's own table
    kept = {key: row.milliseconds[key] for key in ("lorakit", "PEFT", "base")}
    ratio, spread = ({key: part[key] for key in ("PEFT", "base")} for part in (row.ratio, row.spread))
    return [Row(f"mixed, {adapters} adapter{'s' if adapters > 1 else ''}", kept, ratio, spread)]


def merge_of_size(width: int, rounds: int) -> list[Row]:
    """`merge_adapter` into one square weight, which can be undone."""
    return [_merge(width, dtype, rounds, for_good=False) for dtype in (torch.float32, torch.bfloat16)]


def unload_of_size(width: int, rounds: int) -> list[Row]:
    """`merge_and_unload` into one square weight."""
    return [_merge(width, dtype, rounds, for_good=True) for dtype in (torch.float32, torch.bfloat16)]


def _merge(width: int, dtype: torch.dtype, rounds: int, *, for_good: bool) -> Row:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype))
    W = base[0].weight.detach().clone()
    times: dict[str, list[float]] = {name: [] for name in (*LIBRARIES, "pass")}
    for turn in range(rounds + 2):
        models = dict(zip(LIBRARIES, _pair(base), strict=True))
        merged = []
        for name, model in models.items():
            times[name].append(_timed(model.merge_and_unload if for_good else model.merge_adapter))
            merged.append(model.base_model.model[0])
        times["pass"].append(_timed(lambda: W.add_(W)))
        W.copy_(base[0].weight.detach())
        if not turn:
            weights = [getattr(layer, "base_layer", layer).weight.detach() for layer in merged]
            # PEFT rounds the change of a bf16 weight before it adds it
            _same(*weights, 1e-5 if dtype is torch.float32 else 5e-3)
            assert float((weights[0] - W).norm()) > 1e-3 * float(W.norm()), "the merge changes nothing"
    what = "merge and unload" if for_good else "merge"
    name = "fp32" if dtype is torch.float32 else "bf16"
    return summarise(f"{what}, {width} x {width}, {name}", {key: values[2:] for key, values in times.items()})


def _pair(base: nn.Module) -> tuple[nn.Module, ...]:
    """Copies of the base with the same adapter, of either library."""
    fields = {"r": 16, "target_modules": ["0"], "init_lora_weights": False}
    ours, theirs = (
        library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**fields))
        for library in LIBRARIES.values()
    )
    train_step.copy_adapter(ours, theirs)
    return ours, theirs


def _timed(run: Callable[[], object]) -> float:
    with torch.no_grad():
        start = time.thread_time()
        run()
        return time.thread_time() - start


def _same(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Refuses to time two sides that compute different things."""
    error = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
    assert error <= tolerance, f"the two differ by {error:.1e}"


LAWS = (
    Law("step", step_of_rank, (4, 8, 16, 32, 64, 128, 256), (8, 64), 15),
    Law("attach", attach_of_layers, (4, 8, 16, 32, 64), (4, 8), 7),
    Law("mixed", mixed_of_adapters, (1, 2, 4, 8, 16, 32, 64), (1, 16), 40),
    Law("merge", merge_of_size, (256, 512, 1024, 2048, 4096), (256, 1024), 9),
    Law("merge and unload", unload_of_size, (256, 512, 1024, 2048, 4096), (256, 1024), 9),
)


def point(law: str, size: int, row: Row) -> Mapping[str, object]:
    """Where a row stands in its plot; merges have a line for each dtype."""
    return {"law": law, "x": size, "group": row.name.rpartition(", ")[2] if law.startswith("merge") else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes of each, few rounds")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []
    points = {}
    print(f"{'how cost grows':<34}{'ours ms':>10}{'PEFT ms':>10}{'PEFT/ours':>16}")
    for law in LAWS:
        for size in law.quick if quick else law.sizes:
            for row in law.measure(size, 4 if quick else law.rounds):
                rows.append(row)
                points[row.name] = point(law.name, size, row)
                print(
                    f"{row.name:<34}{row.milliseconds['lorakit']:>10.2f}{row.milliseconds['PEFT']:>10.2f}"
                    f"{row.ratio['PEFT']:>10.2f} ±{row.spread['PEFT']:.2f}",
                    flush=True,
                )
    if keeps(full=not quick):
        save("scaling", rows, {"points": points})


if __name__ == "__main__":
    main()
