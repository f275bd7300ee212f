"""The page, its tables and plots from the JSON of the benchmarks: `python -m benchmarks.report`.

docs/benchmarks.md is written by hand but for what stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is
"summary" or a row of `TABLES`. Every table ends with the machine that it was measured on. A benchmark without figures
leaves its table saying so.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.figures import ROOT, load_all, machine_words
from benchmarks.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from benchmarks.figures import Reading, Result
    from benchmarks.targets import Target

    Row = dict[str, Any]
    Cell = Callable[[Row, Result], str]

PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
REGION = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
NOTHING = "–"


class Outcome(NamedTuple):
    """What became of one target; `reading` is None where nothing was measured."""

    target: Target
    reading: Reading | None
    value: float | None
    result: Result | None

    @property
    def reached(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.target.wanted if self.target.most else self.value >= self.target.wanted

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.reached:
            return "reached"
        short = self.value / self.target.wanted - 1
        return f"{abs(short):.0%} {'over' if self.target.most else 'short'}"


# ---- the table of targets ---------------------------------------------------------------------------------


def judge(target: Target, results: Mapping[str, Result]) -> Outcome:
    """The worst reading that a target's pattern fits."""
    result = results.get(target.benchmark)
    found: list[tuple[float, Reading]] = []
    for reading in result.readings() if result else ():
        value = reading.over_floor if target.most else reading.ratio
        if value is not None and fnmatchcase(reading.row, target.row):
            found.append((value, reading))
    if not found:
        return Outcome(target, None, None, result)
    worst = (max if target.most else min)(found, key=lambda pair: pair[0])
    return Outcome(target, worst[1], worst[0], result)


def outcomes(results: Iterable[Result], targets: Sequence[Target] = TARGETS) -> list[Outcome]:
    by_name = {result.benchmark: result for result in results}
    return [judge(target, by_name) for target in targets]


def _ratio(reading: Reading | None) -> str:
    if reading is None or reading.ratio is None:
        return NOTHING
    spread = f" ± {number(reading.spread)}" if reading.spread else ""
    return f"{number(reading.ratio)}{spread}"


def _floor(reading: Reading | None) -> str:
    if reading is None or reading.over_floor is None:
        return NOTHING
    return f"{number(reading.over_floor)} × {reading.floor}"


