"""Variants that a matrix can have, on bases whose weight is stored in few bits: as on the numbers that are stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, get_peft_model
from lorakit.weights import find_codec
from models import randomise
from quantised import BY_NAME, IN, make

VARIANTS = {
    "kasa": {"kasa_config": {}},
    "bdlora_a": {"use_bdlora": {"target_modules_bd_a": ["0"], "nblocks": 2}},
    "bdlora_b": {"use_bdlora": {"target_modules_bd_b": ["0"], "nblocks": 2}},
    "qalora": {"use_qalora": True, "qalora_group_size": 32},
    "monteclora": {"monteclora_config": {}},
}


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_as_on_the_numbers_that_are_stored(kind, name):
    base = make(BY_NAME[kind])
    plain = nn.Linear(IN, base.out_features)
    with torch.no_grad():
        plain.weight.copy_(find_codec(base).read(base, torch.float32))
        plain.bias.copy_(base.bias)
    config = LoraConfig(r=4, target_modules=["0"], **VARIANTS[name])
    x = torch.randn(5, IN)
    added, gradients = [], []
    for layer in (base, plain):
        model = get_peft_model(nn.Sequential(layer), config).eval()
        randomise(model)
        with model.disable_adapter():
            alone = model(x).detach()
        y = model(x)
        y.square().sum().backward()
        added.append(y.detach() - alone)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert added[1].abs().max() > 0.1
    assert torch.allclose(added[0], added[1], atol=2e-3 * float(added[1].abs().max()))
    assert gradients[0].keys() == gradients[1].keys() != set()
    for key, value in gradients[1].items():
        assert (gradients[0][key] - value).norm() < 0.05 * value.norm(), key
