"""What the benchmarks found, read back from their JSON: one `Reading` for each thing that was compared.

Nothing here imports torch, PEFT or lorakit: the page, the table and the check against the record need the files alone.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results"
SCRATCH = "LORAKIT_BENCH_SCRATCH"
"""Names a folder for figures that are not kept: the quick run's, whose sizes and rounds are not those on record."""

FLOORS = {
    "frozen": "the base without adapters",
    "base": "the base without adapters",
    "floor": "reading the file",
    "file": "reading the file",
    "lorakit LoRA": "our plain LoRA",
    "pass": "one pass over the weight",
    "import torch": "importing torch",
}
"""Variants that are no peers but what cannot be gone below, and what they are in words."""


class Reading(NamedTuple):
    """One comparison.

    Attributes:
        benchmark: the name of its file.
        row: what was measured.
        ratio: PEFT over lorakit; None where PEFT has nothing like it.
        spread: half the distance between the quartiles of the ratio; 0 for bytes, which do not vary.
        over_floor: lorakit over the floor, or None.
        floor: the floor in words.
    """

    benchmark: str
    row: str
    ratio: float | None
    spread: float = 0.0
    over_floor: float | None = None
    floor: str = ""


class Result(NamedTuple):
    """The file of one benchmark."""

    benchmark: str
    content: dict[str, Any]

    @property
    def machine(self) -> dict[str, str]:
        return self.content.get("machine", {})

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content.get("rows", [])

    def readings(self) -> list[Reading]:
        return [*_times(self), *_bytes(self), *_runs(self)]


def _over(ours: float | None, floor: float | None) -> float | None:
    return ours / floor if ours is not None and floor else None


def _times(result: Result) -> Iterator[Reading]:
    """Rows of `timing.Row`."""
    for row in result.rows:
        ratio = row.get("ratio", {})
        floor = next((key for key in FLOORS if key in ratio), None)
        if "PEFT" in ratio or floor:
            yield Reading(
                result.benchmark,
                row["name"],
                ratio.get("PEFT"),
                row.get("spread", {}).get("PEFT", 0.0),
                1 / ratio[floor] if floor else None,
                FLOORS[floor] if floor else "",
            )


def _bytes(result: Result) -> Iterator[Reading]:
    """What is kept for backward, by row and side."""
    for key in ("saved_mib", "memory"):
        for row, sides in result.content.get(key, {}).items():
            found = {side.removeprefix("saved MiB, "): value for side, value in sides.items()}
            ours, theirs = found.get("lorakit"), found.get("PEFT")
            floor = next((name for name in FLOORS if name in found), None)
            if ours and theirs is not None:
                yield Reading(
                    result.benchmark,
                    f"{row}, kept for backward",
                    theirs / ours,
                    0.0,
                    _over(ours, found[floor]) if floor else None,
                    FLOORS[floor] if floor else "",
                )


def _runs(result: Result) -> Iterator[Reading]:
    """Rows of whole processes: seconds, CPU seconds and the most memory of each side."""
    for row in result.rows:
        ours, theirs = row.get("lorakit"), row.get("PEFT")
        size = f", {row['base_megabytes']:.0f} MB" if "base_megabytes" in row else ""
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for field, words in (("seconds", "wall time"), ("cpu", "CPU time"), ("megabytes", "memory")):
                if ours.get(field) and field in theirs:
                    yield Reading(
                        result.benchmark, f"{row['name']}{size}, {words}", theirs[field] / ours[field]
                    )


def load(benchmark: str, folder: Path = RECORD) -> Result | None:
    """The figures in a folder, or None if the benchmark has none there."""
    file = folder / f"{benchmark}.json"
    return Result(benchmark, json.loads(file.read_text())) if file.exists() else None


def load_all(folder: Path = RECORD) -> list[Result]:
    """The figures of every benchmark in a folder."""
    return [Result(file.stem, json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]


def committed(benchmark: str, root: Path = ROOT, revision: str = "HEAD") -> Result | None:
    """The figures on record in git, or None where a benchmark is new."""
    path = f"{revision}:benchmarks/results/{benchmark}.json"
    done = subprocess.run(["git", "show", path], cwd=root, capture_output=True, text=True, check=False)
    return Result(benchmark, json.loads(done.stdout)) if done.returncode == 0 else None


def machine_words(result: Result) -> str:
    """The machine of one result in words, and the day, where it is known."""
    machine = result.machine
    if not machine:
        return "machine not recorded"
    cpu = machine["cpu"] + (f" ({machine['arithmetic']})" if machine.get("arithmetic") else "")
    versions = ", ".join(
        f"{name} {machine[key]}"
        for key, name in (
            ("python", "Python"),
            ("torch", "torch"),
            ("transformers", "transformers"),
            ("peft", "PEFT"),
        )
        if key in machine
    )
    threads = machine.get("threads", "?")
    day = f", {result.content['day']}" if "day" in result.content else ""
    return f"{cpu}, {threads} thread{'' if threads == '1' else 's'}, {versions}{day}"
