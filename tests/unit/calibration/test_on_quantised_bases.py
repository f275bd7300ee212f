"""EVA needs only what a layer is given, so any base will do; CorDA and LoRA-GA refuse a quantised one by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from lorakit.errors import UnsupportedError
from quantised import IN, KINDS, OUT

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
ROWS = [torch.randn(40, IN, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def base_of(kind):
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    return nn.Sequential(plain if kind is None else kind.quantised(plain)).eval()


def config(scheme, **fields):
    return LoraConfig(r=4, target_modules=["0"], init_lora_weights=scheme, **fields)


def start_of(model):
    arguments = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    return get_eva_state_dict(model, ROWS, forward_fn=lambda model, x: model(x), **arguments)


@every_kind
def test_eva_on_any_base(kind):
    fields = {"eva_config": EvaConfig(tau=1.0)}
    plain = start_of(get_peft_model(base_of(None), config("eva", **fields), low_cpu_mem_usage=True))
    model = get_peft_model(base_of(kind), config("eva", **fields), low_cpu_mem_usage=True)
    found = start_of(model)
    assert torch.equal(found["base_model.model.0"], plain["base_model.model.0"])
    before = model(ROWS[0])
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert torch.equal(model(ROWS[0]), before)
    A = model.base_model.registry.layers["0"].lora_A["default"].weight
    assert torch.equal(A, found["base_model.model.0"].to(A.dtype))


@every_kind
@pytest.mark.parametrize("scheme", ["corda", "lora_ga"])
def test_what_reads_the_weight_refuses(kind, scheme):
    model = base_of(kind)
    with pytest.raises(UnsupportedError, match=r"- 0: its weight is kept by .*full precision instead"):
        if scheme == "corda":
            preprocess_corda(model, config(scheme, corda_config=CordaConfig()), lambda: model(ROWS[0]))
        else:
            preprocess_loraga(model, config(scheme, lora_ga_config=LoraGAConfig()), lambda: None)
