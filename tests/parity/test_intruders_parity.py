"""PEFT as the judge of the reduced adapter: the same change of every weight."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as judge

from lorakit import reduce_intruder_dimension
from lorakit.layers import LoraLayer
from parity.models import NAMED_WARNINGS, pair, randomize

pytestmark = NAMED_WARNINGS

OPTIONS = [
    {},
    {"top_k": 3},
    {"threshold_epsilon": 0.9, "mitigation_lambda": 0.2},
    {"mitigation_lambda": 0.0},
    {"threshold_epsilon": 0.0},
]
FIELDS = {
    "llama": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    "bert": {"target_modules": ["query", "dense"], "r": 4, "use_rslora": True, "rank_pattern": {"query": 2}},
    "plain": {"target_modules": ["first", "middle"], "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", FIELDS)
def test_the_same_change(kind, options):
    both = pair(kind, FIELDS[kind])
    for model in both:
        randomize(model, seed=1)  # once more: larger than the base's own vectors can hide
    lines: list[str] = []
    judge(both.theirs, logging_sink=lines.append, **options)
    report = reduce_intruder_dimension(both.ours, logging_sink=None, show_progress=False, **options)
    counts = [int(line.rpartition(" ")[2]) if "Intruders:" in line else 0 for line in lines[:-1]]
    assert list(report.intruders.values()) == counts
    assert bool(sum(counts)) == (options.get("threshold_epsilon") != 0.0)
    for path, layer in both.ours.named_modules():
        if isinstance(layer, LoraLayer):
            old = layer.get_delta_weight("default")
            found = layer.get_delta_weight("intruder_reduced")
            wanted = both.theirs.get_submodule(path).get_delta_weight("intruder_reduced")
            assert torch.linalg.norm(found - wanted) <= 2e-5 * torch.linalg.norm(old), path
    assert both.ours.active_adapters == ["intruder_reduced"] == both.theirs.active_adapters
