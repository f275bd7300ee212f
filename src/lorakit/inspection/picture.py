"""An adapter's report as one image, drawn by matplotlib."""

from __future__ import annotations

import io
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lorakit.errors import UnsupportedError
from lorakit.inspection.charts import short
from lorakit.inspection.grid import make_grid

if TYPE_CHECKING:
    from lorakit.checkpoint.adapter_report import AdapterReport
    from lorakit.inspection.grid import Grid

_MOST_NUMBERS = 300  # cells beyond which the numbers in them would overlap


def make_picture(report: AdapterReport) -> bytes:
    """A PNG with the norms of the layers and their singular values.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a PNG needs matplotlib: pip install 'lorakit[demo]'; an HTML report needs nothing"
        ) from error
    grid = make_grid(report.layers)
    height = min(40.0, max(4.0, 1.6 + 0.24 * len(grid.rows)))
    figure = Figure(figsize=(6 + max(5.0, 0.7 * len(grid.columns)), height), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_map(left, grid)
    _draw_spectra(right, grid)
    name = PurePath(report.path).name or report.path
    figure.suptitle(
        _plain(
            f"{name}: {report.parameters:,} parameters, {len(report.layers)} layers, {len(report.dead)} dead, "
            f"{len(report.non_finite)} with NaN or infinity"
        )
    )
    found = io.BytesIO()
    canvas.print_png(found, metadata={"Software": None})
    return found.getvalue()


def _draw_map(axes: Any, grid: Grid) -> None:
    import numpy as np

    norms = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), layer in grid.cells.items():
        if layer.norm is not None:
            norms[grid.rows.index(row), grid.columns.index(column)] = layer.norm
    axes.set_title("norm of the change")
    if not norms.size:
        return
    image = axes.imshow(norms, aspect="auto", cmap="viridis", vmin=0.0)
    axes.set_xticks(
        range(len(grid.columns)), [_plain(column) for column in grid.columns], rotation=40, ha="right"
    )
    axes.set_yticks(range(len(grid.rows)), [_plain(row) for row in grid.rows])
    axes.figure.colorbar(image, ax=axes, shrink=0.6)
    if norms.size > _MOST_NUMBERS:
        return
    half = 0.6 * (np.nanmax(norms) if np.isfinite(norms).any() else 1.0)
    for (row, column), layer in grid.cells.items():
        place = grid.columns.index(column), grid.rows.index(row)
        label = "NaN" if layer.norm is None else "dead" if layer.dead else short(layer.norm, 2)
        ink = "red" if layer.norm is None else "black" if layer.norm > half else "white"
        axes.text(*place, label, ha="center", va="center", fontsize=8, color=ink)


def _draw_spectra(axes: Any, grid: Grid) -> None:
    from matplotlib import colormaps

    axes.set(title="singular values of the change", xlabel="rank")
    palette = colormaps["tab10"]
    for number, column in enumerate(grid.columns):
        label: str | None = _plain(column)
        for row in grid.rows:
            layer = grid.cells.get((row, column))
            if layer is None or not layer.spectrum or layer.dead:
                continue
            values = [value for value in layer.spectrum if value > 1e-6 * layer.spectrum[0]]
            marker = "o" if len(values) == 1 else None
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=palette(number % 10),
                alpha=0.6,
                label=label,
                marker=marker,
            )
            label = None
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(fontsize=8)


def _plain(text: str) -> str:
    """A text in which matplotlib finds no formula, and of bearable length."""
    return text[:120].replace("$", r"\$")
