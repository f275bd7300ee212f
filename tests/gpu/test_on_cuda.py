"""What only a CUDA device can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

from lorakit import PeftModel, get_peft_model
from models import bits, config, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def adapted(model, **changes):
    torch.manual_seed(1)
    return get_peft_model(model, config(target_modules="all-linear", init_lora_weights=False, **changes))


def loss_and_gradients(peft, ids):
    loss = peft(ids).float().square().mean()
    loss.backward()
    return loss.item(), {
        name: p.grad.float().cpu() for name, p in peft.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_cpus(dtype):
    on_cpu = adapted(tiny(0, torch.float32))
    on_cuda = copy.deepcopy(on_cpu).to("cuda", dtype)
    ids = torch.arange(12).reshape(2, 6)
    expected, gradients = loss_and_gradients(on_cpu, ids)
    found, others = loss_and_gradients(on_cuda, ids.cuda())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert found == pytest.approx(expected, rel=tolerance)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6


def test_dropout_is_replayed_in_backward():
    peft = adapted(tiny(0), lora_dropout=0.5).cuda().train()
    ids = torch.arange(12, device="cuda").reshape(2, 6)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(loss_and_gradients(peft, ids))
        peft.zero_grad()
    assert runs[0][0] == runs[1][0]
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name])


def test_merge_and_unmerge_restore_the_bits():
    peft = adapted(tiny(0, torch.bfloat16)).cuda()
    before = {name: bits(p) for name, p in peft.named_parameters()}
    peft.merge_adapter()
    peft.unmerge_adapter()
    assert {name: bits(p) for name, p in peft.named_parameters()} == before


def test_an_adapter_loads_onto_the_device_of_its_base(tmp_path):
    adapted(tiny(0)).save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(tiny(0).cuda(), tmp_path)
    assert {p.device.type for p in peft.parameters()} == {"cuda"}
