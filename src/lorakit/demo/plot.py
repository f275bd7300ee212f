"""A picture of the demo's training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.demo.run import DemoResult

_SMOOTH = 0.9


def plot_training(result: DemoResult, path: Path) -> None:
    """Write a PNG with the training loss and the held-out accuracy over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = range(1, len(result.losses) + 1)
    left.plot(steps, result.losses, color="0.8", linewidth=1, label="each step")
    left.plot(steps, _smoothed(result.losses), color="tab:blue", label="smoothed")
    left.set(title="training loss", xlabel="step", ylabel="cross entropy")
    left.legend()
    at, values = zip(*result.accuracies, strict=True)
    right.plot(at, values, marker="o", color="tab:blue", label="LoRA")
    right.axhline(result.head_accuracy, color="tab:orange", linestyle="--", label="frozen model, linear head")
    right.axhline(1 / len(result.labels), color="0.6", linestyle=":", label="chance")
    right.set(title=f"accuracy on {result.test_texts} held-out texts", xlabel="step", ylim=(0, 1))
    right.legend(loc="lower right")
    figure.suptitle("LoRA on MiniLM: which kind of comparison was taken out of a line of Python?")
    canvas.print_png(str(path))


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = _SMOOTH * average + (1 - _SMOOTH) * value
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        out.append(average / weight)
    return out
