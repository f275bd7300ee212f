"""The page, the table of targets and the comparison with the record, on figures made up here."""

from __future__ import annotations

import json
import math
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from benchmarks import compare, figures, report
from benchmarks.figures import Result
from benchmarks.targets import TARGETS, Target

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {
    "cpu": "A",
    "threads": "1",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5",
    "peft": "0.21",
}


def row(name: str, ratio: float, spread: float = 0.1, **others: float) -> dict[str, Any]:
    times = {"lorakit": 10.0, "PEFT": 10.0 * ratio, **{key: 10.0 * value for key, value in others.items()}}
    return {
        "name": name,
        "milliseconds": times,
        "ratio": {"PEFT": ratio, **others},
        "spread": {"PEFT": spread, **dict.fromkeys(others, 0.01)},
    }


def result(name: str, *rows: dict[str, Any], machine: dict[str, str] | None = None, **extra: Any) -> Result:
    return Result(name, {"machine": machine or MACHINE, "rows": list(rows), **extra})


STEP = result(
    "train_step",
    row("a, d=1024", 1.5, frozen=0.8),
    row("b, d=1024", 1.2, frozen=0.5),
    saved_mib={"a, d=1024": {"lorakit": 100.0, "PEFT": 250.0, "frozen": 50.0, "gradient difference": 1e-6}},
)


# ---- readings ---------------------------------------------------------------------------------------------


def test_readings_of_times_and_bytes() -> None:
    a, b, kept = STEP.readings()
    assert (a.row, a.ratio, a.spread, a.over_floor) == ("a, d=1024", 1.5, 0.1, 1.25)
    assert (b.ratio, b.over_floor) == (1.2, 2.0)
    assert (kept.row, kept.ratio, kept.over_floor) == ("a, d=1024, kept for backward", 2.5, 2.0)
    assert a.floor == kept.floor == "the base without adapters"


def test_readings_of_memory_with_words_before_the_side() -> None:
    found = result(
        "moe_step", memory={"x": {"saved MiB, lorakit": 2.0, "saved MiB, PEFT": 30.0, "difference": 0.1}}
    )
    assert [(r.row, r.ratio, r.over_floor) for r in found.readings()] == [
        ("x, kept for backward", 15.0, None)
    ]


def test_readings_of_whole_processes() -> None:
    sides = {"lorakit": {"seconds": 2.0, "megabytes": 10.0}, "PEFT": {"seconds": 3.0, "megabytes": 500.0}}
    found = result("merge_disk", {"name": "all", "base_megabytes": 5.0, **sides}).readings()
    assert {r.row: r.ratio for r in found} == {"all, 5 MB, wall time": 1.5, "all, 5 MB, memory": 50.0}


@pytest.mark.parametrize(
    "content", [{}, {"rows": []}, {"rows": [{"name": "x"}]}, {"machine": {}, "runs": [1]}], ids=str
)
def test_figures_of_another_form_give_nothing_and_break_nothing(content: dict[str, Any]) -> None:
    odd = Result("odd", content)
    assert odd.readings() == []
    assert compare.compare([odd], lambda _: odd).worse == []
    for spec in report.TABLES.values():
        assert report.table(spec, odd)


# ---- targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target("t", "train_step", "a, d=1024", 1.4), 1.5, "reached"),
        (Target("t", "train_step", "a, d=1024", 1.5), 1.5, "reached"),
        (Target("t", "train_step", "a, d=1024", 3.0), 1.5, "50% short"),
        (Target("t", "train_step", "?, d=1024", 1.4), 1.2, "14% short"),  # the worst of both
        (Target("t", "train_step", "a, d=1024", 1.25, most=True), 1.25, "reached"),
        (Target("t", "train_step", "?, d=1024", 1.0, most=True), 2.0, "100% over"),
        (Target("t", "train_step", "*kept for backward", 2.5), 2.5, "reached"),
        (Target("t", "train_step", "a, d=4096", 1.4), None, "not measured"),
        (Target("t", "missing", "*", 1.4), None, "not measured"),
    ],
)
def test_judgement(target: Target, value: float | None, verdict: str) -> None:
    (outcome,) = report.outcomes([STEP], [target])
    assert (outcome.value, outcome.verdict) == (value, verdict)
    assert outcome.reached == (verdict == "reached")


def test_the_reason_stands_only_beside_what_is_missed() -> None:
    missed = Target("t", "train_step", "a, d=1024", 9.0, why="because")
    assert "short: because" in report.summary([STEP], [missed])
    assert "because" not in report.summary([STEP], [missed._replace(wanted=1.0)])
    assert "because" not in report.summary([], [missed])


def test_the_summary_says_which_machine_each_row_is_from() -> None:
    other = result("init", row("x", 3.0), machine={**MACHINE, "cpu": "B"})
    text = report.summary(
        [STEP, other], [Target("s", "train_step", "a*", 1.0), Target("i", "init", "x", 1.0)]
    )
    s, i = (line for line in text.splitlines() if line.startswith(("| s", "| i")))
    assert s.endswith("| 1 |")
    assert i.endswith("| 2 |")
    assert "Machine 1: A," in text
    assert "Machine 2: B," in text
    assert "2 of 2 targets are reached; 0 have not been measured." in text


def test_targets_are_sound() -> None:
    assert len({target.what for target in TARGETS}) == len(TARGETS)
    assert all(target.wanted > 0 for target in TARGETS)