def summary(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> str:
    """Every target, what was measured, and whether it is reached."""
    found = outcomes(results, targets)
    machines = list(dict.fromkeys(machine_words(o.result) for o in found if o.reading and o.result))
    lines = [
        "| | PEFT / lorakit | lorakit over its floor | wanted | | machine |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        wanted = ("≤ " if each.target.most else "≥ ") + number(each.target.wanted)
        place = (
            str(1 + machines.index(machine_words(each.result))) if each.reading and each.result else NOTHING
        )
        verdict = f"**{each.verdict}**" if each.reached else each.verdict
        if each.target.why and each.value is not None and not each.reached:
            verdict += f": {each.target.why}"
        lines.append(
            f"| {each.target.what} | {_ratio(each.reading)} | {_floor(each.reading)} | {wanted} | {verdict} | {place} |"
        )
    reached, measured = sum(o.reached for o in found), sum(o.value is not None for o in found)
    lines += [
        "",
        f"{reached} of {len(found)} targets are reached; {len(found) - measured} have not been measured.",
    ]
    lines += ["", *(f"Machine {n}: {words}.  " for n, words in enumerate(machines, 1))]
    return "\n".join(lines).rstrip() + "\n"


def plain(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> str:
    """The same table for a terminal."""
    lines = [f"{'':<46}{'PEFT/lorakit':>18}{'over floor':>12}{'wanted':>9}  "]
    for each in outcomes(results, targets):
        over = each.reading.over_floor if each.reading else None
        wanted = ("<=" if each.target.most else ">=") + number(each.target.wanted)
        floor = NOTHING if over is None else number(over)
        lines.append(
            f"{each.target.what:<46}{_ratio(each.reading):>18}{floor:>12}{wanted:>9}  {each.verdict}"
        )
    return "\n".join(lines)


def readings(results: Sequence[Result]) -> str:
    """Whatever was measured, line by line: the table of a quick run, whose sizes are not those of the targets."""
    lines = [f"{'':<82}{'PEFT/lorakit':>18}{'over floor':>12}"]
    for result in results:
        for reading in result.readings():
            floor = NOTHING if reading.over_floor is None else number(reading.over_floor)
            lines.append(f"{result.benchmark + ': ' + reading.row:<82}{_ratio(reading):>18}{floor:>12}")
    return "\n".join(lines)


# ---- the tables of single benchmarks ----------------------------------------------------------------------


class Table(NamedTuple):
    """How a benchmark's rows become a table.

    Attributes:
        benchmark: the name of its file.
        first: the heading of the column of names.
        columns: heading and contents of the others.
        rows: a pattern for the names of the rows that belong to it.
    """

    benchmark: str
    first: str
    columns: dict[str, Cell]
    rows: str = "*"


def number(value: float) -> str:
    """Three figures, and no more digits than that needs."""
    if value != value:
        return NOTHING
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ms(side: str) -> Cell:
    return lambda row, _: _maybe(row.get("milliseconds", {}).get(side))


def ratio(side: str, *, bold: bool = False) -> Cell:
    """`side` over lorakit, with the spread."""

    def cell(row: Row, _: Result) -> str:
        value = row.get("ratio", {}).get(side)
        if value is None:
            return NOTHING
        text = f"**{number(value)}**" if bold else number(value)
        return f"{text} ± {number(row.get('spread', {}).get(side, 0.0))}"

    return cell


def over(side: str) -> Cell:
    """What lorakit takes over what `side` takes."""

    def cell(row: Row, _: Result) -> str:
        value = row.get("ratio", {}).get(side)
        return NOTHING if not value else number(1 / value)

    return cell


def peft_over(side: str) -> Cell:
    """PEFT over a floor: what could be gained at most."""

    def cell(row: Row, _: Result) -> str:
        times = row.get("milliseconds", {})
        return number(times["PEFT"] / times[side]) if times.get(side) and "PEFT" in times else NOTHING

    return cell


def overhead(row: Row, _: Result) -> str:
    """What PEFT adds to the base over what lorakit adds."""
    times = row.get("milliseconds", {})
    if not {"base", "lorakit", "PEFT"} <= times.keys() or times["lorakit"] <= times["base"]:
        return NOTHING
    return number((times["PEFT"] - times["base"]) / (times["lorakit"] - times["base"]))


def extra(key: str, side: str) -> Cell:
    """What another part of the file says about the row."""
    return lambda row, result: _maybe(result.content.get(key, {}).get(row["name"], {}).get(side), small=True)


def part(side: str, field: str) -> Cell:
    """One figure of a row of whole processes."""
    return lambda row, _: _maybe(row.get(side, {}).get(field))


def _maybe(value: float | None, *, small: bool = False) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2g}" if small and 0 < abs(value) < 0.01 else number(value)


PAIR: dict[str, Cell] = {
    "lorakit, ms": ms("lorakit"),
    "PEFT, ms": ms("PEFT"),
    "PEFT / lorakit": ratio("PEFT", bold=True),
}
FROZEN = {**PAIR, "lorakit / frozen": over("frozen")}
KEPT = {
    f"kept for backward, MiB: {side}" if not n else side: extra("saved_mib", side)
    for n, side in enumerate(("lorakit", "PEFT", "frozen"))
}
FACTOR = {"PEFT / products": peft_over("products"), "PEFT / bytes": peft_over("bytes")}
TABLES = {
    "train_step": Table("train_step", "training step", {**FROZEN, **KEPT}),
    "one_layer": Table("one_layer", "one projection", FROZEN),
    "attach_many": Table("attach_many", "operation", {**PAIR, "lorakit / file": over("floor")}),
    "mixed_layer": Table("mixed_batch", "one layer", {**PAIR, **FACTOR}, "*S=*"),
    "mixed_model": Table("mixed_batch", "whole model", {"base, ms": ms("base"), **PAIR, "overhead": overhead, **FACTOR}, "*tokens"),
    "combine_svd": Table("combine_svd", "combining", PAIR),
    "moe_step": Table("moe_step", "experts", FROZEN),
    "hotswap": Table("hotswap", "a swap", {**PAIR, "lorakit / file": over("file")}),
    "init": Table("init", "scheme", {**PAIR, "error: lorakit": extra("error", "lorakit"), "PEFT": extra("error", "PEFT")}),
    "dora_step": Table(
        "dora_step", "DoRA", {**PAIR, "lorakit / its LoRA": over("lorakit LoRA"), "PEFT's LoRA / lorakit": ratio("PEFT LoRA")}
    ),
    "merge_disk": Table(
        "merge_disk",
        "merged",
        {"base, MB": lambda row, _: _maybe(row.get("base_megabytes"))}
        | {
            f"{words}: {side}": part(side, field)
            for field, words in (("seconds", "wall, s"), ("cpu", "CPU, s"), ("megabytes", "memory, MB"))
            for side in ("lorakit", "PEFT")
        },
    ),
    "importing": Table("importing", "import", PAIR),
    "scaling_rank": Table("scaling", "step", FROZEN, "step,*"),
    "scaling_layers": Table("scaling", "attach", PAIR, "attach,*"),
    "scaling_adapters": Table("scaling", "mixed batch", PAIR, "mixed,*"),
    "scaling_merge": Table("scaling", "merge", {**PAIR, "lorakit / pass": over("pass")}, "merge*"),
}  # fmt: skip


def table(spec: Table, result: Result | None) -> str:
    """Markdown, with the machine under it."""
    rows = [row for row in (result.rows if result else ()) if fnmatchcase(row["name"], spec.rows)]
    if result is None or not rows:
        return f"*Not measured yet: `python -m benchmarks.{spec.benchmark}`.*\n"
    lines = [
        "| " + " | ".join([spec.first, *spec.columns]) + " |",
        "|---" * (1 + len(spec.columns)) + "|",
        *(
            "| " + " | ".join([row["name"], *(cell(row, result) for cell in spec.columns.values())]) + " |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + f"\n\n*{machine_words(result)}*\n"


# ---- the page ---------------------------------------------------------------------------------------------


def fill(page: str, results: Sequence[Result]) -> str:
    """The page with every marked region written anew; a name that no table has is an error."""
    by_name = {result.benchmark: result for result in results}

    def write(region: re.Match[str]) -> str:
        name = region["name"]
        if name == "summary":
            body = summary(results)
        elif name in TABLES:
            body = table(TABLES[name], by_name.get(TABLES[name].benchmark))
        else:
            raise ValueError(f"the page asks for a table {name!r}; there are: summary, {', '.join(TABLES)}")
        return f"{region[1]}{body}{region[4]}"

    opened, closed = page.count("<!-- table "), page.count("<!-- end -->")
    if opened != closed or opened != len(REGION.findall(page)):
        raise ValueError(f"the page opens {opened} tables and ends {closed}")
    return REGION.sub(write, page)


def main() -> None:
    from benchmarks.plots import draw

    results = load_all()
    PAGE.write_text(fill(PAGE.read_text(), results))
    draw(results, PLOTS)
    print(plain(results))


if __name__ == "__main__":
    main()
