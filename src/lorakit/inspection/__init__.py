"""Pictures of an adapter for people: what `lorakit.inspect_adapter` found as a page or an image."""

from __future__ import annotations

from lorakit.inspection.charts import short
from lorakit.inspection.grid import make_grid
from lorakit.inspection.write import write_report

__all__ = ["make_grid", "short", "write_report"]
