"""Layers that read the same input share their A's product; what they give is what they give alone."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit import LoraConfig, get_peft_model
from lorakit.layers import Linear, together
from lorakit.layers.together import READ_OTHERS, Group, group_of, is_alike
from lorakit.ops import shared

D = 12


class Attention(nn.Module):
    """(tokens, D) -> (tokens, D); `other` is read by k and v instead of x."""

    def __init__(self, *, bias=False, dtype=torch.float32):
        super().__init__()
        for name, out in {"q_proj": D, "k_proj": 6, "v_proj": D, "o_proj": D}.items():
            setattr(self, name, nn.Linear(D, out, bias=bias, dtype=dtype))

    def forward(self, x, other=None):
        y = x if other is None else other
        return self.o_proj(self.q_proj(x).sigmoid() * self.v_proj(y)) + self.k_proj(y).mean(-1, keepdim=True)


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make(*, bias=False, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": NAMES, "rank_pattern": {"k_proj": 2}, **fields})
    peft = get_peft_model(Attention(bias=bias, dtype=dtype), config)
    randomise(peft)
    return peft


def randomise(peft):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


def alone(peft):
    """A copy whose layers compute alone."""
    found = copy.deepcopy(peft)
    assert all(not layer.group.layers for layer in layers(found) if layer.group is not None)
    return found


def layers(peft):
    return [module for module in peft.modules() if isinstance(module, Linear)]


def data(dtype=torch.float32, *, leaf=False):
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    return x if leaf else (x, x * 1)


def step(peft, dtype=torch.float32, call=lambda peft, h: peft(h)):
    peft.zero_grad(set_to_none=True)
    x, h = data(dtype)
    y = call(peft, h)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in peft.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype
            assert (got - want).double().norm() <= tolerance * want.double().norm(), name


@pytest.fixture
def shares(monkeypatch):
    """How many A's each shared product had."""
    counts = []

    def counted(x, factors):
        counts.append(len(factors))
        return shared.shrink_together(x, factors)

    monkeypatch.setattr(together, "shrink_together", counted)
    yield counts
    assert together._RUNNING.begun is None or together._RUNNING.begun.waiting
    together._RUNNING.begun = None


CASES = {
    "plain": {},
    "rank-stabilised, a bias of B": {"use_rslora": True, "lora_bias": True},
    "scalings that differ": {"alpha_pattern": {"v_proj": 5}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:lora_bias=True, but:UserWarning")  # about merging
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.bfloat16, torch.bfloat16, 3e-2),
    ],
    ids=str,
)
def test_equals_layers_that_compute_alone(shares, fields, bias, dtype, adapter, tolerance):
    peft = make(bias=bias, dtype=dtype, **fields)
    for layer in layers(peft):
        for parameter in layer.parameters_of("default"):
            parameter.data = parameter.data.to(adapter)
    assert_same(step(peft, dtype), step(alone(peft), dtype), tolerance)
    # ten rows are too few to be widened on a CPU without arithmetic of that precision
    assert shares == [3]


def test_several_active_adapters_on_some_layers_each(shares):
    peft = make()
    peft.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    randomise(peft)
    peft.base_model.set_adapter(["default", "other"])
    assert_same(step(peft), step(alone(peft)))
    assert shares == [4]


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_frozen_factors_get_no_gradient(shares, part):
    peft = make()
    for name, parameter in peft.named_parameters():
        if f"{part}." in name and "k_proj" not in name:
            parameter.requires_grad_(False)
    assert_same(step(peft), step(alone(peft)))
    assert shares == [3]


def test_a_switch_in_between_is_seen(shares):
    peft = make()
    peft.add_adapter("other", LoraConfig(r=3, target_modules=NAMES))
    randomise(peft)

    def call(peft, h):
        q, k, v = (getattr(peft.base_model.model, name) for name in NAMES[:3])
        a = q(h)
        peft.set_adapter("other")
        b = k(h)
        with torch.no_grad():
            v.lora_A["other"].weight.mul_(3)
        c = v(h)
        peft.set_adapter("default")
        return torch.cat([a, b, c], dim=-1)

    other = alone(peft)
    assert_same(step(peft, call=call), step(other, call=call))
    assert shares[0] == 3


