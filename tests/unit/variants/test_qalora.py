"""QA-LoRA against a naive reference, in every form of base that it can be on, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, get_peft_model, plan
from lorakit.errors import PlanError
from models import Snapshot, randomise, registry_of, tiny

R, IN, OUT = 3, 12, 7


class Only(nn.Module):
    def __init__(self, kind="linear", dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.only = (nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)).to(dtype)

    def forward(self, x):
        return self.only(x)


def config(size=4, **changes):
    fields = {
        "r": R,
        "lora_alpha": 5,
        "target_modules": ["only"],
        "use_qalora": True,
        "qalora_group_size": size,
    }
    return LoraConfig(**{**fields, **changes})


def adapted(kind="linear", **changes):
    model = get_peft_model(Only(kind), config(**changes)).eval()
    randomise(model)
    return model


def naive(model, base, x, size):
    """One sum for each group of each row."""
    layer = registry_of(model).layers["only"]
    A, B, bias = layer.stored("default")
    groups = IN // size
    rows = x.reshape(-1, IN)
    means = torch.stack(
        [
            torch.stack([row[g * size : (g + 1) * size].sum() / size * groups for g in range(groups)])
            for row in rows
        ]
    )
    added = means @ A.T @ B.T + (0 if bias is None else bias)
    return base(x).detach() + (layer.scaling["default"] * added).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_and_gradients(kind, size, biased):
    model, base = adapted(kind, size=size, lora_bias=biased), Only(kind)
    assert registry_of(model).layers["only"].stored("default").A.shape == (R, IN // size)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    frozen = base(x)  # its gradient is no matter of the adapter
    wanted = naive(model, base, x, size) - frozen.detach() + frozen
    assert torch.allclose(model(x), wanted, atol=1e-12)
    weights = torch.randn_like(wanted)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((wanted * weights).sum(), trained)
    for one, other in zip(torch.autograd.grad((model(x) * weights).sum(), trained), grads, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_groups_of_one_are_plain_lora_times_the_inputs():
    model = adapted(size=1)
    plain = get_peft_model(Only(), LoraConfig(r=R, lora_alpha=5 * IN, target_modules=["only"])).eval()
    randomise(plain)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert torch.allclose(model(x), plain(x), atol=1e-11)


def test_it_merges_exactly():
    model = adapted()
    x = torch.randn(4, IN, dtype=torch.float64)
    wanted = model(x)
    delta = registry_of(model).layers["only"].get_delta_weight("default")
    assert torch.allclose(delta.view(OUT, 3, 4), delta.view(OUT, 3, 4)[..., :1].expand(OUT, 3, 4))
    assert torch.allclose(model.merge_and_unload()(x), wanted, atol=1e-12)


@pytest.mark.parametrize("scheme", [True, False, "gaussian"])
def test_how_it_begins(scheme):
    A, B, _ = (
        registry_of(get_peft_model(Only(), config(init_lora_weights=scheme))).layers["only"].stored("default")
    )
    if scheme == "gaussian":
        assert 0.3 / R < A.std() < 3 / R
    else:
        assert 0.6 / math.sqrt(3) < A.abs().max() <= 1 / math.sqrt(3)
    assert (B == 0).all() == (scheme is not False)


REFUSED = {
    "groups": ({"qalora_group_size": 5}, "only: qalora_group_size=5 does not divide its 12 inputs"),
    "default size": ({"qalora_group_size": 16}, "qalora_group_size=16 does not divide its 12 inputs"),
    "scheme": (
        {"r": 2, "init_lora_weights": "orthogonal"},
        "only: init_lora_weights='orthogonal' chooses whole factors",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_while_the_model_is_as_it_was(name):
    changes, said = REFUSED[name]
    base = Only()
    before = Snapshot(base)
    with pytest.raises(PlanError) as caught:
        get_peft_model(base, config(**changes))
    assert said in str(caught.value)
    before.assert_same(base)


def test_other_kinds_of_layers_are_refused():
    with pytest.raises(PlanError, match="embed: QA-LoRA is not defined on a embedding"):
        plan(tiny(), config(target_modules=["embed"]))
