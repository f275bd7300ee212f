"""Plans of schemes that begin from data: what a run over the data found goes into the rows, and is used up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.init.gathered import PREPARED_BY, gathered, use_up, why_not_from_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from lorakit.specs import AdapterSpec
    from lorakit.surgery.describe import Description
    from lorakit.surgery.plan import Plan


def with_gathered(
    specs: Sequence[AdapterSpec], description: Description, problems: list[str]
) -> list[AdapterSpec]:
    """The rows of a plan with what was gathered for them; `problems` gets a line for each that has nothing it can use."""
    found = []
    for spec in specs:
        if spec.init not in PREPARED_BY or spec.tied_to is not None:
            found.append(spec)
            continue
        module = _linear(spec, description)
        problem = why_not_from_data(module, spec.init, spec.layout, spec.r)
        if problem or module is None:
            problems.append(f"{spec.path}: {problem}")
        else:
            found.append(replace(spec, init_options=gathered(module, spec.init)))
    return found


def use_up_gathered(plan: Plan) -> None:
    """Drop what was gathered for a plan's layers, once an adapter has begun from it."""
    for spec in plan.specs:
        if spec.init in PREPARED_BY:
            module = _linear(spec, plan.description)
            if module is not None:
                use_up(module, spec.init)


def _linear(spec: AdapterSpec, description: Description) -> nn.Module | None:
    return description.nodes[spec.path].module if spec.kind in {"linear", "conv1d"} else None
