"""`lora_grouped` against `lora_grouped_reference` and against each adapter alone: values, gradients, every path."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lorakit.errors import AdapterNameError, UnsupportedError
from lorakit.ops import Bank, Groups, Term, grouped, lora_add, lora_grouped, lora_grouped_reference, terms
from lorakit.ops.grouped_costs import Plan, block_size, choose
from lorakit.ops.grouped_paths import PATHS, Job, add_biases_, by_sample

IN, OUT = 24, 40
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 2e-2, F16: 3e-3}

# name: (ids, ranks, whether adapters have biases, which adapters are not on the layer)
MIXES = {
    "one adapter": ([0, 0, 0, 0], [4], False, ()),
    "one adapter or none": ([0, -1, 0, 0, -1], [4], True, ()),
    "in turn": ([0, 1, 2, 0, 1, 2], [4, 4, 4], True, ()),
    "neighbours": ([2, 2, 0, 0, 1, 1], [4, 4, 4], False, ()),
    "neighbours and none": ([0, 0, -1, 1, 1, -1], [4, 4], False, ()),
    "ranks that differ": ([0, 1, 2, 2, 1, 2, -1], [2, 8, 3], True, ()),
    "uneven": ([1, 1, 1, 0, 1, 1, 1, 1, 1], [4, 4], False, ()),
    "each its own": ([3, 1, 0, 2], [4, 1, 4, 2], True, ()),
    "some unused": ([1, 4, 1, 4, -1], [4, 4, 4, 4, 4], True, ()),
    "one not on this layer": ([0, 1, 0, 1, -1], [4, 4], True, (1,)),
    "one sample": ([1], [4, 2], False, ()),
}
MIX = pytest.mark.parametrize("mix", MIXES)
WAYS = [("masked", 0), ("blocked", 1), ("blocked", 2), ("blocked", 3), ("blocked", 9), ("segments", 0)]


def randn(*shape, dtype=F32, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_(grad)


def make(mix, *, dtype=F32, grad=True, p=0.0):
    """The terms and the groups of one row of MIXES; biases on every second adapter, scalings and dropouts that differ."""
    ids, ranks, biased, absent = MIXES[mix] if isinstance(mix, str) else mix
    found = [
        None
        if k in absent
        else Term(
            randn(r, IN, dtype=dtype, grad=grad, seed=10 * k),
            randn(OUT, r, dtype=dtype, grad=grad, seed=10 * k + 1),
            randn(OUT, dtype=dtype, grad=grad, seed=10 * k + 2) if biased and k % 2 == 0 else None,
            0.5 + k,
            p,
        )
        for k, r in enumerate(ranks)
    ]
    return found, Groups.make(ids, len(ranks), "cpu")


def to_double(found):
    return [
        None if t is None else Term(*(None if q is None else q.detach().double() for q in t[:3]), *t[3:])
        for t in found
    ]


WEIGHT = {dtype: randn(OUT, IN, dtype=dtype, seed=99) for dtype in TOLERANCE}


def base_of(x, dtype=None):
    y = linear(x, WEIGHT[x.dtype].to(x.device))
    return y if dtype is None else y.to(dtype)


def relative_error(got, want):
    scale = want.double().norm().item() or 1.0
    return (got.double() - want.double()).norm().item() / scale


def leaves(x, found, groups):
    used = [found[i] for i in groups.used if found[i] is not None]
    return [t for t in (x, *(t for term in used for t in term[:3])) if t is not None and t.requires_grad]


def run(op, x, found, groups):
    """The output, and the gradients of x and of every adapter in use."""
    y = op(x)
    dy = (torch.arange(y.numel()) % 7 - 2).view(y.shape).to(y.dtype)  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, leaves(x, found, groups), dy, allow_unused=True)]


def via_op(found, groups):
    return lambda x: lora_grouped(base_of(x), x, Bank.stack(found), groups)


def via_reference(found, groups):
    return lambda x: lora_grouped_reference(base_of(x), x, found, groups)


def assert_close(got, want, tolerance):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert relative_error(a, b) <= tolerance


# ---- values -----------------------------------------------------------------------------------------


@MIX
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_path_equals_the_float64_reference(mix, way, dtype, tokens):
    found, groups = make(mix, dtype=dtype, grad=False)
    x = randn(len(groups.samples), tokens, IN, dtype=dtype)
    y = base_of(x)
    want = lora_grouped_reference(y.double(), x.double(), to_double(found), groups)
    path, size = way
    bank = Bank.stack(found)
    PATHS[path](Job(y, x, bank, groups), size)
    add_biases_(y, bank, groups)
    assert relative_error(y, want) <= TOLERANCE[dtype]


@MIX
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_path_adds_into_an_output_of_another_dtype(mix, way):
    found, groups = make(mix, dtype=F32, grad=False)
    x = randn(len(groups.samples), 3, IN, dtype=BF16)
    y = base_of(x, F32)
    want = lora_grouped_reference(y.double(), x.double(), to_double(found), groups)
    path, size = way
    bank = Bank.stack(found)
    PATHS[path](Job(y, by_sample(x, F32), bank, groups), size)
    add_biases_(y, bank, groups)
    assert relative_error(y, want) <= TOLERANCE[F32]


@MIX
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_equals_the_reference(mix, shape, grad):
    found, groups = make(mix)
    x = randn(len(groups.samples), *shape, IN, grad=True)
    with torch.set_grad_enabled(grad):
        if grad:
            got, want = (run(via(found, groups), x, found, groups) for via in (via_op, via_reference))
        else:
            got, want = [via_op(found, groups)(x)], [via_reference(found, groups)(x)]
            assert got[0].grad_fn is None
    assert_close(got, want, TOLERANCE[F32])


@pytest.mark.parametrize("mix", ["ranks that differ", "some unused"])
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
@pytest.mark.parametrize("adapter", [F32, BF16, F64])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("emulated", [True, False])
def test_mixed_dtypes_equal_the_float64_answer(mix, dtype, adapter, tokens, emulated, monkeypatch):
    if emulated:  # as on a CPU without instructions for half precision
        monkeypatch.setattr(terms, "emulated_dtypes", lambda: frozenset({BF16, F16}))
    found, groups = make(mix, dtype=adapter)
    x = randn(len(groups.samples), tokens, IN, dtype=dtype, grad=True)
    got = run(via_op(found, groups), x, found, groups)
    for tensor, leaf in zip(got[1:], leaves(x, found, groups), strict=True):
        assert tensor.dtype == leaf.dtype
    assert got[0].dtype == dtype
    wide = [
        None if t is None else Term(*(None if q is None else q.requires_grad_() for q in t[:3]), *t[3:])
        for t in to_double(found)
    ]
    x64 = x.detach().double().requires_grad_()
    y64 = lora_grouped_reference(base_of(x.detach()).double() + 0 * x64.sum(), x64, wide, groups)
    dy = (torch.arange(y64.numel()) % 7 - 2.0).view(y64.shape).double()
    want = [y64.detach(), *torch.autograd.grad(y64, leaves(x64, wide, groups), dy)]
    want[1] = want[1] + dy @ WEIGHT[dtype].double()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[adapter])
    assert_close([t.double() for t in got], want, tolerance)
    with torch.no_grad():
        assert relative_error(via_op(found, groups)(x), want[0]) <= tolerance


@MIX
def test_non_contiguous_input(mix):
    found, groups = make(mix)
    x = randn(IN, 3, len(groups.samples)).permute(2, 1, 0)
    want = via_reference(found, groups)(x)
    with torch.no_grad():
        assert_close([via_op(found, groups)(x)], [want.detach()], TOLERANCE[F32])
    leaf = x.detach().requires_grad_()
    assert not leaf.is_contiguous()
    assert_close(
        run(via_op(found, groups), leaf, found, groups),
        run(via_reference(found, groups), leaf, found, groups),
        TOLERANCE[F32],
    )


def test_an_empty_batch_and_a_batch_of_the_base_alone_are_the_base():
    found, _ = make("in turn")
    for ids in ([], [-1, -1]):
        x = randn(len(ids), 3, IN)
        y = base_of(x)
        assert lora_grouped(y, x, Bank.stack(found), Groups.make(ids, 3, "cpu")) is y


@pytest.mark.parametrize(("grad", "p"), [(True, 0.0), (False, 0.0), (False, 1e-9)])
def test_one_adapter_for_all_is_lora_add_in_training(grad, p, monkeypatch):
    found, groups = make("one adapter", p=p)
    x = randn(4, 3, IN)
    calls = []
    monkeypatch.setattr(grouped, "lora_add", lambda *args: calls.append(args) or lora_add(*args))
    with torch.set_grad_enabled(grad):
        assert_close([via_op(found, groups)(x)], [via_reference(found, groups)(x)], TOLERANCE[F32])
    assert len(calls) == int(grad or p > 0)


@MIX
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(mix, grad, inside):
    found, groups = make(mix)
    x = randn(len(groups.samples), 5, IN, grad=True)

    def cast(via):
        def f(x):
            with torch.autocast("cpu", torch.bfloat16):
                return via(found, groups)(x)

        return f

    with torch.set_grad_enabled(grad):
        if grad:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                got, want = (run(cast(via), x, found, groups) for via in (via_op, via_reference))
        else:
            got, want = [cast(via_op)(x)], [cast(via_reference)(x)]
    assert got[0].dtype == BF16
    assert_close(got, want, 2 * TOLERANCE[BF16])


@pytest.mark.parametrize("way", [*WAYS, "node", "composed"], ids=str)
@pytest.mark.parametrize("scalings", [(0.3, 0.7), (0.3, 0.3), (1.0, 1.0), (0.0, 0.7)], ids=str)
def test_a_scaling_is_not_rounded_to_half_precision(way, scalings):
    found, groups = make(([0, 1, -1] * 20, [4, 4], False, ()), dtype=BF16, grad=way == "node")
    found = [term._replace(scaling=s) for term, s in zip(found, scalings, strict=True)]
    x, y = randn(60, 2, IN, dtype=BF16), torch.zeros(60, 2, OUT, dtype=BF16)
    want = lora_grouped_reference(y.double(), x.double(), to_double(found), groups)
    bank = Bank.stack(found)
    if way == "node":
        y = lora_grouped(y, x, bank, groups).detach()
    elif way == "composed":
        y = grouped._composed(y, x, bank, groups)
    else:
        PATHS[way[0]](Job(y, x, bank, groups), way[1])
    share = (
        y.double() * want
    ).sum() / want.square().sum()  # errors that differ in sign cancel: 0.3 is off by 2.6e-3
    assert abs(share.item() - 1) <= 5e-4


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_scaling_may_be_a_tensor(grad, tokens):
    found, groups = make("ranks that differ")
    want = via_reference(found, groups)(x := randn(7, tokens, IN)).detach()
    scalings = [torch.tensor(term.scaling, requires_grad=grad) for term in found]
    found = [term._replace(scaling=s) for term, s in zip(found, scalings, strict=True)]
    got, expected = via_op(found, groups)(x), via_reference(found, groups)(x)
    assert relative_error(got, want) <= TOLERANCE[F32]
    if grad:
        grads = [torch.autograd.grad(y.square().sum(), scalings) for y in (got, expected)]
        assert_close(list(grads[0]), list(grads[1]), 10 * TOLERANCE[F32])


def test_a_backward_inside_autocast_computes_as_the_forward_did():
    found, groups = make("ranks that differ")
    x = randn(7, 5, IN, grad=True)
    got = via_op(found, groups)(x)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(got, leaves(x, found, groups)[1:], torch.ones_like(got))
    want = via_reference(found, groups)(x)
    wanted = torch.autograd.grad(want, leaves(x, found, groups)[1:], torch.ones_like(want))
    assert_close(list(grads), list(wanted), TOLERANCE[F32])


# ---- apart from each other ---------------------------------------------------------------------------


@MIX
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_each_gradient_is_the_one_it_would_get_alone(mix, tokens):
    found, groups = make(mix, dtype=F64)
    x = randn(len(groups.samples), tokens, IN, dtype=F64, grad=True)
    got = dict(
        zip(map(id, leaves(x, found, groups)), run(via_op(found, groups), x, found, groups)[1:], strict=True)
    )
    y = base_of(x)
    dy = (torch.arange(y.numel()) % 7 - 2.0).view(y.shape).double()
    for adapter in groups.used:
        term = found[adapter]
        if term is None:
            continue
        mine = [k for k, i in enumerate(groups.samples) if i == adapter]
        alone = lora_add(base_of(x[mine]), x[mine], [term])
        own = [t for t in term[:3] if t is not None]
        want = torch.autograd.grad(alone, own, dy[mine])
        assert_close([got[id(t)] for t in own], list(want), TOLERANCE[F64])


def test_many_samples_sum_to_as_exact_a_gradient_as_one_product():
    found, groups = make(([0, 1] * 200, [2, 2], False, ()), dtype=BF16)
    x = randn(400, 2, IN, dtype=BF16)
    y = via_op(found, groups)(x)
    got = torch.autograd.grad(y, [found[0].A, found[0].B], torch.ones_like(y))
    alone = [
        to_double(found)[0]._replace(
            A=(A := found[0].A.detach().double().requires_grad_()),
            B=(B := found[0].B.detach().double().requires_grad_()),
        )
    ]
    y = lora_add(base_of(x.double()[::2]), x.double()[::2], alone)
    for a, b in zip(got, torch.autograd.grad(y, [A, B], torch.ones_like(y)), strict=True):
        assert relative_error(a, b) <= 4e-3  # one rounding is 2**-9


def test_an_unused_adapter_gets_no_gradient():
    found, groups = make("some unused")
    x = randn(5, 3, IN)
    via_op(found, groups)(x).sum().backward()
    for k, term in enumerate(found):
        assert (term.A.grad is None) == (k not in groups.used)
        assert (term.B.grad is None) == (k not in groups.used)


@pytest.mark.parametrize("frozen", ["A", "B", "x", "A and x", "B and x", "bias", "adapter 0"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen):
    found, groups = make("ranks that differ")
    x = randn(7, 3, IN, grad="x" not in frozen.split(" and "))
    for term in found:
        for name in frozen.split(" and "):
            tensor = getattr(term, name, None) if name in {"A", "B", "bias"} else None
            if tensor is not None:
                tensor.requires_grad_(False)
    if frozen == "adapter 0":
        for tensor in found[0][:3]:
            tensor.requires_grad_(False)
    got, want = (run(via(found, groups), x, found, groups) for via in (via_op, via_reference))
    assert_close(got, want, TOLERANCE[F32])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["A", "B", "bias"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_what_an_adapter_holds_reaches_no_sample_of_another(value, where, tokens, grad):
    found, groups = make("ranks that differ")
    x = randn(7, tokens, IN)
    want = via_reference(found, groups)(x).detach()
    with torch.no_grad():
        getattr(found[2], where)[0] = value
    with torch.set_grad_enabled(grad):
        got = via_op(found, groups)(x).detach()
    others = [k for k, i in enumerate(groups.samples) if i != 2]
    assert relative_error(got[others], want[others]) <= TOLERANCE[F32]
    assert not got[[k for k, i in enumerate(groups.samples) if i == 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_sample_that_diverged_spoils_the_gradient_of_its_own_adapter_only(tokens):
    found, groups = make("uneven")
    x = randn(9, tokens, IN, grad=True)
    want = run(via_op(found, groups), x, found, groups)
    broken = x.detach().clone()
    broken[3] = math.nan  # the one sample of adapter 0
    got = run(via_op(found, groups), broken.requires_grad_(), found, groups)
    assert not got[2].isfinite().all()
    assert_close(got[4:6], want[4:6], TOLERANCE[F32])


def test_float16_may_overflow_under_an_adapter_that_was_not_asked_for():
    found, groups = make(([0, 1], [4, 4], False, ()), dtype=F16, grad=False)
    found[1] = found[1]._replace(A=torch.full_like(found[1].A, 6e4))
    x = randn(2, 1, IN, dtype=F16).abs()
    x[1] = 0
    y = base_of(x)
    PATHS["masked"](Job(y, x, Bank.stack(found), groups), 0)
    assert y.isfinite().all()


# ---- dropout -----------------------------------------------------------------------------------------


def alone_in_identity(p, samples, tokens):
    """An adapter that hands its input through, so that the output shows what dropout did."""
    eye = torch.eye(IN)
    return Term(eye.requires_grad_(), eye.clone().requires_grad_(), None, 1.0, p)


@pytest.mark.parametrize("dropouts", [(0.3, 0.3), (0.1, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize("grad", [True, False])
def test_dropout_statistics(dropouts, grad):
    samples, tokens = 8, 400
    found = [alone_in_identity(p, samples, tokens) for p in dropouts]
    ids = [k % 3 - 1 for k in range(samples)]
    groups = Groups.make(ids, 2, "cpu")
    x = torch.ones(samples, tokens, IN, requires_grad=True)
    with torch.set_grad_enabled(grad):
        got = lora_grouped(torch.zeros(samples, tokens, IN), x, Bank.stack(found), groups)
    for k, i in enumerate(ids):
        if i < 0:
            assert not got[k].any()
            continue
        p = dropouts[i]
        kept = got[k] != 0
        count = tokens * IN
        assert abs(kept.sum().item() - count * (1 - p)) <= 5 * math.sqrt(count * p * (1 - p))
        torch.testing.assert_close(got[k][kept], torch.full_like(got[k][kept], 1 / (1 - p)))
    if grad:
        (dx,) = torch.autograd.grad(got.sum(), [x])
        torch.testing.assert_close(dx, got.detach())  # the same mask, scaled alike


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_is_fixed_by_the_seed(p):
    found, groups = make("ranks that differ", p=p)
    x = randn(7, 8, IN, grad=True)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(run(via_op(found, groups), x, found, groups))
    assert_close(runs[0], runs[1], 0.0)
    assert relative_error(runs[2][0], runs[0][0]) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout(reentrant):
    found, groups = make("ranks that differ", p=0.4)
    x = randn(7, 8, IN, grad=True)
    torch.manual_seed(4)
    want = run(via_op(found, groups), x, found, groups)
    torch.manual_seed(4)
    y = checkpoint(via_op(found, groups), x, use_reentrant=reentrant)
    y.backward((torch.arange(y.numel()) % 7 - 2.0).view(y.shape))
    assert_close([y.detach(), *(t.grad for t in leaves(x, found, groups))], want, TOLERANCE[F32])


def test_dropout_of_one_is_the_base():
    found, groups = make("in turn", p=1.0)
    found = [t._replace(bias=None) for t in found]
    x = randn(6, 8, IN)
    torch.testing.assert_close(via_op(found, groups)(x), base_of(x))


# ---- derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dropouts", ["equal", "differ"])
def test_gradcheck_and_gradgradcheck(p, tokens, dropouts):
    groups = Groups.make([0, -1, 1, 0], 3, "cpu")
    shapes = [(4, tokens, 5), (2, 5), (3, 2), (3,), (3, 5), (3, 3)]
    args = [randn(*s, dtype=F64, grad=True, seed=k) for k, s in enumerate(shapes)]
    W = randn(3, 5, dtype=F64)
    spare = Term(args[1].detach(), args[2].detach(), None, 1.0, 0.0)

    def f(x, A, B, bias, A2, B2):
        torch.manual_seed(3)
        other = p if dropouts == "equal" else p / 2
        bank = Bank.stack([Term(A, B, bias, 1.5, p), Term(A2, B2, None, 0.5, other), spare])
        return lora_grouped(linear(x, W), x, bank, groups)

    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.3, 0.3), (0.2, 0.5)])
def test_a_backward_that_is_differentiated_gives_the_same_gradients(dropouts):
    found, groups = make(([0, -1, 1, 0, 1], [4, 2], True, ()))
    found = [term._replace(dropout=p) for term, p in zip(found, dropouts, strict=True)]
    x = randn(5, 6, IN, grad=True)
    y = via_op(found, groups)(x)
    plain, differentiable = (
        torch.autograd.grad(
            y, leaves(x, found, groups), torch.ones_like(y), retain_graph=True, create_graph=again
        )
        for again in (False, True)
    )
    assert_close(list(differentiable), list(plain), TOLERANCE[F32])


def test_a_second_backward_that_lacks_the_input_is_refused():
    found, groups = make("in turn")
    for term in found:
        term.A.requires_grad_(False)
    x = randn(6, 3, IN, grad=True)
    y = via_op(found, groups)(x)
    with pytest.raises(UnsupportedError, match="lora_A in use is frozen"):
        torch.autograd.grad(y.sum(), [x, found[0].B], create_graph=True)


def test_a_second_backward_through_frozen_adapters():
    found, groups = make("ranks that differ", dtype=F64, grad=False)
    x, dy = randn(7, 3, IN, dtype=F64, grad=True), randn(7, 3, OUT, dtype=F64, grad=True)
    results = []
    for via in (via_op, via_reference):
        (dx,) = torch.autograd.grad(via(found, groups)(x), [x], dy, create_graph=True)
        results.append([dx.detach(), *torch.autograd.grad(dx.square().sum(), [dy])])
    assert_close(*results, TOLERANCE[F64])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_the_callers_x_once_and_the_r_sized_product(p):
    found, groups = make(([0, 1] * 4, [4, 4], False, ()), p=p)
    x = randn(8, 16, IN, grad=True)
    W = WEIGHT[F32]
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_grouped(linear(x, W), x, Bank.stack(found), groups)
    own = {t.data_ptr() for term in found for t in term[:2]} | {W.data_ptr()}
    kept = [t for key, t in saved.items() if key not in own]
    assert sum(t.numel() for t in kept) == x.numel() + 8 * 16 * 4
    assert x.data_ptr() in saved


# ---- in place ----------------------------------------------------------------------------------------


def layouts():
    base = torch.randn(6, 2, OUT)
    return {
        "leaf that requires grad": base.clone().requires_grad_(),
        "expanded": torch.randn(OUT).expand(6, 2, OUT),
        "view": torch.randn(2, 6, 2, OUT)[1],
        "transposed": torch.randn(2, 6, OUT).transpose(0, 1),
        "saved by its own node": base.clone().requires_grad_().tanh(),
    }


@pytest.mark.parametrize("kind", sorted(layouts()))
@pytest.mark.parametrize("grad", [True, False])
def test_a_base_output_that_is_not_ours_is_left_alone(kind, grad):
    found, groups = make("in turn")
    y, x = layouts()[kind], randn(6, 2, IN, grad=True)
    before = y.detach().clone()
    with torch.set_grad_enabled(grad):
        got = lora_grouped(y, x, Bank.stack(found), groups)
        want = lora_grouped_reference(y, x, found, groups)
    assert_close([got.detach()], [want.detach()], TOLERANCE[F32])
    if grad:
        got.sum().backward()
    assert torch.equal(y.detach(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_fresh_base_output_is_written_in_place(mode, tokens):
    found, groups = make("in turn")
    x = randn(6, tokens, IN, grad=True)
    with mode():
        y = base_of(x)
        assert lora_grouped(y, x, Bank.stack(found), groups).data_ptr() == y.data_ptr()


def test_the_output_may_be_written_into():
    found, groups = make("in turn")
    x = randn(6, 2, IN, grad=True)
    got, want = (
        run(lambda x, via=via: via(found, groups)(x).relu_(), x, found, groups)
        for via in (via_op, via_reference)
    )
    assert_close(got, want, TOLERANCE[F32])


# ---- under torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8])
def test_compiles_in_one_graph_that_serves_every_assignment(tokens):
    found, groups = make("ranks that differ")
    bank = Bank.stack(found)
    compiled = torch.compile(
        lambda x, groups: lora_grouped(base_of(x), x, bank, groups), fullgraph=True, backend="aot_eager"
    )
    x = randn(7, tokens, IN, grad=True)
    got = run(lambda x: compiled(x, groups), x, found, groups)
    assert_close(got, run(via_op(found, groups), x, found, groups), TOLERANCE[F32])
    others = Groups.make([2, 2, 0, -1, 1, 0, 0], 3, "cpu")
    with torch.compiler.set_stance("fail_on_recompile"):
        got = run(lambda x: compiled(x, others), x, found, others)
    assert_close(got, run(via_op(found, others), x, found, others), TOLERANCE[F32])


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's own, inside jvp
@pytest.mark.parametrize("tokens", [1, 8])
def test_function_transforms_and_forward_mode(tokens):
    found, groups = make("ranks that differ", dtype=F64, grad=False)
    x = randn(7, tokens, IN, dtype=F64)

    def loss(via):
        def f(A, x):
            return via([found[0]._replace(A=A), *found[1:]], groups)(x).square().sum()

        return f

    for transform in (
        lambda f: torch.func.grad(f)(found[0].A, x),
        lambda f: torch.func.jvp(lambda A: f(A, x), (found[0].A,), (torch.ones_like(found[0].A),))[1],
    ):
        torch.testing.assert_close(transform(loss(via_op)), transform(loss(via_reference)))


class Odd(torch.Tensor):
    """A subclass with torch's default behaviour."""


