"""`find_kappa_target_modules`: what it looks at, how it reads it, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoraConfig, find_kappa_target_modules
from lorakit.errors import ConfigError, NonFiniteError, UnsupportedError
from lorakit.kappa import condition_numbers
from lorakit.weights import find_codec
from models import Snapshot, another, tiny, tiny_llama, with_adapter
from quantised import KINDS, Pair, pieces

BASES = {"nf4", "nf4-double", "int8", "torchao-int4", "hqq-4"}
QUIET = {"show_progress": False}


def exact(weight):
    values = torch.linalg.svdvals(weight.detach().double())
    return float(values[0] / (values[-1] + 1e-8))


class Mixture(nn.Module):
    """A layer, a stack of experts, and parameters that are none."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(6, 4)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 4, 6))
        self.experts.other = nn.Parameter(torch.randn(3, 4, 6))
        self.flat = nn.Module()
        self.flat.up_proj = nn.Parameter(torch.randn(4, 6))


def test_condition_numbers_of_every_linear_layer():
    """Also of Conv1D, and of no embedding or norm; in the order of the model."""
    model = tiny(dtype=torch.bfloat16)
    found = condition_numbers(model, show_progress=False)
    kinds = ("q_proj", "v_proj", "c_fc", "down")
    assert list(found.modules) == [*(f"layers.{n}.{kind}" for n in (0, 1) for kind in kinds), "head"]
    assert not found.parameters
    for path, number in found.modules.items():
        assert number == pytest.approx(exact(model.get_submodule(path).weight), rel=1e-4)


def test_stacks_of_experts():
    model = Mixture()
    found = condition_numbers(model, show_progress=False)
    assert list(found.modules) == ["gate_proj"]
    assert list(found.parameters) == ["experts.up_proj", "experts.down_proj"]
    for name, number in found.parameters.items():
        each = [exact(matrix) for matrix in model.get_parameter(name)]
        assert number == pytest.approx(sum(each) / 3, rel=1e-4)
    other = find_kappa_target_modules(model, moe_param_suffixes=(".other",), **QUIET)
    assert other == {"target_modules": ["gate_proj"], "target_parameters": ["experts.other"]}


@pytest.mark.parametrize(("top_p", "count"), [(0.01, 1), (0.2, 1), (0.5, 4), (1.0, 9), (1, 9)])
def test_the_share(top_p, count):
    numbers = condition_numbers(tiny(), show_progress=False).modules
    found = find_kappa_target_modules(tiny(), top_p, **QUIET)
    assert found["target_modules"] == sorted(numbers, key=numbers.get)[:count]
    assert found["target_parameters"] is None


def test_what_it_finds_is_a_config():
    found = find_kappa_target_modules(tiny_llama(), 0.3, **QUIET)
    model = lorakit.get_peft_model(tiny_llama(), LoraConfig(r=2, **found))
    assert set(model.base_model.registry.layers) == set(found["target_modules"])


def test_adapters_are_looked_through():
    """Merged or not, wrapped or injected into: the numbers are those of the base."""
    wanted = condition_numbers(tiny(), show_progress=False)
    model = with_adapter(tiny())
    another(model, "other")
    before = Snapshot(model)
    assert condition_numbers(model, show_progress=False) == wanted
    assert condition_numbers(model.get_base_model(), show_progress=False) == wanted
    before.assert_same(model)
    model.merge_adapter()
    assert condition_numbers(model, show_progress=False) == wanted
    stacks = lorakit.get_peft_model(
        (fresh := Mixture()), LoraConfig(r=2, target_parameters=["experts.up_proj"], init_lora_weights=False)
    )
    unmerged = condition_numbers(fresh, show_progress=False)
    stacks.merge_adapter()
    assert condition_numbers(stacks, show_progress=False) == unmerged


def test_large_weights_are_passed_over():
    found = condition_numbers(tiny(), limit=8, show_progress=False)
    assert list(found.modules) == [f"layers.{n}.{kind}" for n in (0, 1) for kind in ("q_proj", "v_proj")]


def test_one_matrix_at_a_time(monkeypatch):
    """The fp32 copy of an expert is gone before the next one is made."""
    import weakref

    from lorakit import kappa

    alive = []

    def spy(matrix):
        assert not [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(matrix))
        return 1.0

    monkeypatch.setattr(kappa, "_condition", spy)
    condition_numbers(Mixture().to(torch.bfloat16), show_progress=False)
    assert len(alive) == 7


def test_a_progress_bar_if_wanted(capsys):
    find_kappa_target_modules(tiny())
    assert "condition numbers: 100%" in capsys.readouterr().err
    find_kappa_target_modules(tiny(), show_progress=False)
    assert not capsys.readouterr().err


class OddLinear(nn.Linear):
    """Its weight is no floating-point parameter."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


class Opaque(OddLinear):
    """It multiplies by it in a way of its own."""

    def forward(self, x):
        return x @ self.weight.to(x.dtype)


@pytest.mark.parametrize("kind", [OddLinear, Opaque])
def test_what_cannot_be_read_is_named(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    with pytest.warns(UserWarning, match=r"passed over, since their weights cannot be read: \['1'\]"):
        assert find_kappa_target_modules(model, **QUIET)["target_modules"] == ["0"]
    with pytest.raises(UnsupportedError, match=r"no linear layer.*not readable: \['0'\]"):
        find_kappa_target_modules(nn.Sequential(kind()), **QUIET)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in BASES], ids=str)
def test_quantised_weights_are_read(kind):
    model = Pair(kind)
    held = {path: pieces(model.get_submodule(path)) for path in ("up", "down")}
    found = condition_numbers(model, show_progress=False)
    assert list(found.modules) == ["up", "widen", "down"]
    for path in ("up", "down"):
        module = model.get_submodule(path)
        assert found.modules[path] == pytest.approx(
            exact(find_codec(module).read(module, torch.float32)), rel=1e-4
        )
        assert pieces(module) == held[path]
    adapted = lorakit.get_peft_model(model, LoraConfig(r=2, target_modules=["up", "widen"]))
    assert condition_numbers(adapted, show_progress=False) == found


REFUSED = [
    (tiny, {"top_p": 0}, ConfigError, "top_p: got 0"),
    (tiny, {"top_p": 1.5}, ConfigError, "top_p: got 1.5"),
    (tiny, {"top_p": True}, ConfigError, "top_p: got True"),
    (tiny, {"top_p": "all"}, ConfigError, "top_p: got 'all'"),
    (tiny, {"max_dim_size_to_analyze": 0}, ConfigError, "max_dim_size_to_analyze: got 0"),
    (tiny, {"moe_param_suffixes": ".up_proj"}, ConfigError, "moe_param_suffixes: got '.up_proj'"),
    (tiny, {"max_dim_size_to_analyze": 4}, UnsupportedError, "no linear layer and no stack of experts"),
    (lambda: nn.Embedding(4, 4), {}, UnsupportedError, "no linear layer"),
    (lambda: tiny().to("meta"), {}, UnsupportedError, "layers.0.q_proj: its weight is on the meta device"),
]


@pytest.mark.parametrize(
    ("make", "changes", "kind", "message"), REFUSED, ids=[str(row[1:2]) for row in REFUSED]
)
def test_refusals(make, changes, kind, message):
    with pytest.raises(kind, match=message):
        find_kappa_target_modules(make(), **{**QUIET, **changes})


def test_a_weight_that_is_not_finite_is_named():
    model = tiny()
    with torch.no_grad():
        model.layers[1].v_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.v_proj: .*NaN"):
        find_kappa_target_modules(model, **QUIET)
