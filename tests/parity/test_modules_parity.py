"""PEFT as the judge: the same parameters under the same names, the same numbers out of them."""

from __future__ import annotations

import math

import pytest
import torch

import lorakit
from parity.models import (
    CASES,
    NAMED_WARNINGS,
    Case,
    adapter_parameters,
    build,
    loss_of,
    output_of,
    pair,
    peft,
)

pytestmark = NAMED_WARNINGS

EACH = pytest.mark.parametrize("case", CASES, ids=str)


def shapes(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@EACH
def test_same_names_shapes_counts_and_printout(case, capsys):
    ours, theirs = pair(*case)
    assert shapes(adapter_parameters(ours)) == shapes(adapter_parameters(theirs))
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert type(ours).__name__ == type(theirs).__name__
    theirs.print_trainable_parameters()
    wanted = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == wanted


@EACH
def test_same_adapter_state_dict(case):
    ours, theirs = pair(*case)
    mine, wanted = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert shapes(mine) == shapes(wanted)
    for key, value in wanted.items():
        assert torch.equal(mine[key], value), key
    theirs.load_state_dict(ours.state_dict())  # strict: the whole state of either is that of the other


@EACH
def test_same_logits_and_gradients(case):
    ours, theirs = pair(*case)
    close(output_of(ours, case.kind), output_of(theirs, case.kind))
    if not case.fields.get("lora_dropout"):
        ours.train()
        theirs.train()
    loss_of(ours, case.kind).backward()
    loss_of(theirs, case.kind).backward()
    wanted = adapter_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None:
            close(parameter.grad, wanted[name].grad, 1e-5)


@EACH
@torch.no_grad()  # with gradients, attention picks its kernel by who wants them
def test_disable_alike(case):
    ours, theirs = pair(*case)
    plain = output_of(build(case.kind), case.kind)
    with ours.disable_adapter(), theirs.disable_adapter():
        if case.fields.get("bias", "none") == "none":  # PEFT leaves trained biases in place, and says so
            assert torch.equal(output_of(theirs, case.kind), plain)
        assert torch.equal(output_of(ours, case.kind), plain)
    close(output_of(ours, case.kind), output_of(theirs, case.kind))


@EACH
def test_merged_alike(case):
    ours, theirs = pair(*case)
    before = output_of(ours, case.kind)
    mine, wanted = ours.merge_and_unload(), theirs.merge_and_unload()
    assert shapes(mine.state_dict()) == shapes(wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        close(mine.state_dict()[name], tensor)
    close(output_of(mine, case.kind), before, 1e-5)


@EACH
def test_merge_and_unmerge_in_place_alike(case):
    ours, theirs = pair(*case)
    start = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter(["default"])
    theirs.merge_adapter(["default"])
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter, wanted[name])
    close(output_of(ours, case.kind), output_of(theirs, case.kind), 1e-5)
    for name, tensor in start.items():  # unlike PEFT's: a state dict always describes the unmerged model
        assert torch.equal(ours.state_dict()[name], tensor), name
    ours.unmerge_adapter()
    for name, tensor in start.items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@EACH
def test_unload_alike(case):
    ours, theirs = pair(*case)
    mine, wanted = ours.unload(), theirs.unload()
    assert shapes(mine.state_dict()) == shapes(wanted.state_dict())
    close(output_of(mine, case.kind), output_of(build(case.kind), case.kind))


TRAINED = [
    Case("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    Case("gpt2", {"fan_in_fan_out": True, "bias": "all"}),
    Case("bert", {"task_type": "SEQ_CLS", "bias": "lora_only"}),
    Case("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    Case("plain", {"target_modules": ["first", "middle"], "modules_to_save": ["head", "norm"]}),
]


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training_gives_the_same_losses(case):
    models = pair(*case)
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = loss_of(model, case.kind)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("scheme", [True, False, "gaussian", "orthogonal"])
def test_same_shapes_and_zeros_at_the_start(scheme):
    fields = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": scheme}
    torch.manual_seed(0)
    ours = lorakit.get_peft_model(build("llama"), lorakit.LoraConfig(**fields))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(**fields))
    wanted = adapter_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        assert parameter.shape == wanted[name].shape
        assert bool(parameter.any()) == bool(wanted[name].any()), name
        assert parameter.std().item() == pytest.approx(wanted[name].std().item(), rel=0.35), name
    same_start = output_of(build("llama"), "llama")
    assert torch.allclose(output_of(ours.eval(), "llama"), same_start, atol=1e-6) == (scheme is not False)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision_is_no_worse(kind, autocast, dtype):
    fields = {
        "target_modules": {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}[
            kind
        ]
    }
    fields |= {"fan_in_fan_out": kind == "gpt2"} | ({"task_type": "SEQ_CLS"} if kind == "bert" else {})
    ours, theirs = pair(kind, fields, dtype=dtype, autocast_adapter_dtype=autocast)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    close_at = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    mine, wanted = output_of(ours, kind), output_of(theirs, kind)
    assert mine.dtype == wanted.dtype
    truth = output_of(theirs.float(), kind)
    error, allowed = ((x.float() - truth).square().mean().sqrt().item() for x in (mine, wanted))
    assert error <= max(1.5 * allowed, close_at * truth.abs().max().item())
    assert math.isfinite(error)
