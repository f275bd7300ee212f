"""Models that compute with the weight of a layer, and do not always call it: an adapter acts there as it does merged."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lorakit import LoraConfig, get_peft_model
from lorakit.errors import PlanError
from models import randomise


def mamba():
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3
    )
    return transformers.MambaForCausalLM(config)


def falcon_mamba():
    config = transformers.FalconMambaConfig(
        vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3
    )
    return transformers.FalconMambaForCausalLM(config)


def mamba2():
    config = transformers.Mamba2Config(
        vocab_size=40, hidden_size=8, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=4, n_groups=1
    )
    return transformers.Mamba2ForCausalLM(config)


def mobilebert():
    config = transformers.MobileBertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=1,
        tie_word_embeddings=False,
    )
    return transformers.MobileBertForMaskedLM(config)


CASES = [
    (mamba, "x_proj"),
    (mamba, "dt_proj"),
    (mamba, "out_proj"),
    (falcon_mamba, "dt_proj"),
    (mamba2, "out_proj"),
    (mobilebert, "cls.predictions.decoder"),
    (mobilebert, "cls.predictions.dense"),
]


@pytest.mark.parametrize(("make", "target"), CASES)
def test_adapters_act_train_and_merge(make, target):
    torch.manual_seed(0)
    base = make().eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    peft = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=[target]))
    randomise(peft, "default", scale=1.0)
    batch = torch.randint(40, (2, 6))
    with peft.disable_adapter():
        plain = peft(batch).logits
    out = peft(batch).logits
    assert (out - plain).abs().max() > 1e-3 * plain.abs().max()
    out.square().sum().backward()
    assert all(parameter.grad.any() for parameter in peft.parameters() if parameter.requires_grad)
    torch.testing.assert_close(peft.merge_and_unload()(batch).logits, out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_a_convolution_that_is_read_is_refused(make):
    with pytest.raises(PlanError, match=r"conv1d: Mamba2?Mixer reads this layer's weight without calling it"):
        get_peft_model(make(), LoraConfig(target_modules=["conv1d", "in_proj"]))


def test_trained_biases_are_those_named_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], bias="all"))
    trained = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert any(name.endswith("out_proj.bias") for name in trained)
    assert not any("in_proj_bias" in name for name in trained)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


def test_dropout_where_a_layer_runs_its_own_forward_is_refused():
    model = nn.Sequential(Shifted(8, 4))
    with pytest.raises(PlanError, match="lora_dropout cannot act here"):
        get_peft_model(model, LoraConfig(target_modules=["0"], lora_dropout=0.1))
    get_peft_model(model, LoraConfig(target_modules=["0"]))
