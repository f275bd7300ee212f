"""BD-LoRA against dense matrices with zeros, and how the lists of modules are read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorakit import BdLoraConfig, LoraConfig, get_peft_model, plan
from lorakit.errors import PlanError, UnsupportedError
from lorakit.ops.blocks import block_diagonal, block_linear
from models import Snapshot, randomise, registry_of

R, IN, OUT = 6, 12, 18


class Pair(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(IN, OUT).to(dtype), nn.Linear(OUT, IN).to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def options(blocks=3, strict=True, a=("down",), b=("up",)):
    return BdLoraConfig(list(a), list(b), blocks, strict)


def config(**changes):
    return LoraConfig(
        **{"r": R, "lora_alpha": 5, "target_modules": ["up", "down"], "use_bdlora": options(), **changes}
    )


def adapted(dtype=torch.float64, **changes):
    model = get_peft_model(Pair(dtype), config(**changes)).eval()
    randomise(model)
    return model


def with_zeros(stored, blocks):
    """Element by element: output o and input i are connected if they are in blocks of the same number."""
    out, each = stored.shape
    rows = []
    for o in range(out):
        start = o * blocks // out * each
        zeros = torch.zeros(each * blocks, dtype=stored.dtype)
        rows.append(torch.cat([zeros[:start], stored[o], zeros[start + each :]]))
    return torch.stack(rows)


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(4, IN), (2, 3, IN), (IN,)])
def test_block_linear(blocks, shape):
    x, stored = torch.randn(shape, dtype=torch.float64), torch.randn(OUT, IN // blocks, dtype=torch.float64)
    dense = with_zeros(stored, blocks)
    assert torch.equal(block_diagonal(stored, blocks), dense)
    assert torch.allclose(block_linear(x, stored, blocks), x @ dense.T, atol=1e-13)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_forward_and_gradients(blocks, lead):
    model, base = adapted(use_bdlora=options(blocks)), Pair()
    x = torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
    layers = registry_of(model).layers
    values = {}
    for path, layer in layers.items():
        A, B, _ = layer.stored("default")
        assert A.shape == ((R, OUT // blocks) if path == "down" else (R, IN))
        assert B.shape == ((OUT, R // blocks) if path == "up" else (IN, R))
        A, B = (with_zeros(A, blocks), B) if path == "down" else (A, with_zeros(B, blocks))
        values[path] = getattr(base, path).weight.detach() + layer.scaling["default"] * B @ A
    h = torch.tanh(nn.functional.linear(x, values["up"], base.up.bias.detach()))
    wanted = nn.functional.linear(h, values["down"], base.down.bias.detach())
    found = model(x)
    assert torch.allclose(found, wanted, atol=1e-12)
    weights = torch.randn_like(wanted)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((wanted * weights).sum(), trained)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), trained), grads, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_a_bias_of_b_with_a_block_diagonal_a():
    model = adapted(use_bdlora=options(b=(), a=("down", "up")), lora_bias=True)
    without = adapted(use_bdlora=options(b=(), a=("down", "up")), lora_bias=True)
    layer = registry_of(without).layers["down"]
    bias = layer.lora_B["default"].bias
    x = torch.randn(4, IN, dtype=torch.float64)
    wanted = without(x) - layer.scaling["default"] * bias
    with torch.no_grad():
        bias.zero_()
    assert torch.allclose(without(x), wanted, atol=1e-12)
    assert not torch.allclose(model(x), wanted, atol=1e-3)


def test_the_expanded_matrix_is_never_made_in_a_forward(monkeypatch):
    def never(*_):
        raise AssertionError("expanded")

    model = adapted()
    monkeypatch.setattr(torch, "block_diag", never)
    model(torch.randn(4, IN, dtype=torch.float64)).sum().backward()
    with pytest.raises(AssertionError, match="expanded"):
        model.merge_adapter()


def test_where_a_list_names_nothing_it_is_plain_lora():
    model = adapted(use_bdlora=options(a=("down",), b=(), strict=False))
    assert registry_of(model).layers["up"].stored("default").B.shape == (OUT, R)
    assert registry_of(model).layers["down"].stored("default").A.shape == (R, OUT // 3)


def test_texts_are_found_anywhere_in_the_path():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Pair(), Pair()

        def forward(self, x):
            return self.second(self.first(x))

    made = plan(Outer(), config(target_modules=["up"], use_bdlora=options(a=("first.u",), b=("second",))))
    shapes = {spec.path: spec.shapes for spec in made.specs}
    assert shapes == {
        "first.up": {"A": (R, IN // 3), "B": (OUT, R)},
        "second.up": {"A": (R, IN), "B": (OUT, R // 3)},
    }
    assert made.parameters == R * IN // 3 + OUT * R + R * IN + OUT * R // 3


@pytest.mark.parametrize("scheme", [True, False, "gaussian"])
def test_how_it_begins(scheme):
    layers = registry_of(get_peft_model(Pair(), config(init_lora_weights=scheme))).layers
    A, B = layers["down"].stored("default").A, layers["up"].stored("default").B
    if scheme == "gaussian":
        assert 0.5 / R < A.std() < 2 / R
    else:
        bound = math.sqrt(6 / (OUT / 3))
        assert 0.8 * bound < A.abs().max() <= bound
    assert (B == 0).all() == (scheme is not False)
    assert (layers["down"].stored("default").B == 0).all() == (scheme is not False)


# ---- refusals -------------------------------------------------------------------------------------------

REFUSED = {
    "both lists": (options(a=("do",), b=("down", "up")), {}, "down: use_bdlora names it in target_modules_bd_a and"),
    "neither": (options(b=()), {}, "up: use_bdlora names it neither in"),
    "inputs": (options(blocks=5), {"r": 5}, "down: use_bdlora cuts A into 5 blocks, which do not divide its 18 inputs"),
    "outputs": (options(blocks=5), {"r": 5}, "up: use_bdlora cuts B into 5 blocks, which do not divide its 18 outputs"),
    "ranks": (options(), {"r": 4}, "down: use_bdlora cuts A into 3 blocks, which do not divide its 4 ranks"),
    "all at once": (options(blocks=5), {"r": 6}, "its 18 inputs and its 6 ranks"),
    "scheme": (options(blocks=2), {"init_lora_weights": "orthogonal"}, "chooses whole factors, of which BD-LoRA has"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_while_the_model_is_as_it_was(name):
    given, changes, said = REFUSED[name]
    base = Pair()
    before = Snapshot(base)
    with pytest.raises(PlanError) as caught:
        get_peft_model(base, config(use_bdlora=given, **changes))
    assert said in str(caught.value)
    before.assert_same(base)


def test_a_bias_of_a_block_diagonal_b_is_refused():
    with pytest.raises(UnsupportedError, match="lora_bias=True: a block-diagonal B"):
        get_peft_model(Pair(), config(lora_bias=True))


def test_two_kinds_of_adapter_at_once_are_refused():
    with pytest.raises(UnsupportedError, match=r"\['kasa_config', 'use_bdlora'\]"):
        get_peft_model(Pair(), config(kasa_config={}))
