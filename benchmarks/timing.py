"""How every benchmark measures: one thread's CPU time, variants interleaved in one process, medians of ratios.

Wall time with two threads is off by up to eight times on a shared machine; the ratio of interleaved runs of one
thread is steady to a few per cent.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.figures import RECORD, SCRATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RESULTS = Path(os.environ.get(SCRATCH) or RECORD)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        name: what was measured.
        milliseconds: median CPU time by variant.
        ratio: median over rounds of peer time / our time, by peer.
        spread: half the distance between the quartiles of that ratio.
    """

    name: str
    milliseconds: dict[str, float]
    ratio: dict[str, float]
    spread: dict[str, float]


def interleave(
    name: str,
    variants: Mapping[str, Callable[[], object]],
    *,
    ours: str = "lorakit",
    rounds: int = 15,
    warmup: int = 3,
) -> Row:
    """Run the variants in turn, `rounds` times, and compare each with `ours`."""
    times: dict[str, list[float]] = {key: [] for key in variants}
    for index in range(warmup + rounds):
        for key, run in variants.items():
            start = time.thread_time()
            run()
            if index >= warmup:
                times[key].append(time.thread_time() - start)
    gc.collect()
    return summarise(name, times, ours=ours)


def summarise(name: str, times: Mapping[str, list[float]], *, ours: str = "lorakit") -> Row:
    """The row of what was timed round by round, in seconds, by variant."""
    ratios = {
        key: [theirs / mine for theirs, mine in zip(values, times[ours], strict=True)]
        for key, values in times.items()
        if key != ours
    }
    return Row(
        name,
        {key: 1e3 * statistics.median(values) for key, values in times.items()},
        {key: statistics.median(values) for key, values in ratios.items()},
        {key: _half_quartile_distance(values) for key, values in ratios.items()},
    )


def _half_quartile_distance(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def machine() -> dict[str, str]:
    """What the figures depend on."""
    names = ("torch", "transformers", "peft")
    about = dict(
        (part.strip() for part in line.partition(":")[::2])
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "arithmetic": " ".join(
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags
        ),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    } | {name: version(name) for name in names}


def keeps(*, full: bool) -> bool:
    """Whether figures are written: those of the full size, and any where a folder was named that is not the record."""
    return full or SCRATCH in os.environ


def save(benchmark: str, rows: list[Row], extra: Mapping[str, object] | None = None) -> None:
    """Write the figures of one benchmark to `results/<benchmark>.json`."""
    write(benchmark, {"rows": [asdict(row) for row in rows], **(extra or {})})


def write(benchmark: str, figures: Mapping[str, object]) -> None:
    """Write figures of any form, with the machine and the day."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "day": date.today().isoformat(), **figures}  # noqa: DTZ011
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
