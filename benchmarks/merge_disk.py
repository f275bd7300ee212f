"""A checkpoint with an adapter merged, from files to files: lorakit against PEFT's load, merge_and_unload, save.

A bf16 Llama of 2.6 GB in five shards (a quick run: 0.1 GB), an adapter of r=16 on all linear layers or on q and v alone.
Each run is a process of its own; memory is the most that it held at any time above what it held after its imports (the
kernel's VmHWM). The page cache is warm. What the two write is compared number by number before any figure is shown.
Run: python -m benchmarks.merge_disk [--quick]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import keeps, write


class Size(NamedTuple):
    """A Llama's sizes, how it is cut into files, how often each side runs, and for which adapters."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int
    shard: str
    rounds: int
    targets: tuple[str, ...]


FULL = Size(2048, 5632, 26, 32000, "550MB", 3, ("all linear layers", "q and v"))
QUICK = Size(1024, 2816, 4, 8000, "50MB", 1, ("all linear layers",))
WAYS = ("lorakit", "PEFT")
TARGETS = {"all linear layers": "all-linear", "q and v": ["q_proj", "v_proj"]}


def write_inputs(root: Path, size: Size) -> None:
    """The base, and an adapter in which no factor is zero for each choice of targets."""
    import transformers

    import lorakit

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(root / "base", max_shard_size=size.shard)
    for name in size.targets:
        targets = TARGETS[name]
        adapted = lorakit.get_peft_model(
            model, lorakit.LoraConfig(r=16, lora_alpha=32, target_modules=targets)
        )
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        adapted.save_pretrained(root / name)
        model = adapted.unload()


def run_lorakit(base: Path, adapter: Path, output: Path, _: str) -> None:
    from lorakit import merge_checkpoint

    merge_checkpoint(base, adapter, output)


def run_peft(base: Path, adapter: Path, output: Path, shard: str) -> None:
    import transformers
    from peft import PeftModel

    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(
        output, max_shard_size=shard
    )


def child(way: str, base: Path, adapter: Path, output: Path, shard: str) -> None:
    """One run; prints what it took as JSON."""
    torch.set_num_threads(1)
    if way == "PEFT":
        import peft
        import transformers

        transformers.utils.logging.disable_progress_bar()
        assert peft.PeftModel
        assert transformers.LlamaForCausalLM
    else:
        from lorakit import merge_checkpoint

        assert merge_checkpoint
    Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin anew
    before, wall, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    {"lorakit": run_lorakit, "PEFT": run_peft}[way](base, adapter, output, shard)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"seconds": wall, "cpu": cpu, "megabytes": (status("VmHWM") - before) / 1024}))


def status(field: str) -> int:
    """A line of the process' status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def measure(way: str, base: Path, adapter: Path, output: Path, shard: str) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.merge_disk", "--child", way]
    done = subprocess.run(
        [*command, str(base), str(adapter), str(output), shard], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(mine: Path, theirs: Path) -> str:
    """How what was written differs: PEFT rounds the change before it adds it."""
    from lorakit.checkpoint.merging.weight import Piece, Weight, WeightReader
    from lorakit.checkpoint.shards import ShardReader, open_shards

    a, b = open_shards(mine), open_shards(theirs)
    assert a.places.keys() == b.places.keys()
    equal = total = 0
    worst = 0.0
    with ShardReader(a) as first, ShardReader(b) as second:
        for name, place in a.places.items():
            weight = Weight(
                name, place.info.shape, place.info.dtype, (Piece(name, 0, place.info.nbytes // 2),)
            )
            x, y = (WeightReader(s, r).whole(weight, torch.float32) for s, r in ((a, first), (b, second)))
            equal, total = equal + int((x == y).sum()), total + x.numel()
            worst = max(worst, float(((x - y).abs() / x.abs().clamp_min(1e-3)).max()))
    assert worst < 0.02, f"{worst}: the two do not do the same"
    return f"{100 * equal / total:.2f} % of the numbers are equal, the others next to each other"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small model, once")
    parser.add_argument("--child", nargs=5)
    arguments = parser.parse_args()
    if arguments.child:
        way, *paths, shard = arguments.child
        child(way, *map(Path, paths), shard)
        return
    rows, size = [], QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_inputs(root, size)
        megabytes = sum(file.stat().st_size for file in (root / "base").glob("*.safetensors")) / 1e6
        print(f"a base of {megabytes:.0f} MB")
        for name in size.targets:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(size.rounds):
                for way in WAYS:
                    found[way].append(measure(way, root / "base", root / name, root / way, size.shard))
            print(f"{name}: {compare(root / 'lorakit', root / 'PEFT')}")
            medians = {
                way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for way, runs in found.items()
            }
            for way, figures in medians.items():
                print(
                    f"  {way:<8} {figures['seconds']:6.2f} s  {figures['cpu']:6.2f} s CPU  {figures['megabytes']:7.0f} MB"
                )
            rows.append({"name": name, "base_megabytes": megabytes, **medians})
    if keeps(full=not arguments.quick):
        write("merge_disk", {"rows": rows})


if __name__ == "__main__":
    main()
