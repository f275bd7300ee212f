"""Whether ratios got worse than those on record: `python -m benchmarks.compare [FOLDER]`.

The figures in FOLDER (benchmarks/results, unless another is named) against those of the last commit. Times depend on
the hour; ratios of interleaved runs do not, so only these are compared, and only where both were measured on the same
processor with as many threads. A ratio got worse when it fell by more than both spreads and 5 % together, the noise of
a whole model between two runs. Exits with 1 if anything got worse.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.figures import RECORD, committed, load_all, machine_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.figures import Reading, Result

NOISE = 0.05
FEW = 3  # names are written out
BYTES = 0.01  # what is kept for backward does not vary


class Comparison(NamedTuple):
    """What became of the figures of all benchmarks.

    Attributes:
        worse: a line for each ratio that fell.
        better: a line for each that rose as clearly.
        apart: benchmarks that were not compared, and why.
        same: how many readings are as they were.
    """

    worse: list[str]
    better: list[str]
    apart: list[str]
    same: int


def same_machine(a: Result, b: Result) -> bool:
    return all(a.machine.get(key) == b.machine.get(key) for key in ("cpu", "threads"))


def change(new: Reading, old: Reading) -> int:
    """-1 where the ratio got worse, 1 where it got better, 0 within the spread."""
    if new.ratio is None or old.ratio is None:
        return 0
    noise = BYTES if new.row.endswith("kept for backward") else NOISE
    room = new.spread + old.spread + noise * old.ratio
    difference = new.ratio - old.ratio
    return (difference > room) - (difference < -room)


def compare(results: Iterable[Result], record: Callable[[str], Result | None]) -> Comparison:
    """Each result against what is on record under its name."""
    lines: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    apart = []
    for result in results:
        old = record(result.benchmark)
        if old is None:
            apart.append(f"{result.benchmark}: nothing on record")
        elif not same_machine(result, old):
            apart.append(
                f"{result.benchmark}: another machine, not compared ({machine_words(old)} -> {machine_words(result)})"
            )
        else:
            before = {reading.row: reading for reading in old.readings()}
            for reading in result.readings():
                was = before.pop(reading.row, None)
                if was is not None:
                    lines[change(reading, was)].append(line(reading, was))
            if before:
                names = (
                    list(before) if len(before) <= FEW else [*list(before)[:FEW], f"{len(before) - FEW} more"]
                )
                apart.append(f"{result.benchmark}: on record and not run: {'; '.join(names)}")
    return Comparison(lines[-1], lines[1], apart, len(lines[0]))


def line(new: Reading, old: Reading) -> str:
    if new.ratio is None or old.ratio is None:
        return f"{new.benchmark}: {new.row}"
    return (
        f"{new.benchmark}: {new.row}: PEFT/lorakit {old.ratio:.2f} ±{old.spread:.2f} -> "
        f"{new.ratio:.2f} ±{new.spread:.2f}"
    )


def show(found: Comparison) -> str:
    """The comparison in words."""
    parts = []
    for title, lines in (
        ("worse than on record", found.worse),
        ("better", found.better),
        ("left out", found.apart),
    ):
        parts += [f"{title}:", *(f"  {text}" for text in lines)] if lines else []
    parts.append(f"{found.same} ratios as on record, {len(found.worse)} worse, {len(found.better)} better")
    return "\n".join(parts)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    found = compare(load_all(folder), committed)
    print(show(found))
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main())