@MIX
@pytest.mark.parametrize("tokens", [1, 8])
def test_meta_and_subclasses_are_composed(mix, tokens):
    found, groups = make(mix)
    x = randn(len(groups.samples), tokens, IN)
    odd = via_op(found, groups)(x.as_subclass(Odd))
    assert type(odd) is Odd
    assert relative_error(odd.as_subclass(torch.Tensor), via_reference(found, groups)(x)) <= TOLERANCE[F32]
    on_meta = [
        None if t is None else Term(*(None if q is None else q.to("meta") for q in t[:3]), *t[3:])
        for t in found
    ]
    got = lora_grouped(
        torch.empty(*x.shape[:2], OUT, device="meta"), x.to("meta"), Bank.stack(on_meta), groups
    )
    assert got.is_meta
    assert got.shape == (*x.shape[:2], OUT)


def test_a_tensor_of_scaling_may_change_under_a_compiled_graph():
    found, groups = make("ranks that differ", grad=False)
    scaling = torch.tensor(found[0].scaling)
    found[0] = found[0]._replace(scaling=scaling)
    compiled = torch.compile(via_op(found, groups), fullgraph=True, backend="aot_eager")
    x = randn(7, 8, IN)
    compiled(x)
    scaling.fill_(5.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert relative_error(compiled(x), via_reference(found, groups)(x)) <= TOLERANCE[F32]


# ---- groups, banks, costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0, 3], [-2], [7, 0, -5]])
def test_an_id_of_no_adapter_is_refused(ids):
    with pytest.raises(AdapterNameError, match="adapter ids"):
        Groups.make(ids, 3, "cpu")


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)])
def test_an_input_that_is_not_led_by_the_samples_is_refused(shape):
    found, groups = make("in turn")
    x = randn(*shape)
    with pytest.raises(UnsupportedError, match="the batch has 6 samples"):
        lora_grouped(base_of(x), x, Bank.stack(found), groups)


