"""Floor 5a: describe a model, plan an adapter for it, put it on, take it off."""

from lorakit.surgery.attach import attach
from lorakit.surgery.describe import Description, Node, describe
from lorakit.surgery.plan import Plan, make_plan
from lorakit.surgery.registry import AdapterRegistry, find_registry
from lorakit.surgery.unload import merge_and_unload, unload

__all__ = [
    "AdapterRegistry",
    "Description",
    "Node",
    "Plan",
    "attach",
    "describe",
    "find_registry",
    "make_plan",
    "merge_and_unload",
    "unload",
]
