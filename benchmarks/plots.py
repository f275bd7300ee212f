"""The plots of docs/benchmarks.md, drawn from the benchmarks' JSON. The same figures give the same files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import machine_words
from benchmarks.report import outcomes
from benchmarks.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.figures import Result
    from benchmarks.targets import Target

LAWS = {
    "step": ("training step", "rank"),
    "attach": ("get_peft_model", "layers of the model"),
    "mixed": ("mixed batch, one layer", "adapters"),
    "merge and unload": ("merge in place", "width of the weight"),
}
COLOURS = {"lorakit": "#1f77b4", "PEFT": "#d62728"}
FLOOR = "#7f7f7f"


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write every plot that there are figures for; gives the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with mpl.rc_context({"svg.hashsalt": "lorakit", "svg.fonttype": "none", "font.size": 9}):
        scaling = next((result for result in results if result.benchmark == "scaling"), None)
        if scaling is not None:
            made.append(_scaling(scaling, folder / "scaling.svg"))
        if any(each.value is not None for each in outcomes(results)):
            made.append(_targets(results, TARGETS, folder / "targets.svg"))
    return made


def _scaling(result: Result, file: Path) -> Path:
    """Time against size, one panel a law, with a line for each side and for the floor."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    points = result.content.get("points", {})
    for panel, (law, (title, axis)) in zip(panels.flat, LAWS.items(), strict=True):
        lines = _lines(result, points, law)
        for (side, group), places in lines.items():
            style = {"color": COLOURS.get(side, FLOOR), "linestyle": ":" if side not in COLOURS else "-"}
            if group.endswith("bf16"):
                style["linestyle"] = "--"
            panel.plot(
                *zip(*sorted(places), strict=True),
                marker="o",
                markersize=3,
                label=f"{side} {group}".strip(),
                **style,
            )
        _label(panel, title, axis, shown=bool(lines))
    figure.suptitle(machine_words(result), fontsize=7)
    _save(figure, file)
    return file


def _lines(
    result: Result, points: dict[str, dict[str, object]], law: str
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Size and milliseconds by side and group (the dtype, where there are several)."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in result.rows:
        point = points.get(row["name"], {})
        if point.get("law") == law:
            for side, milliseconds in row["milliseconds"].items():
                place = (float(str(point["x"])), float(milliseconds))
                lines.setdefault((side, str(point.get("group", ""))), []).append(place)
    return lines


def _label(panel: Axes, title: str, axis: str, *, shown: bool) -> None:
    panel.set(title=title, xlabel=axis, ylabel="CPU time, ms", xscale="log", yscale="log")
    panel.grid(visible=True, which="major", alpha=0.3)
    if shown:
        panel.legend(fontsize=7)


def _targets(results: Sequence[Result], targets: Sequence[Target], file: Path) -> Path:
    """PEFT over lorakit of every target that was measured, and where it should be."""
    from matplotlib import pyplot as plt

    found = [each for each in outcomes(results, targets) if each.value is not None and not each.target.most]
    found.reverse()
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(found) + 1), layout="constrained")
    values = [each.value or 1.0 for each in found]
    colours = ["#2ca02c" if each.reached else "#ff7f0e" for each in found]
    axes.barh(range(len(found)), [value - 1 for value in values], left=1, color=colours)
    axes.plot([each.target.wanted for each in found], range(len(found)), "k|", markersize=11, label="wanted")
    axes.set_yticks(range(len(found)), [each.target.what for each in found])
    axes.set(xscale="log", xlabel="PEFT / lorakit; left of 1 PEFT is faster")
    axes.axvline(1, color=FLOOR, linewidth=0.8)
    axes.legend(loc="lower right")
    _save(figure, file)
    return file


def _save(figure: object, file: Path) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
