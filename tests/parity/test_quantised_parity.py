"""PEFT as the judge over quantised bases: the same outputs, gradients, names and files.

Not its merges: it rounds after every adapter, merges garbage where bitsandbytes has packed a weight, and cannot undo.
"""

from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit.weights.bitsandbytes4 import Bitsandbytes4Codec
from lorakit.weights.bitsandbytes8 import Bitsandbytes8Codec
from parity.models import NAMED_WARNINGS, peft
from quantised import BY_NAME, KINDS, Pair

pytestmark = [
    *NAMED_WARNINGS,
    # PEFT, of its merges, which are not looked at here
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]

each = pytest.mark.parametrize("kind", KINDS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def settings(**changes):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down", "widen"], **changes}


def pair(kind, dtype=torch.float32, autocast_adapter_dtype=True):
    """Ours and PEFT's with equal adapters."""
    ours = lorakit.get_peft_model(
        Pair(kind, dtype), lorakit.LoraConfig(**settings()), autocast_adapter_dtype=autocast_adapter_dtype
    )
    base = Pair(kind, dtype)
    base.is_loaded_in_4bit = kind.codec is Bitsandbytes4Codec  # as transformers says it, and PEFT asks
    base.is_loaded_in_8bit = kind.codec is Bitsandbytes8Codec
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(**settings()), autocast_adapter_dtype=autocast_adapter_dtype
    )
    generator = torch.Generator().manual_seed(5)
    mine = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    others = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    assert mine.keys() == others.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            others[name].copy_(parameter)
    return ours, theirs, mine, others


def ids():
    return torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(3))


def assert_near(mine, other, near):
    assert mine.dtype == other.dtype
    assert (mine.float() - other.float()).norm() <= near * other.float().norm()


@each
@dtypes
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_same_outputs_and_gradients(kind, dtype, mode):
    ours, theirs, mine, others = pair(kind, dtype)
    for model in (ours, theirs):
        model.train(mode == "train")
        y = model(ids())
        y.float().square().mean().backward()
    assert_near(ours(ids()), theirs(ids()), NEAR[dtype])
    for name, parameter in mine.items():
        assert parameter.dtype == others[name].dtype == torch.float32
        assert_near(parameter.grad, others[name].grad, NEAR[dtype])


@each
@dtypes
def test_same_outputs_without_gradients(kind, dtype):
    """As in evaluation, where bitsandbytes packs 4-bit weights."""
    ours, theirs, _, _ = pair(kind, dtype)
    with torch.no_grad():
        for _ in range(2):
            assert_near(ours.eval()(ids()), theirs.eval()(ids()), NEAR[dtype])
        with ours.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(ours(ids()), theirs(ids()))


@pytest.mark.parametrize("kind", [BY_NAME[name] for name in ("nf4-double", "torchao-int8")], ids=str)
def test_same_outputs_and_gradients_under_autocast(kind):
    """PEFT's HQQ layer and 8-bit layer hand autocast's dtype to libraries that do not know it."""
    ours, theirs, mine, others = pair(kind)
    found = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = model.train()(ids())
        y.float().square().mean().backward()
        found.append(y)
    assert_near(*found, 2e-2)
    for name, parameter in mine.items():
        assert_near(parameter.grad, others[name].grad, 4e-2)


@each
def test_same_keys_and_tensors_in_files(kind, tmp_path):
    ours, theirs, _, _ = pair(kind)
    mine, wanted = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(mine[key], value), key
    with torch.no_grad():
        y = ours.eval()(ids())
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        here = lorakit.PeftModel.from_pretrained(Pair(kind), tmp_path / "theirs")
        there = peft.PeftModel.from_pretrained(Pair(kind), tmp_path / "ours")
        assert torch.equal(here(ids()), y)
        assert_near(there.eval()(ids()), y, NEAR[torch.float32])


@each
def test_same_names_in_the_state_dict(kind):
    ours, theirs, _, _ = pair(kind)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@each
def test_all_linear_finds_what_peft_finds_and_the_layers_of_hqq(kind):
    """PEFT passes over `HQQLinear`, which is no `nn.Linear`."""
    ours = lorakit.get_peft_model(Pair(kind), lorakit.LoraConfig(target_modules="all-linear"))
    theirs = peft.get_peft_model(Pair(kind), peft.LoraConfig(target_modules="all-linear"))
    found = {name for name, _ in ours.named_parameters() if "lora_A" in name}
    wanted = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    quantised = {f"base_model.model.{name}.lora_A.default.weight" for name in ("up", "down")}
    assert found - wanted == (quantised if kind.name.startswith("hqq") else set())
    assert wanted <= found


@pytest.mark.parametrize("kind", [BY_NAME[name] for name in ("nf4", "nf4-double", "int8")], ids=str)
@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")  # PEFT's
def test_where_peft_merges_right_it_merges_the_same(kind):
    """One adapter, on a base that has not been called. (HQQ's layers lose their bias when PEFT merges.)"""
    ours, theirs, _, _ = pair(kind)
    ours.merge_adapter(force=True)
    theirs.merge_adapter()
    with torch.no_grad():
        assert_near(ours.train()(ids()), theirs.train()(ids()), 5e-3)