def test_an_input_that_was_written_into_is_read_anew(shares):
    peft = make()
    _, h = data()
    peft.base_model.model.q_proj(h)
    with torch.no_grad():
        h.mul_(2)
    found = peft.base_model.model.v_proj(h)
    torch.testing.assert_close(found, alone(peft).base_model.model.v_proj(h))
    assert shares[0] == 3
    together._RUNNING.begun = None


def test_who_reads_something_else_leaves(shares):
    peft = make()
    _, other = data()

    def call(peft, h):
        return peft(h, other=other)

    wanted = step(alone(peft), call=call)
    for _ in range(4):
        other = data()[1]
        assert_same(step(peft, call=call), wanted)
    group = peft.base_model.model.q_proj.group
    assert shares == [3, 2]  # v left, and then k, in the order in which they were called
    assert len(group.layers) == 1


@pytest.mark.parametrize("used", ["q_proj", "k_proj", "v_proj"])
def test_an_output_that_nobody_uses_gets_no_gradient(shares, used):
    def call(peft, h):
        found = {name: getattr(peft.base_model.model, name)(h) for name in NAMES[:3]}
        return found[used] + 0 * h.mean()

    peft = make()
    assert_same(step(peft, call=call), step(alone(peft), call=call))
    assert shares == [3]


