"""`lora_add` and `lora_linear` against `lora_reference`, value and gradient, in every situation they meet."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lorakit.errors import UnsupportedError
from lorakit.ops import Term, lora_add, lora_linear, lora_reference

IN, OUT, R = 24, 40, 4
SHAPES = [(IN,), (6, IN), (0, IN), (2, 3, IN), (2, 0, IN), (2, 3, 2, IN)]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 3e-2, F16: 4e-3}


def make_terms(count=1, *, bias=False, p=0.0, dtype=F32, grad=True, rank=R):
    g = torch.Generator().manual_seed(count + 10 * bias)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_(grad)

    return [
        Term(leaf(rank + k, IN), leaf(OUT, rank + k), leaf(OUT) if bias else None, 0.5 + k, p)
        for k in range(count)
    ]


def make_base(dtype=F32, *, bias=True):
    g = torch.Generator().manual_seed(99)
    W = torch.randn(OUT, IN, generator=g, dtype=F64).to(dtype)
    return W, torch.randn(OUT, generator=g, dtype=F64).to(dtype) if bias else None


def make_x(shape, dtype=F32, *, grad=True):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=F64)
        .to(dtype)
        .requires_grad_(grad)
    )


def via_add(x, W, b, terms):
    return lora_add(linear(x, W, b), x, terms)


def via_linear(x, W, b, terms):
    return lora_linear(x, W, b, terms)


def via_transposed(x, W, b, terms):
    return lora_linear(x, W.t().contiguous(), b, terms, transposed=True)


def via_reference(x, W, b, terms):
    return lora_reference(linear(x, W, b), x, terms)


OPS = pytest.mark.parametrize("op", [via_add, via_linear, via_transposed])


def leaves(x, terms):
    return [t for t in (x, *(t for term in terms for t in term[:3])) if t is not None and t.requires_grad]


def run(op, x, W, b, terms):
    y = op(x, W, b, terms)
    wanted = leaves(x, terms)
    dy = (torch.arange(y.numel()) % 7 - 2).view(y.shape).to(y.dtype)  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_close(got, want, tolerance):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        scale = b.double().norm().item() or 1.0
        assert (a.double() - b.double()).norm().item() <= tolerance * scale


def node_names(y):
    return y.grad_fn.name()


@OPS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("count", "bias"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("base_bias", [False, True])
def test_equals_the_reference(op, shape, count, bias, base_bias):
    W, b = make_base(bias=base_bias)
    x, terms = make_x(shape), make_terms(count, bias=bias)
    assert "Lora" in node_names(op(x, W, b, terms))
    assert_close(run(op, x, W, b, terms), run(via_reference, x, W, b, terms), TOLERANCE[F32])


@OPS
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
@pytest.mark.parametrize("adapter", [F32, BF16, F64])
@pytest.mark.parametrize("rows", [3, 64])
def test_mixed_dtypes_equal_the_float64_answer(op, dtype, adapter, rows):
    W, b = make_base(dtype)
    x, terms = make_x((rows, IN), dtype), make_terms(2, bias=True, dtype=adapter)
    wide = [Term(*(t.detach().double().requires_grad_() for t in term[:3]), *term[3:]) for term in terms]
    got = run(op, x, W, b, terms)
    want = run(via_reference, x.detach().double().requires_grad_(), W.double(), b.double(), wide)
    for tensor, leaf in zip(got[1:], leaves(x, terms), strict=True):
        assert tensor.dtype == leaf.dtype
    assert got[0].dtype == dtype
    tolerance = max(TOLERANCE[dtype], TOLERANCE[adapter])
    assert_close([t.double() for t in got], want, tolerance)


def test_a_base_output_of_another_dtype_keeps_it():
    W, b = make_base()
    x, terms = make_x((64, IN), BF16), make_terms(2, bias=True)

    def base_in_float32(op):
        return lambda x, W, b, terms: op(linear(x.float(), W, b), x, terms)

    got = run(base_in_float32(lora_add), x, W, b, terms)
    assert got[0].dtype == F32
    assert_close(got, run(base_in_float32(lora_reference), x, W, b, terms), TOLERANCE[BF16])


@OPS
@pytest.mark.parametrize("frozen", ["A", "B", "x", "A and x", "B and x", "bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(op, frozen):
    W, b = make_base()
    x, terms = make_x((6, IN), grad="x" not in frozen), make_terms(2, bias=True)
    for term in terms:
        for name in frozen.split(" and "):
            if name != "x":
                getattr(term, name).requires_grad_(False)
    assert_close(run(op, x, W, b, terms), run(via_reference, x, W, b, terms), TOLERANCE[F32])


@pytest.mark.parametrize("op", [via_add, via_linear])
@pytest.mark.parametrize(
    ("frozen", "floats"),
    [("", 64 * IN + 64 * R), ("A", 64 * R), ("B", 64 * IN), ("x", 64 * IN + 64 * R)],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_the_callers_x_once_and_the_r_sized_product(op, frozen, floats, p):
    W, _ = make_base(BF16, bias=False)
    x, terms = make_x((64, IN), BF16, grad=frozen != "x"), make_terms(1, p=p)
    if frozen in {"A", "B"}:
        getattr(terms[0], frozen).requires_grad_(False)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(x, W, None, terms)
    own = {t.data_ptr() for t in (W, terms[0].A, terms[0].B)}
    kept = [t for key, t in saved.items() if key not in own]
    assert sum(t.numel() for t in kept) == floats
    assert all(t.data_ptr() == x.data_ptr() for t in kept if t.numel() == x.numel())


@pytest.mark.parametrize("train", ["W", "b", "Wb"])
def test_a_trained_base_gets_its_gradient(train):
    def grads(op):
        W, b = make_base()
        W.requires_grad_("W" in train)
        b.requires_grad_("b" in train)
        op(make_x((6, IN)), W, b, make_terms()).square().sum().backward()
        return [t.grad for t in (W, b) if t.requires_grad]

    assert_close(grads(via_linear), grads(via_reference), TOLERANCE[F32])


def layouts():
    base = torch.randn(6, OUT)
    return {
        "leaf that requires grad": base.clone().requires_grad_(),
        "expanded": torch.randn(OUT).expand(6, OUT),
        "view": torch.randn(2, 6, OUT)[1],
        "view of a persistent tensor": base.view(6, OUT),
        "transposed": torch.randn(OUT, 6).t(),
        "saved by its own node": base.clone().requires_grad_().tanh(),
        "chunk": torch.randn(6, 2 * OUT, requires_grad=True).mul(2).chunk(2, dim=1)[0],
    }


@pytest.mark.parametrize("kind", sorted(layouts()))
@pytest.mark.parametrize("grad", [True, False])
def test_a_base_output_that_is_not_ours_is_left_alone(kind, grad):
    y, x, terms = layouts()[kind], make_x((6, IN)), make_terms()
    before = y.detach().clone()
    with torch.set_grad_enabled(grad):
        got, want = lora_add(y, x, terms), lora_reference(y, x, terms)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if grad:
        got.sum().backward()
    assert torch.equal(y.detach(), before)


def test_an_identity_base_does_not_overwrite_the_input():
    x = torch.randn(6, IN)
    before = x.clone()
    square = [Term(torch.randn(R, IN), torch.randn(IN, R), None, 1.0, 0.0)]
    with torch.no_grad():
        got = lora_add(x, x, square)
    assert torch.equal(x, before)
    torch.testing.assert_close(got, lora_reference(x, x, square))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_fresh_base_output_is_written_in_place(mode):
    W, b = make_base()
    x, terms = make_x((6, IN)), make_terms()
    with mode():
        y = linear(x, W, b)
        assert lora_add(y, x, terms).data_ptr() == y.data_ptr()


@OPS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_grad(op, mode, shape):
    W, b = make_base()
    x, terms = make_x(shape), make_terms(2, bias=True)
    with mode():
        got, want = op(x, W, b, terms), via_reference(x, W, b, terms)
    assert got.grad_fn is None
    assert_close([got], [want], TOLERANCE[F32])


@OPS
def test_the_output_may_be_written_into(op):
    W, b = make_base()
    x, terms = make_x((2, 3, IN)), make_terms()

    def then_relu(inner):
        return lambda *args: inner(*args).relu_()

    assert_close(
        run(then_relu(op), x, W, b, terms), run(then_relu(via_reference), x, W, b, terms), TOLERANCE[F32]
    )


@OPS
@pytest.mark.parametrize("shape", [(6, IN), (2, 3, IN)], ids=str)
def test_the_gradient_of_the_input_is_no_view(op, shape):
    """Autograd adds the gradients of other readers into it only then."""
    x, found = make_x(shape), []
    y = op(x, *make_base(), make_terms())
    nodes = [y.grad_fn, *(parent for parent, _ in y.grad_fn.next_functions if parent is not None)]
    for node in nodes:
        if "Lora" in node.name():
            node.register_hook(lambda grads, _: found.extend(g for g in grads if g is not None))
    y.sum().backward()
    inputs = [g for g in found if g.shape == x.shape]
    assert inputs
    assert not any(g._is_view() for g in inputs)


@OPS
def test_no_terms_is_the_base(op):
    W, b = make_base()
    x = make_x((6, IN))
    assert torch.equal(op(x, W, b, []), linear(x, W, b))


def test_a_linear_of_other_dtype_is_torchs_own_error():
    W, b = make_base(BF16)
    with pytest.raises(RuntimeError, match="dtype"):
        lora_linear(make_x((6, IN)), W, b, make_terms())


@OPS
@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_gradcheck_and_gradgradcheck(op, p):
    g = torch.Generator().manual_seed(1)
    W, b = torch.randn(3, 5, generator=g, dtype=F64), torch.randn(3, generator=g, dtype=F64)
    args = [
        torch.randn(*s, generator=g, dtype=F64, requires_grad=True) for s in [(2, 2, 5), (2, 5), (3, 2), (3,)]
    ]

    def f(x, A, B, bias):
        torch.manual_seed(3)
        return op(x, W, b, [Term(A, B, bias, 1.5, p), Term(A * 2, B, None, 0.5, p)])

    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


def test_a_second_backward_that_lacks_the_input_is_refused():
    W, b = make_base()
    x, terms = make_x((6, IN)), make_terms()
    terms[0].A.requires_grad_(False)
    y = lora_linear(x, W, b, terms)
    with pytest.raises(UnsupportedError, match="lora_A is frozen"):
        torch.autograd.grad(y.sum(), [x, terms[0].B], create_graph=True)


@OPS
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout(op, reentrant):
    W, b = make_base()
    x, terms = make_x((64, IN)), make_terms(2, p=0.3)

    def replayed(*args):
        return checkpoint(op, *args, use_reentrant=reentrant)

    torch.manual_seed(4)
    want = run(op, x, W, b, terms)
    torch.manual_seed(4)
    y = replayed(x, W, b, terms)
    y.backward((torch.arange(y.numel()) % 7 - 2.0).view(y.shape))
    assert_close([y.detach(), *(t.grad for t in leaves(x, terms))], want, TOLERANCE[F32])


@OPS
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(op, inside):
    W, b = make_base()
    x, terms = make_x((64, IN)), make_terms(2, bias=True)

    def cast(inner):
        def f(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return inner(*args)

        return f

    assert op(x, W, b, terms).dtype == F32
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        got = run(cast(op), x, W, b, terms)
    assert got[0].dtype == BF16
    assert_close(got, run(cast(via_reference), x, W, b, terms), TOLERANCE[BF16])


def test_a_backward_inside_autocast_computes_as_the_forward_did():
    W, b = make_base()
    x, terms = make_x((64, IN)), make_terms()
    y = lora_linear(x, W, b, terms)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(y, [terms[0].A], torch.ones_like(y))
    y = via_reference(x, W, b, terms)
    (want,) = torch.autograd.grad(y, [terms[0].A], torch.ones_like(y))
    assert_close([got], [want], TOLERANCE[F32])


@OPS
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's own, inside jvp
def test_function_transforms_and_forward_mode(op):
    W, b = make_base(F64)
    x, (term,) = make_x((6, IN), F64, grad=False), make_terms(dtype=F64, grad=False)

    def loss(inner):
        return lambda A, x: inner(x, W, b, [term._replace(A=A)]).square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss(op))(term.A, x), torch.func.grad(loss(via_reference))(term.A, x)
    )
    per_sample = torch.func.vmap(torch.func.grad(loss(op)), (None, 0))(term.A, x.unsqueeze(1))
    torch.testing.assert_close(per_sample.sum(0), torch.func.grad(loss(op))(term.A, x))
    got = torch.func.jvp(lambda A: loss(op)(A, x), (term.A,), (torch.ones_like(term.A),))[1]
    want = torch.func.jvp(lambda A: loss(via_reference)(A, x), (term.A,), (torch.ones_like(term.A),))[1]
    torch.testing.assert_close(got, want)


@OPS
def test_compiles_in_one_graph(op):
    W, b = make_base()
    x, terms = make_x((6, IN)), make_terms(2, bias=True)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, x, W, b, terms), run(op, x, W, b, terms), TOLERANCE[F32])


@OPS
def test_saved_tensors_may_move(op):
    W, b = make_base()
    x, terms = make_x((6, IN)), make_terms(p=0.3)
    torch.manual_seed(1)
    want = run(op, x, W, b, terms)
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
        got = run(op, x, W, b, terms)
    assert_close(got, want, TOLERANCE[F32])


class Odd(torch.Tensor):
    """A subclass with torch's default behaviour."""


@OPS
def test_meta_and_subclasses_are_composed(op):
    W, b = make_base()
    x, terms = make_x((2, 3, IN)), make_terms(p=0.3)
    meta = op(
        x.to("meta"),
        W.to("meta"),
        b.to("meta"),
        [Term(*(t.to("meta") for t in terms[0][:2]), None, 1.0, 0.3)],
    )
    assert meta.shape == (2, 3, OUT)
    odd = x.detach().as_subclass(Odd)
    got = op(odd, W, b, make_terms())
    assert type(got) is Odd
    torch.testing.assert_close(got.as_subclass(torch.Tensor), via_reference(x, W, b, make_terms()))


@OPS
def test_non_contiguous_input(op):
    W, b = make_base()
    terms = make_terms(p=0.3)
    x = torch.randn(IN, 6).t().requires_grad_()
    torch.manual_seed(1)
    got = run(op, x, W, b, terms)
    torch.manual_seed(1)
    copy = x.detach().contiguous().requires_grad_()
    assert_close(got, run(op, copy, W, b, terms), TOLERANCE[F32])
