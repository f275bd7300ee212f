"""How every benchmark measures: one thread's CPU time, variants interleaved in one process, medians of ratios.

Wall time with two threads is off by up to eight times on a shared machine; the ratio of interleaved runs of one
thread is steady to a few per cent.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RESULTS = Path(__file__).parent / "results"


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
    ratios = {
        key: [theirs / mine for theirs, mine in zip(times[key], times[ours], strict=True)]
        for key in variants
        if key != ours
    }
    return Row(
        name,
        {key: 1e3 * statistics.median(values) for key, values in times.items()},
        {key: statistics.median(values) for key, values in ratios.items()},
        {key: _half_quartile_distance(values) for key, values in ratios.items()},
    )


def _half_quartile_distance(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def machine() -> dict[str, str]:
    """What the figures depend on."""
    names = ("torch", "transformers", "peft")
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {"cpu": cpu, "python": platform.python_version(), "threads": str(torch.get_num_threads())} | {
        name: version(name) for name in names
    }


def save(benchmark: str, rows: list[Row], extra: Mapping[str, object] | None = None) -> None:
    """Write the figures of one benchmark to `results/<benchmark>.json`."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "rows": [asdict(row) for row in rows], **(extra or {})}
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