def test_second_derivatives(shares):
    def twice(peft):
        x, h = data(torch.float64)
        parameters = [p for p in peft.parameters() if p.requires_grad]
        first = torch.autograd.grad(peft(h).pow(3).sum(), [x, *parameters], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])

    peft = make(dtype=torch.float64).double()
    for got, want in zip(twice(peft), twice(alone(peft)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert shares == [3]


def test_a_graph_that_is_kept_gives_the_same_twice(shares):
    peft = make()
    x, h = data()
    loss = peft(h).square().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    for name, grad in once.items():
        torch.testing.assert_close(peft.get_parameter(name).grad, 2 * grad)
    assert shares == [3]


def test_outputs_may_be_written_into(shares):
    def call(peft, h):
        q, k = (getattr(peft.base_model.model, name) for name in NAMES[:2])
        return torch.cat([q(h).relu_(), k(h).mul_(2)], dim=-1)

    peft = make()
    assert_same(step(peft, call=call), step(alone(peft), call=call))
    assert shares == [3]
    together._RUNNING.begun = None


def in_checkpoint(reentrant):
    return lambda peft, h: checkpoint(peft, h, use_reentrant=reentrant)


def in_autocast(peft, h):
    with torch.autocast("cpu", torch.bfloat16):
        return peft(h)


def with_hook(peft, h):
    handle = peft.base_model.model.k_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    try:
        return peft(h)
    finally:
        handle.remove()


SITUATIONS = {
    "checkpoint": (in_checkpoint(False), []),
    "reentrant checkpoint": (in_checkpoint(True), []),
    "autocast": (in_autocast, []),
    "a hook on one of them": (with_hook, [2]),
}


@pytest.mark.parametrize(("call", "products"), SITUATIONS.values(), ids=SITUATIONS)
def test_under_torchs_machinery(shares, call, products):
    peft = make()
    assert_same(step(peft, call=call), step(alone(peft), call=call))
    assert shares == products


def test_compiled_without_a_break_and_switched_without_compiling_again(shares):
    peft = make()
    peft.add_adapter("other", LoraConfig(r=4, target_modules=NAMES, rank_pattern={"k_proj": 2}))
    randomise(peft)
    torch.compiler.reset()
    compiled = torch.compile(peft.get_base_model(), backend="aot_eager", fullgraph=True)

    def call(_, h):
        return compiled(h.detach())

    for name in ("default", "other"):  # each adapter is compiled when it first acts
        peft.set_adapter(name)
        step(peft, call=call)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("default", "other", "default"):
            peft.set_adapter(name)
            assert_same(step(peft, call=call), step(peft, call=lambda peft, h: peft(h.detach())))
    assert shares == []


def test_dropout_is_each_layers_own(shares):
    peft = make(lora_dropout=0.3)
    step(peft.train())
    assert shares == []
    step(peft.eval())
    assert shares == [3]


def test_layers_whose_variants_add_other_sums_compute_alone(shares):
    fields = {
        "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": NAMES[:3]}
    }
    step(make(**fields))
    assert shares == []


def test_dora_with_another_adapter_or_dropout_computes_alone(shares):
    step(make(use_dora=True, lora_dropout=0.5))
    peft = make(use_dora=True)
    peft.add_adapter("other", LoraConfig(r=3, target_modules=NAMES))
    peft.base_model.set_adapter(["default", "other"])
    step(peft)
    assert shares == []


def test_dora_on_one_of_them_shares_with_plain_layers(shares):
    peft = make()
    peft.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    randomise(peft)
    peft.set_adapter("other")
    layer = peft.base_model.model.k_proj
    layer.set_adapter("default")
    assert_same(step(peft), step(alone(peft)))
    assert shares == [2]


def test_merged_and_disabled_layers_compute_alone(shares):
    peft = make()
    with peft.disable_adapter():
        step(peft)
    peft.merge_adapter()
    step(peft)
    assert shares == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(shares, context):
    peft = make()
    with context():
        peft(data()[1])
    assert shares == []


def test_a_leaf_is_not_shared_so_that_outputs_can_be_differentiated_apart(shares):
    peft, x = make(), data(leaf=True)
    outputs = [getattr(peft.base_model.model, name)(x) for name in NAMES[:3]]
    for output in outputs:
        output.sum().backward()
    assert shares == []


def test_a_failure_in_between_is_forgotten(shares):
    peft = make()
    wanted = step(alone(peft))
    model = peft.base_model.model
    with pytest.raises(RuntimeError):
        model.q_proj(data()[1]) + model.k_proj(torch.ones(3, D + 1, requires_grad=True) * 1)
    assert_same(step(peft), wanted)
    assert_same(step(peft), wanted)


def test_threads_do_not_see_each_others(shares):
    peft = make()
    wanted = step(alone(peft))["y"]
    found, barrier = [], threading.Barrier(2)

    def run():
        model = peft.base_model.model
        _, h = data()
        barrier.wait()
        q = model.q_proj(h)
        barrier.wait()
        v = model.v_proj(h)
        barrier.wait()
        found.append(model.o_proj(q.sigmoid() * v) + model.k_proj(h).mean(-1, keepdim=True))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for y in found:
        torch.testing.assert_close(y, wanted)
    assert shares == [3, 3]


def test_a_copy_and_a_pickle_have_groups_of_nobody(shares):
    peft = make()
    for found in (copy.deepcopy(peft), pickle.loads(pickle.dumps(peft))):
        step(found)
    assert shares == []
    assert copy.deepcopy(peft.base_model.model.q_proj).group.layers == ()


@pytest.mark.parametrize("name", [*sorted(READ_OTHERS), "0", "17"])
def test_names_that_read_others(name):
    assert not is_alike(name)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("wi_0", "wi_1"),
        ("w1", "w3"),
        ("to_q", "to_k", "to_v"),
        ("q_lin", "k_lin", "v_lin"),
    ],
    ids=" ".join,
)
def test_names_of_known_families_are_alike(names):
    made = {name: nn.Linear(2, 2) for name in names}
    assert len(group_of(made).layers) == len(names)


def test_no_group_of_one_nor_of_many():
    made = {f"part{n}": nn.Linear(2, 2) for n in range(9)}
    assert group_of(made) is None
    assert group_of({"q_proj": made["part0"], "o_proj": made["part1"]}) is None
    assert isinstance(group_of({"q_proj": made["part0"], "k_proj": made["part1"]}), Group)
