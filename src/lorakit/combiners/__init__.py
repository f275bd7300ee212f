"""Several adapters of one weight made into one: pure functions from `Factors` to `Factors`, one row a method."""

from __future__ import annotations

from lorakit.combiners.checking import check_request
from lorakit.combiners.options import Combined, CombineOptions
from lorakit.combiners.registry import METHODS
from lorakit.combiners.run import combine

__all__ = ["METHODS", "CombineOptions", "Combined", "check_request", "combine"]
