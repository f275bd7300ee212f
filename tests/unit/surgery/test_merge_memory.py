"""What merging holds: one tile, whatever the size of a layer; beside it the merged weights, if it can be undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lorakit
from lorakit.ops.merge import TILE_ELEMENTS

LAYERS, WIDTH = 2, 2560  # a layer has more than a tile and a half
SMALL = 2**21  # bytes for the factors and what is computed of them


def peak_of(run):
    """The most bytes that were allocated at once while this ran, without what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_holds_one_tile_beside_what_it_keeps(dtype, how):
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))
    config = lorakit.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = lorakit.get_peft_model(base, config)
    before = base[0].base_layer.weight.detach().clone()
    kept = WIDTH * WIDTH * dtype.itemsize * LAYERS if how == "merge_adapter" else 0  # the weights from before
    tile = 0 if dtype == torch.float32 else 4 * TILE_ELEMENTS  # fp32 is accumulated where it is to be
    peak = peak_of(getattr(model, how))
    assert kept <= peak <= kept + tile + SMALL
    weight = base[0].weight if how == "merge_and_unload" else base[0].base_layer.weight
    assert not torch.equal(weight, before)
