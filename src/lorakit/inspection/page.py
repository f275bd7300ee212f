"""An adapter's report as one HTML page that needs nothing but itself: no network, no fonts, no libraries.

Everything in the files is foreign text, and escaped. A policy in the page forbids it to load anything.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from lorakit.config import LoraConfig
from lorakit.inspection.charts import depth_legend, heat_map, legend, short, small_bars, spectra
from lorakit.inspection.grid import NO_ROW, make_grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorakit.checkpoint.adapter_report import AdapterReport, InspectedLayer
    from lorakit.inspection.grid import Grid

_MOST_CHARTS = 24
_NUMBER = ' class="number"'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root{color-scheme:light;--line:#e2e5ea;--dim:#5b6472}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:#1c2330;font:14px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1360px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 12px}
p{margin:4px 0}
.dim{color:var(--dim)}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:16px;margin-top:16px;overflow-x:auto}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin-top:16px}
.card{background:#fff;border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:120px}
.card b{display:block;font-size:20px}
.card.bad b{color:#b3261e}
li.bad{color:#b3261e}
li{white-space:pre-wrap;overflow-wrap:anywhere}
svg{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;vertical-align:top}
svg .small{font-size:10px;fill:#5b6472}
svg.bars{fill:#3e4a89}
.charts{display:flex;flex-wrap:wrap;gap:12px}
.legend{color:var(--dim)}
.legend svg{vertical-align:middle}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:4px 8px;border-bottom:1px solid var(--line);white-space:nowrap}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #3e4a89}
th[aria-sort=ascending] button::after{content:" ▲"}
th[aria-sort=descending] button::after{content:" ▼"}
tr.bad td{background:#fdecea}
tr.dead td{background:#f0f0f0}
input{font:inherit;padding:4px 8px;border:1px solid var(--line);border-radius:4px;width:320px;max-width:100%}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:8px 0 0}
td.wide{white-space:normal;overflow-wrap:anywhere}
@media print{body{background:#fff}input{display:none}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const numeric = head.classList.contains("number");
    const order = (a, b) => numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b), "en", {numeric: true});
    [...body.rows].sort((a, b) => sign * order(a, b)).forEach(row => body.append(row));
  }));
  const filter = document.getElementById(table.dataset.filter);
  if (filter) filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""


def make_page(report: AdapterReport) -> str:
    """The whole page."""
    name = PurePath(report.path).name or report.path
    grid = make_grid(report.layers)
    sections = [
        _cards(report),
        _section("What stands out", _odd(report)),
        _section("Norm of the change of each layer", _map(grid)) if grid.cells else "",
        _section("Singular values of the change", _charts(grid)) if grid.cells else "",
        _section("Layers", _layers(report.layers)) if report.layers else "",
        _section("Other tensors", _others(report)) if report.others else "",
        _section("Where it comes from", _origin(report)),
        _section("Config", _config(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(name)}: a LoRA adapter</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(name)}</h1><p class="dim">{escape(_subtitle(report))}</p>'
        + "\n".join(sections)
        + f"</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _subtitle(report: AdapterReport) -> str:
    kind = report.variant or "LoRA"
    base = f" for {report.base}" if report.base else ""
    return f"{kind}, r={report.config['r']}, lora_alpha={report.config['lora_alpha']}{base}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _cards(report: AdapterReport) -> str:
    rows = [
        ("parameters", f"{report.parameters:,}", False),
        ("size", f"{report.bytes / 1e6:,.2f} MB", False),
        ("dtype", ", ".join(report.dtypes) or "–", False),
        ("layers", f"{len(report.layers):,}", False),
        ("norm of the change", short(report.norm), False),
        ("dead layers", f"{len(report.dead):,}", bool(report.dead)),
        ("with NaN or infinity", f"{len(report.non_finite):,}", bool(report.non_finite)),
        ("digest", report.digest, report.digest == "does not fit"),
    ]
    cards = "".join(
        f'<div class="card{" bad" * bad}"><b>{escape(value)}</b>{escape(name)}</div>'
        for name, value, bad in rows
    )
    return f'<div class="cards">{cards}</div>'


def _odd(report: AdapterReport) -> str:
    lines = list(_faults(report))
    items = [f'<li class="bad">{escape(line)}</li>' for line in lines]
    items += [f"<li>{escape(note)}</li>" for note in report.notes]
    return (
        f"<ul>{''.join(items)}</ul>" if items else "<p>Nothing: all numbers are finite, no layer is dead.</p>"
    )


def _faults(report: AdapterReport) -> Iterator[str]:
    yield from report.problems
    if report.digest == "does not fit":
        yield "The digest does not fit: the file was damaged or changed after it was saved."
    if report.config_state.startswith("edited"):
        yield f"adapter_config.json was changed after the adapter was saved ({report.config_state})."
    for paths, what in ((report.non_finite, "NaN or infinity in"), (report.dead, "The change is zero in")):
        if paths:
            more = f" and {len(paths) - 5:,} more" if len(paths) > 5 else ""
            yield f"{what} {', '.join(paths[:5])}{more}."


def _map(grid: Grid) -> str:
    norms = [layer.norm for layer in grid.cells.values() if layer.norm is not None]
    scale = legend("0", short(max(norms))) if norms else ""
    return f'<p class="dim">Frobenius norm of scaling · B A. {scale}</p>{heat_map(grid)}'


def _charts(grid: Grid) -> str:
    charts = []
    columns = sorted(grid.columns, key=lambda column: -max(_norms(grid, column)))
    shown = set(columns[:_MOST_CHARTS])
    for column in grid.columns:
        own = [
            (layer, number / max(1, len(grid.rows) - 1))
            for number, row in enumerate(grid.rows)
            if (layer := grid.cells.get((row, column))) is not None and layer.spectrum and not layer.dead
        ]
        if own and column in shown:
            charts.append(spectra(column, [layer for layer, _ in own], [depth for _, depth in own]))
    left = len(grid.columns) - len(shown)
    note = f'<p class="dim">{left:,} more modules, of smaller norm, are in the table.</p>' if left else ""
    first, last = (row if row != NO_ROW else "first" for row in (grid.rows[0], grid.rows[-1]))
    intro = f'<p class="dim">One line a layer, the largest value at the left. {depth_legend(first, last)}</p>'
    return f'{intro}<div class="charts">{"".join(charts)}</div>{note}'


def _norms(grid: Grid, column: str) -> list[float]:
    return [layer.norm or 0.0 for (_, own), layer in grid.cells.items() if own == column]


# ---- tables -------------------------------------------------------------------------------------------


def _cell(text: str, value: float | str | None = None, *, number: bool = False) -> str:
    key = -1 if value is None and number else text if value is None else value
    return f'<td{_NUMBER * number} data-value="{escape(str(key))}">{escape(text)}</td>'


def _table(heads: Sequence[tuple[str, bool]], rows: Sequence[str], name: str) -> str:
    cells = "".join(
        f'<th{_NUMBER * number}><button type="button">{escape(title)}</button></th>'
        for title, number in heads
    )
    return (
        f'<p><input id="{name}" type="search" placeholder="Filter" aria-label="Filter the table"/></p>'
        f'<table class="sortable" data-filter="{name}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _layers(layers: Sequence[InspectedLayer]) -> str:
    heads = [
        ("layer", False), ("kind", False), ("weight", False), ("rank", True), ("scaling", True), ("norm", True),
        ("spectrum", True), ("effective rank", True), ("for 99 %", True), ("largest", True), ("not finite", True),
        ("dtype", False),
    ]  # fmt: skip
    rows = []
    for layer in layers:
        bad = layer.nan or layer.inf
        kind = ' class="bad"' if bad else ' class="dead"' if layer.dead else ""
        largest = layer.spectrum[0] if layer.spectrum else None
        needed = None if layer.energy_rank is None else float(layer.energy_rank)
        times = f"{layer.blocks} × " * (layer.blocks > 1 and layer.kind == "experts")
        cells = [
            _cell(layer.path),
            _cell(layer.kind),
            _cell(f"{times}{layer.shape[0]} × {layer.shape[1]}"),
            _cell(str(layer.rank), layer.rank, number=True),
            _cell(short(layer.scaling), layer.scaling, number=True),
            _cell(short(layer.norm, 4), layer.norm, number=True),
            f'<td data-value="{layer.effective_rank or 0.0}">{small_bars(layer.spectrum)}</td>',
            _cell(short(layer.effective_rank), layer.effective_rank, number=True),
            _cell(short(needed), needed, number=True),
            _cell(short(largest), largest, number=True),
            _cell(f"{layer.nan + layer.inf:,}", layer.nan + layer.inf, number=True),
            _cell(layer.dtype),
        ]
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return _table(heads, rows, "filter-layers")


def _others(report: AdapterReport) -> str:
    heads = [
        ("tensor", False), ("kind", False), ("shape", False), ("dtype", False), ("norm", True), ("NaN", True),
        ("infinite", True),
    ]  # fmt: skip
    rows = []
    for tensor in report.others:
        kind = ' class="bad"' if tensor.nan or tensor.inf else ""
        cells = [
            _cell(tensor.name),
            _cell(tensor.kind),
            _cell(" × ".join(map(str, tensor.shape))),
            _cell(tensor.dtype),
            _cell(short(tensor.norm, 4), tensor.norm, number=True),
            _cell(f"{tensor.nan:,}", tensor.nan, number=True),
            _cell(f"{tensor.inf:,}", tensor.inf, number=True),
        ]
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return _table(heads, rows, "filter-others")


def _pairs(rows: Sequence[tuple[str, object]]) -> str:
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="wide">{escape(str(value))}</td></tr>' for name, value in rows
    )
    return f"<table><tbody>{cells}</tbody></table>"


def _origin(report: AdapterReport) -> str:
    rows: list[tuple[str, object]] = [
        ("folder", report.path),
        ("base", report.base or "–"),
        ("revision of the base", report.revision or "–"),
        ("task", report.task_type or "–"),
        ("written by PEFT", report.peft_version or "–"),
        ("config", report.config_state),
    ]
    rows += [
        (f"tensors: {kind.kind}", f"{kind.tensors:,}, {kind.parameters:,} parameters, {kind.bytes:,} bytes")
        for kind in report.kinds
    ]
    rows += [(f"file: {name}", f"{size:,} bytes") for name, size in report.files.items()]
    rows += [(f"metadata: {key}", text) for key, text in sorted(report.metadata.items())]
    return _pairs(rows)


def _config(report: AdapterReport) -> str:
    usual = LoraConfig().to_dict()
    missing = object()
    rows = [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in sorted(report.config.items())
        if value != usual.get(name, missing)
    ]
    everything = escape(json.dumps(report.config, indent=2, sort_keys=True, ensure_ascii=False))
    return (
        f"{_pairs(rows)}<details><summary>All fields</summary><pre>{everything}</pre></details>"
        if rows
        else f"<pre>{everything}</pre>"
    )