@MIX
def test_groups_sort_the_samples_by_adapter(mix):
    _, groups = make(mix)
    order = groups.order.tolist()
    assert sorted(order) == list(range(len(groups.samples)))
    assert order == sorted(order, key=lambda sample: (groups.samples[sample], sample))
    assert groups.counts == {i: groups.samples.count(i) for i in sorted(set(groups.samples)) if i >= 0}
    assert groups.on(torch.device("cpu")) is groups
    assert groups.on(torch.device("meta")) is groups.on(torch.device("meta"))


@MIX
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_blocks_hold_every_adapted_sample_once(mix, size):
    _, groups = make(mix)
    blocks = groups.blocks(size)
    count = len(groups.samples)
    taken = torch.arange(count) if blocks.take is None else blocks.take
    assert len(taken) == len(blocks.owners) * size
    assert blocks.owner.tolist() == list(blocks.owners)
    for at, sample in enumerate(taken.tolist()):
        owner = blocks.owners[at // size]
        assert groups.samples[sample] == (-1 if owner == groups.count else owner)
    if blocks.take is None:
        return
    real = torch.ones(len(taken), dtype=torch.bool) if blocks.real is None else blocks.real
    active = torch.arange(count) if blocks.active is None else blocks.active
    assert (
        sorted(taken[real].tolist()) == active.tolist() == [k for k, i in enumerate(groups.samples) if i >= 0]
    )
    assert taken[blocks.back].tolist() == active.tolist()


def changed(name):
    """A bank, its terms, and the terms after a change."""
    found, _ = make("ranks that differ")
    bank = Bank.stack(found)
    first = found[0]
    match name:
        case "nothing":
            found = [Term(*t) for t in found]
        case "in place":
            with torch.no_grad():
                first.B.mul_(2)
        case "data":
            first.A.data = first.A.detach().clone()
        case "a bias in place":
            first.bias.detach().zero_()
        case "scaling":
            found = [first._replace(scaling=9.0), *found[1:]]
        case "a tensor of scaling":
            scaling = torch.tensor(2.0)
            found = [first._replace(scaling=scaling), *found[1:]]
            bank = Bank.stack(found)
            scaling.fill_(3.0)
        case "dropout":
            found = [first._replace(dropout=0.5), *found[1:]]
        case "another tensor":
            found = [first._replace(A=first.A.detach().clone()), *found[1:]]
        case "one more":
            found = [*found, first]
        case "one gone":
            found = [None, *found[1:]]
        case "dtype":
            first.A.data = first.A.detach().bfloat16()
    return bank, found


@pytest.mark.parametrize(
    ("name", "own_change"),
    [("in place", True), ("data", True), ("a bias in place", True), ("dtype", True), ("scaling", False), ("a tensor of scaling", True), ("dropout", False), ("another tensor", False), ("one more", False), ("one gone", False)],
)  # fmt: skip
def test_a_bank_knows_when_it_is_out_of_date(name, own_change):
    bank, found = changed(name)
    assert not bank.is_current(found)
    assert bank.is_current() is not own_change


def test_a_bank_of_the_same_parameters_is_current():
    bank, found = changed("nothing")
    assert bank.is_current(found)
    assert bank.is_current()


def test_a_bank_made_under_a_transform_is_never_current():
    found, _ = make("in turn", grad=False)
    banks = []

    def f(A):
        banks.append(Bank.stack([found[0]._replace(A=A)]))
        return A.sum()

    torch.func.grad(f)(found[0].A)
    assert not banks[0].is_current()


def test_stacked_factors_are_made_once_in_each_dtype():
    found, groups = make("some unused")
    bank = Bank.stack(found)
    assert bank.stacked(F32).A is bank.stacked(F32).A
    assert bank.stacked(BF16).B.dtype == BF16
    assert bank.stacked(F32).A.shape == (5 * 4 + 1, IN)
    assert not bank.stacked(F32).A.requires_grad
    assert bank.select(groups.used, F32).A is bank.select(groups.used, F32).A


def test_factors_of_different_shapes_are_no_bank():
    found, _ = make("in turn")
    with pytest.raises(AssertionError):
        Bank.stack([found[0], found[1]._replace(B=randn(OUT + 1, 4))])


# samples, tokens, adapters, sorted -> what is plainly cheapest at 1024 x 1024, rank 16
PLANS = [
    (64, 1, 4, False, BF16, {"masked"}),
    (64, 1, 16, False, F32, {"blocked 4"}),
    (64, 32, 16, False, F32, {"blocked 1"}),
    (64, 32, 64, False, BF16, {"blocked 1"}),
    (64, 128, 4, True, BF16, {"blocked 16"}),
    (8, 128, 2, True, F32, {"segments", "blocked 4"}),
]


@pytest.mark.parametrize(("samples", "tokens", "count", "in_order", "dtype", "wanted"), PLANS)
def test_the_costs_choose_as_measured(samples, tokens, count, in_order, dtype, wanted):
    ids = [k % count for k in range(samples)]
    groups = Groups.make(sorted(ids) if in_order else ids, count, "cpu")
    bank = Bank.stack([Term(torch.zeros(16, 1024), torch.zeros(1024, 16), None, 1.0, 0.0)] * count)
    plan = choose(bank, groups, tokens, dtype)
    assert plan.path in wanted or f"{plan.path} {plan.size}" in wanted
    assert choose(bank, groups, tokens, dtype) is plan


def test_a_bank_with_a_nan_is_never_multiplied_through_the_others():
    found, groups = make("in turn", grad=False)
    assert choose(Bank.stack(found), groups, 1, F32) == Plan("masked", 0)
    found[1].A[0, 0] = math.nan
    assert choose(Bank.stack(found), groups, 1, F32).path != "masked"


def test_training_moves_samples_of_few_tokens_and_fetches_factors_for_many():
    bank = Bank.stack([Term(torch.zeros(16, 64), torch.zeros(64, 16), None, 1.0, 0.0)] * 4)
    groups = Groups.make([k % 4 for k in range(32)], 4, "cpu")
    assert block_size(bank, groups, 1) == 8
    assert block_size(bank, groups, 64) == 1
