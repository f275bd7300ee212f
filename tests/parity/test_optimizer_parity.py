"""PEFT's optimizers as the judge: the same groups, and the same parameters after the same steps."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa

import lorakit
from parity.models import CASES, NAMED_WARNINGS, Case, adapter_parameters, loss_of, pair

QV = ["q_proj", "v_proj"]
pytestmark = NAMED_WARNINGS
SETTINGS = {
    "lr": 1e-3,
    "loraplus_lr_ratio": 16.0,
    "loraplus_weight_decay": 0.01,
    "loraplus_lr_embedding": 1e-5,
}


def groups(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (sorted(names[id(p)] for p in group["params"]), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


LORAPLUS = [
    *CASES,
    Case("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    Case("bert", {"target_modules": ["query", "word_embeddings"], "bias": "all"}),
]
# transformers' RMSNorm is no LayerNorm to PEFT, so its weight decays there
UNLIKE = {"llama-target_modules=['q_proj', 'v_proj'],modules_to_save=['lm_head', 'model.norm']", "t5-target_modules=['q', 'v', 'wi'],modules_to_save=['final_layer_norm']"}  # fmt: skip


@pytest.mark.parametrize("case", LORAPLUS, ids=str)
def test_loraplus_makes_the_same_groups(case):
    both = pair(case.kind, case.fields)
    theirs = groups(both.theirs, create_loraplus_optimizer(both.theirs, torch.optim.AdamW, **SETTINGS))
    ours = groups(both.ours, lorakit.create_loraplus_optimizer(both.ours, torch.optim.AdamW, **SETTINGS))
    if str(case) in UNLIKE:
        assert ours[:2] == theirs[:2]
        assert sorted(ours[2][0] + ours[3][0]) == sorted(theirs[2][0] + theirs[3][0])
        assert (
            [name for name in theirs[2][0] if name not in ours[2][0]]
            == [name for name in ours[3][0] if name not in theirs[3][0]]
            != []
        )
    else:
        assert ours == theirs


def steps(model, kind, optimizer, count=5):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model, kind)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_loraplus_takes_the_same_steps(optimizer_cls):
    both = pair("llama", {"target_modules": [*QV, "embed_tokens"], "bias": "lora_only"})
    theirs = create_loraplus_optimizer(both.theirs, optimizer_cls, **SETTINGS)
    ours = lorakit.create_loraplus_optimizer(both.ours, optimizer_cls, **SETTINGS)
    assert steps(both.ours, "llama", ours) == pytest.approx(steps(both.theirs, "llama", theirs), rel=1e-5)
    assert_same(both.ours, both.theirs, 2e-5)


LORAFA = [
    Case("llama", {"target_modules": QV, "r": 4, "lora_alpha": 8}),
    Case("llama", {"target_modules": "all-linear", "r": 8, "lora_alpha": 8, "use_rslora": True}),
    Case("llama", {"target_modules": QV, "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}),
    Case("llama_bias", {"target_modules": QV, "r": 4, "lora_alpha": 8, "bias": "all"}),
    Case("bert", {"target_modules": ["query"], "r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}),
    Case("gpt2", {"target_modules": ["c_attn"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("case", LORAFA, ids=str)
def test_lorafa_takes_the_same_steps(case, weight_decay, monkeypatch):
    """PEFT projects in bf16 where the machine knows bf16; here in fp32, to compare with."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    both = pair(case.kind, case.fields)
    numbers = (case.fields["r"], case.fields["lora_alpha"], 1e-2, weight_decay)
    theirs = create_lorafa_optimizer(both.theirs, *numbers)
    ours = lorakit.create_lorafa_optimizer(both.ours, *numbers)
    assert adapter_parameters(both.ours).keys() == adapter_parameters(both.theirs).keys()
    found, wanted = (
        steps(*each) for each in ((both.ours, case.kind, ours), (both.theirs, case.kind, theirs))
    )
    assert found == pytest.approx(wanted, rel=1e-4)
    assert min(found) < found[0]
    assert_same(both.ours, both.theirs, 5e-4)


def assert_same(ours, theirs, tolerance):
    """Relative to how far the parameters are from zero; A included, trained or not."""
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora" in name or parameter.requires_grad:
            error = torch.linalg.vector_norm(parameter - theirs[name]).item()
            assert error <= tolerance * torch.linalg.vector_norm(theirs[name]).item(), name


def test_lorafa_in_bf16_is_nearer_to_the_exact_projection():
    """As PEFT runs it by default, its projection has three digits; ours those of fp32."""
    fields = {"target_modules": QV, "r": 4, "lora_alpha": 8}
    both = pair("llama", fields)
    theirs = create_lorafa_optimizer(both.theirs, 4, 8, 1e-2)
    ours = lorakit.create_lorafa_optimizer(both.ours, 4, 8, 1e-2)
    exact = pair("llama", fields, dtype=torch.float64)
    exact.ours.load_state_dict(both.ours.state_dict())
    judge = lorakit.create_lorafa_optimizer(exact.ours, 4, 8, 1e-2)
    for model, optimizer in ((both.ours, ours), (both.theirs, theirs), (exact.ours, judge)):
        steps(model, "llama", optimizer, count=1)
    wanted = {p: state["exp_avg"] for p, state in judge.state.items()}
    errors = []
    for optimizer, key in ((ours, "exp_avg"), (theirs, "exp_avg_B")):
        moments = [state[key] for state in optimizer.state.values() if key in state]
        assert len(moments) == len(wanted) == 4
        errors.append(
            max(
                float(torch.linalg.norm(found - right) / torch.linalg.norm(right))
                for found, right in zip(moments, wanted.values(), strict=True)
            )
        )
    assert errors[0] < 2e-5
    assert errors[1] > 100 * errors[0]
