"""Drawings of layers as SVG: small, without scripts, without any reference to something outside."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.checkpoint.adapter_report import InspectedLayer
    from lorakit.inspection.grid import Grid

# Viridis (Smith and van der Walt, 2015): even to the eye, also in grey and to the colour-blind.
_PALETTE = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip
_LETTER = 6.6  # width of a letter at 12 px
_CELL = (64, 22)
_CHART = (296, 190)
_INSET = (46, 10, 10, 28)  # of the axes: left, top, right, bottom
_DEEPEST = 0.85  # yellow lines could not be seen on white
_DECADES = 6  # what is smaller than the largest value by more is rounding


def short(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(_PALETTE) - 1)
    low = min(int(place), len(_PALETTE) - 2)
    part = place - low
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(_PALETTE[low], _PALETTE[low + 1], strict=True)
    )
    return red, green, blue


def heat_map(grid: Grid) -> str:
    """The norm of each layer's delta, as a colour and a number."""
    width, height = _CELL
    left = 12 + _LETTER * max(map(len, grid.rows))
    turned = _LETTER * max(map(len, grid.columns))
    top = 14 + turned * math.sin(math.radians(40))
    largest = max((layer.norm or 0.0 for layer in grid.cells.values()), default=0.0)
    full = left + width * len(grid.columns) + turned * math.cos(math.radians(40))
    parts = [_opened(full, top + height * len(grid.rows) + 8, "Norm of the change of each layer")]
    for number, column in enumerate(grid.columns):
        x = left + width * (number + 0.5)
        parts.append(_text(x, top - 6, column, f'transform="rotate(-40 {x:.1f} {top - 6:.1f})"'))
    for number, row in enumerate(grid.rows):
        parts.append(_text(left - 6, top + height * (number + 0.68), row, 'text-anchor="end"'))
    for (row, column), layer in grid.cells.items():
        x = left + width * grid.columns.index(column)
        y = top + height * grid.rows.index(row)
        parts.append(_cell(x, y, layer, largest))
    return "".join([*parts, "</svg>"])


def _cell(x: float, y: float, layer: InspectedLayer, largest: float) -> str:
    width, height = _CELL
    share = (layer.norm or 0.0) / largest if largest else 0.0
    fill, ink, label = f"rgb{colour(share)}", "#000" if share > 0.6 else "#fff", short(layer.norm, 2)
    if layer.norm is None:
        fill, ink, label = "#c62828", "#fff", "NaN"
    elif layer.dead:
        fill, ink, label = "#e0e0e0", "#555", "dead"
    title = f"{layer.path}: norm {short(layer.norm, 4)}, rank {layer.rank}, effective {short(layer.effective_rank)}"
    return (
        f'<g><title>{escape(title)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width - 2}" height="{height - 2}" '
        f'rx="2" fill="{fill}"/>'
        + _text(x + width / 2 - 1, y + height * 0.68, label, f'text-anchor="middle" fill="{ink}"')
        + "</g>"
    )


def spectra(title: str, layers: Sequence[InspectedLayer], depths: Sequence[float]) -> str:
    """The singular values of some layers, one line each, on a logarithmic scale.

    Args:
        title: above the chart.
        layers: with finite spectra that are not all zero.
        depths: of each in the model, in [0, 1]: the colour.
    """
    width, height = _CHART
    highest = max(layer.spectrum[0] for layer in layers)
    positive = [value for layer in layers for value in layer.spectrum if value > highest * 10.0**-_DECADES]
    high, low = math.log10(highest), math.log10(min(positive))
    low = min(low, high - 0.4)  # room for a mark at 1, 2 or 5
    longest = max(len(layer.spectrum) for layer in layers)
    axes = _Axes(low, high, longest)
    parts = [_opened(width, height + 18, title), _text(4, 14, title, 'font-weight="600"'), axes.drawn()]
    for layer, depth in zip(layers, depths, strict=True):
        points = [
            axes.point(number, math.log10(value))
            for number, value in enumerate(layer.spectrum, 1)
            if math.isfinite(value) and value >= min(positive)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        told = f"{layer.path}: {short(layer.spectrum[0], 4)} … {short(layer.spectrum[-1], 4)}"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="rgb{colour(_DEEPEST * depth)}" stroke-width="1.5" '
            f'stroke-opacity="0.8"><title>{escape(told)}</title></polyline>'
        )
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="rgb{colour(_DEEPEST * depth)}"/>')
    return "".join([*parts, "</svg>"])


class _Axes:
    """Ranks along, powers of ten up."""

    def __init__(self, low: float, high: float, longest: int) -> None:
        self._low, self._high, self._longest = low, high, longest

    def point(self, number: int, level: float) -> tuple[float, float]:
        """Where the k-th value of this power of ten is drawn."""
        left, top, right, bottom = _INSET
        width, height = _CHART
        along = (number - 1) / max(1, self._longest - 1)
        up = (level - self._low) / (self._high - self._low)
        return left + along * (width - left - right), 18 + top + (1.0 - up) * (height - top - bottom)

    def drawn(self) -> str:
        parts = []
        left, right = self.point(1, self._low)[0], self.point(max(2, self._longest), self._low)[0]
        for value in self._marks():
            y = self.point(1, math.log10(value))[1]
            parts.append(f'<path d="M{left} {y:.1f}H{right:.1f}" stroke="#ddd"/>')
            parts.append(_text(left - 5, y + 4, f"{value:g}", 'text-anchor="end" class="small"'))
        bottom = self.point(1, self._low)[1]
        numbers = sorted({1, (1 + self._longest) // 2, self._longest})
        for number in numbers:
            x = self.point(number, self._low)[0]
            parts.append(_text(x, bottom + 14, str(number), 'text-anchor="middle" class="small"'))
        return "".join(parts)

    def _marks(self) -> list[float]:
        """Round values within the axis: 1, 2 and 5 times powers of ten, or the powers alone if they are many."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        steps = (1, 2, 5) if self._high - self._low < 2 else (1,)
        values = [step * 10.0**power for power in powers for step in steps]
        return [value for value in values if self._low <= math.log10(value) <= self._high]


def depth_legend(first: str, last: str) -> str:
    """The colours of `spectra`, from the first layer to the last."""
    return legend(first, last, _DEEPEST)


def small_bars(values: Sequence[float], count: int = 32) -> str:
    """The largest values as bars in a line of text, relative to the first."""
    shown = [value / values[0] for value in values[:count]] if values and values[0] > 0.0 else []
    bars = "".join(
        f'<rect x="{3 * place}" y="{16 - 16 * share:.1f}" width="2" height="{16 * share:.1f}"/>'
        for place, share in enumerate(shown)
    )
    return f'<svg class="bars" width="{3 * count}" height="16" aria-hidden="true">{bars}</svg>'


def legend(low: str, high: str, top: float = 1.0) -> str:
    """The palette up to a share, with what its ends mean."""
    bars = "".join(
        f'<rect x="{6 * place}" width="6" height="10" fill="rgb{colour(top * place / 23)}"/>'
        for place in range(24)
    )
    return (
        f'<span class="legend">{escape(low)} <svg width="144" height="10" aria-hidden="true">{bars}</svg> '
        f"{escape(high)}</span>"
    )


def _opened(width: float, height: float, title: str) -> str:
    return (
        f'<svg width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
