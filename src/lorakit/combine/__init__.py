"""Several adapters of one weight made into one: pure functions from `Factors` to `Factors`, one row a method."""

from __future__ import annotations

from lorakit.combine.checking import check_request
from lorakit.combine.options import Combined, CombineOptions
from lorakit.combine.registry import METHODS
from lorakit.combine.run import combine

__all__ = ["METHODS", "CombineOptions", "Combined", "check_request", "combine"]
