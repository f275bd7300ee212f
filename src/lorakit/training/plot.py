"""A picture of a training run."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def plot_losses(
    losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], path: Path
) -> bool:
    """Write a PNG of the losses over the steps, if matplotlib is installed; says whether it is.

    Args:
        losses: (step, loss) of the training rows.
        held_out: of those held out.
        path: of the picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rows, label, style in ((losses, "training", "-"), (held_out, "held out", "o-")):
        if rows:
            axes.plot(*zip(*rows, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss")
    if losses or held_out:
        axes.legend()
    canvas.print_png(str(path))
    return True
