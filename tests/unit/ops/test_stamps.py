"""A stamp notices whatever torch lets be noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.ops.stamps import Stamp


def test_it_holds_until_something_is_written():
    one, other = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(64, 16))
    stamp = Stamp.of([one, other])
    assert stamp.holds()
    with torch.no_grad():
        other[0, 0] = 1.0
    assert not stamp.holds()
    stamp = Stamp.of([one, other])
    one.data = one.detach().clone()
    assert not stamp.holds()


def test_memory_that_was_let_go_does_not_come_back_as_the_same():
    parameter = nn.Parameter(torch.randn(512, 512))
    stamp, address = Stamp.of([parameter]), parameter.data_ptr()
    parameter.data = torch.randn(512, 512)
    others = [torch.randn(512, 512) for _ in range(50)]  # 1 MiB each: one of them takes what is free
    parameter.data = next((other for other in others if other.data_ptr() == address), others[0])
    assert not stamp.holds()


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        tensor = torch.randn(3)
    assert Stamp.of([tensor]).holds()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_step_is_noticed_on_what_it_wrote(kind, compiled):
    """Torch counts no version there."""
    trained, still = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = kind([trained, still], lr=0.1, fused=True)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for _ in range(3):
        trained.grad = torch.ones_like(trained)
        stamps = Stamp.of([trained]), Stamp.of([still])
        step()
        assert [stamp.holds() for stamp in stamps] == [False, True]
    torch._dynamo.reset()