@pytest.mark.parametrize(
    "size, name",  # noqa: PT006
    [("d=1024 L=4", "reached"), ("d=256 L=2", "not measured"), ("d=512 L=2", "not measured")],
)
def test_a_target_is_judged_at_its_own_size(size: str, name: str) -> None:
    wanted = next(t for t in TARGETS if t.what == "training step, bf16, fp32 adapters")
    rows = result("train_step", row(f"bf16 base, fp32 adapters, p=0, {size}", 2.0))
    assert report.judge(wanted, {"train_step": rows}).verdict == name


# ---- the page ---------------------------------------------------------------------------------------------

PAGE = "Words.\n\n<!-- table train_step -->\nold\n<!-- end -->\n\nMore.\n\n<!-- table init -->\n<!-- end -->\nEnd.\n"


def test_only_what_is_marked_is_written() -> None:
    page = report.fill(PAGE, [STEP])
    assert "old" not in page
    assert page.startswith("Words.\n\n<!-- table train_step -->\n| training step |")
    assert (
        "| a, d=1024 | 10.0 | 15.0 | **1.50** ± 0.10 | 1.25 | 100 | 250 | – |".replace("| – |", "| 50.0 |")
        in page
    )
    assert "*A, 1 thread, Python 3.11.7, torch 2.13.0, transformers 5, PEFT 0.21*" in page
    assert "*Not measured yet: `python -m benchmarks.init`.*" in page
    assert page.endswith("<!-- end -->\nEnd.\n")
    assert report.fill(page, [STEP]) == page


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- table nonsense -->\n<!-- end -->\n", "nonsense"),
        ("<!-- table init -->\n", "ends 0"),
        ("<!-- table init -->\n<!-- table init -->\n<!-- end -->\n", "opens 2 tables"),
    ],
)
def test_a_page_that_asks_for_what_there_is_not(page: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        report.fill(page, [])


def test_the_page_on_record_is_what_its_figures_say() -> None:
    page = report.PAGE.read_text()
    assert report.fill(page, figures.load_all()) == page


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.34, "12.3"), (1.234, "1.23"), (0.05, "0.05"), (math.nan, "–")]
)
def test_numbers(value: float, text: str) -> None:
    assert report.number(value) == text


def test_plots_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots")
    pytest.importorskip("matplotlib")
    points = {"step, r=4": {"law": "step", "x": 4}, "step, r=8": {"law": "step", "x": 8}}
    scaling = result("scaling", row("step, r=4", 1.1), row("step, r=8", 1.2), points=points)
    combined = result("combine_svd", row("svd, 2 x r=16, 1024x1024", 300.0))
    first, second = (plots.draw([scaling, combined], tmp_path / name) for name in "ab")
    assert [file.name for file in first] == ["scaling.svg", "targets.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert "svd of two adapters, 1024 x 1024" in first[1].read_text()
    assert plots.draw([], tmp_path / "c") == []


# ---- against the record -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "spreads", "verdict"),
    [
        (2.0, 1.5, (0.1, 0.1), -1),
        (2.0, 1.75, (0.1, 0.1), 0),  # within both spreads and 5 %
        (2.0, 1.96, (0.0, 0.0), 0),
        (2.0, 1.85, (0.0, 0.0), -1),
        (2.0, 2.5, (0.1, 0.1), 1),
        (2.0, 1.0, (0.9, 0.5), 0),
    ],
)
def test_a_ratio_got_worse_beyond_the_spread(
    old: float, new: float, spreads: tuple[float, float], verdict: int
) -> None:
    before, after = result("x", row("r", old, spreads[0])), result("x", row("r", new, spreads[1]))
    found = compare.compare([after], lambda _: before)
    assert [len(found.worse), found.same, len(found.better)] == [verdict == -1, verdict == 0, verdict == 1]


def test_times_are_not_compared() -> None:
    slow = row("r", 2.0)
    slow["milliseconds"] = {key: 100 * value for key, value in slow["milliseconds"].items()}
    assert compare.compare([result("x", slow)], lambda _: result("x", row("r", 2.0))).same == 1


def test_what_is_kept_for_backward_has_no_noise() -> None:
    def kept(theirs: float) -> Result:
        return result("x", saved_mib={"r": {"lorakit": 100.0, "PEFT": theirs}})

    assert compare.compare([kept(195.0)], lambda _: kept(200.0)).worse
    assert not compare.compare([kept(199.0)], lambda _: kept(200.0)).worse


def test_what_is_not_compared_is_said() -> None:
    elsewhere = result("x", row("r", 1.0), machine={**MACHINE, "cpu": "B"})
    record = {"x": result("x", row("r", 2.0)), "y": result("y", row("r", 2.0), row("gone", 2.0))}
    found = compare.compare([elsewhere, result("y", row("r", 2.0)), result("z", row("r", 1.0))], record.get)
    assert (found.worse, found.same) == ([], 1)
    text = compare.show(found)
    assert "x: another machine, not compared" in text
    assert "y: on record and not run: gone" in text
    assert "z: nothing on record" in text


def test_the_record_is_what_git_holds(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)

    def git(*arguments: str) -> None:
        names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (folder / "x.json").write_text(json.dumps(result("x", row("r", 2.0)).content))
    git("add", ".")
    git("commit", "-m", "figures")
    (folder / "x.json").write_text(json.dumps(result("x", row("r", 1.0)).content))
    on_record = figures.committed("x", tmp_path)
    assert on_record is not None
    assert on_record.readings()[0].ratio == 2.0
    assert figures.committed("y", tmp_path) is None
    found = compare.compare(figures.load_all(folder), lambda name: figures.committed(name, tmp_path))
    assert len(found.worse) == 1
    assert "2.00 ±0.10 -> 1.00 ±0.10" in found.worse[0]
