"""Floor 5a: describe a model, plan an adapter for it, put it on, take it off."""

from lorakit.surgery.attach import attach
from lorakit.surgery.choice import for_each_sample, for_the_call
from lorakit.surgery.describe import Description, Node, base_modules, describe
from lorakit.surgery.from_data import use_up_gathered
from lorakit.surgery.invocation import invoked, invoking
from lorakit.surgery.naming import expected_tensors
from lorakit.surgery.plan import Plan, make_plan
from lorakit.surgery.registry import AdapterRegistry, find_registry
from lorakit.surgery.unload import merge_and_unload, unload

__all__ = [
    "AdapterRegistry",
    "Description",
    "Node",
    "Plan",
    "attach",
    "base_modules",
    "describe",
    "expected_tensors",
    "find_registry",
    "for_each_sample",
    "for_the_call",
    "invoked",
    "invoking",
    "make_plan",
    "merge_and_unload",
    "unload",
    "use_up_gathered",
]
