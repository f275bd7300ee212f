"""All benchmarks: `python -m benchmarks [--quick]`.

Each runs in a process of its own, a fork of one that has imported torch, transformers, PEFT and lorakit, since these
imports take longer than some of the benchmarks. Afterwards the table is printed, the ratios are compared with those on
record, and docs/benchmarks.md with its plots is written anew. A quick run writes nothing but to a temporary folder.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from benchmarks import compare, figures, report

FULL = {
    "train_step": [],
    "one_layer": [],
    "dora_step": [],
    "mixed_batch": [],
    "moe_step": [],
    "attach_many": [],
    "hotswap": [],
    "combine_svd": [],
    "init": ["--large"],
    "merge_disk": [],
    "importing": [],
    "scaling": [],
    "quality": [],
}
"""The benchmarks in their order, with what they take in a full run."""
NOT_QUICK = ("quality",)  # trains, and has no peer


def run(name: str, arguments: list[str]) -> None:
    """The benchmark's main, as if it had been called by itself."""
    sys.argv = [f"benchmarks.{name}", *arguments]
    importlib.import_module(f"benchmarks.{name}").main()


def cpu_seconds() -> float:
    """Of the benchmarks that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_all(*, quick: bool) -> list[str]:
    """Run them one after the other; gives the names of those that failed."""
    with redirect_stderr(StringIO()):  # optional packages say what they could not load
        import peft
        import transformers

        import lorakit

        assert peft.PeftModel
        assert transformers.LlamaForCausalLM
        assert lorakit.PeftModel
    context = multiprocessing.get_context("fork")
    failed = []
    for name, arguments in FULL.items():
        if quick and name in NOT_QUICK:
            continue
        print(f"\n== {name}", flush=True)
        process = context.Process(target=run, args=(name, ["--quick"] if quick else arguments))
        process.start()
        before = cpu_seconds()
        process.join()
        print(f"({cpu_seconds() - before:.0f} s of CPU time)", flush=True)
        if process.exitcode:
            failed.append(name)
    return failed


def finish(failed: list[str]) -> int:
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


def quick_run() -> int:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[figures.SCRATCH] = folder  # before timing is imported
        failed = run_all(quick=True)
        results = figures.load_all(Path(folder))
    print(f"\n{report.readings(results)}\n")
    print(compare.show(compare.compare(results, figures.committed)))
    print(f"{time.perf_counter() - start:.0f} s")
    return finish(failed)


def full_run() -> int:
    failed = run_all(quick=False)
    print()
    report.main()
    print(f"\n{compare.show(compare.compare(figures.load_all(), figures.committed))}")
    return finish(failed)


if __name__ == "__main__":
    sys.exit(quick_run() if "--quick" in sys.argv[1:] else full_run())
