"""LoRA-FA: B follows the full gradient as nearly as A lets it, on every kind of layer; states; refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoraConfig, create_lorafa_optimizer, get_peft_model, prepare_model_for_compiled_hotswap
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError, UnsupportedError
from lorakit.optimizers import LoraFAOptimizer
from lorakit.optimizers.lorafa import inverse_gram
from models import Snapshot, another, ids, randomise, registry_of, tiny, tiny_llama, with_adapter
from quantised import KINDS, Pair
from zoo import adapted_zoo

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def backward(model, batch=None):
    model.zero_grad()
    model(ids() if batch is None else batch).square().mean().backward()


def adapter_of(model, name="default"):
    return {item.file_name: item.tensor for item in registry_of(model).tensors(name)}


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 32), (8, 8), (12, 5), (3, 4, 32)], ids=str)
def test_the_inverse(dtype, shape):
    """That of `A A^T`; where A has fewer columns than rows the pseudo-inverse."""
    A = torch.randn(shape).to(dtype)
    wide = A.double()
    wanted = torch.linalg.pinv(wide).mT @ torch.linalg.pinv(wide)
    torch.testing.assert_close(inverse_gram(A), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_the_inverse_of_what_its_product_cannot_hold():
    """A condition of 1e5 squares to more than fp32 has digits; a zero row stays without effect."""
    U, V = torch.linalg.qr(torch.randn(4, 4, dtype=F64)).Q, torch.linalg.qr(torch.randn(32, 4, dtype=F64)).Q
    values = torch.tensor([1.0, 1e-2, 1e-4, 1e-5], dtype=F64)
    A = ((U * values) @ V.mT).float()
    exact = torch.linalg.inv(A.double() @ A.double().mT)
    error = torch.linalg.norm(inverse_gram(A) - exact) / torch.linalg.norm(exact)
    in_fp32 = torch.linalg.pinv(A @ A.mT).double()
    assert error < 1e-6
    assert torch.linalg.norm(in_fp32 - exact) / torch.linalg.norm(exact) > 0.5
    padded = torch.cat([A, torch.zeros(1, 32)])
    torch.testing.assert_close(inverse_gram(padded)[:4, :4], inverse_gram(A))
    assert not inverse_gram(padded)[4].any()


class OneStep(LoraFAOptimizer):
    """Takes the gradients themselves as steps."""

    def followed(self):
        return {
            p: self._gradient(p) for group in self.param_groups for p in group["params"] if p.grad is not None
        }


@pytest.mark.parametrize("rslora", [False, True])
def test_the_step_is_the_nearest_to_the_full_gradient(rslora):
    """On every kind of layer: `scaling * dB A` is the full gradient projected on A's rows, block by block."""
    # an embedding begins with A = 0 and is refused; here every A is random
    model = adapted_zoo(use_rslora=rslora, rank_pattern={"line": 2}).train()
    registry = registry_of(model)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1.0)
    optimizer.__class__ = OneStep
    backward(model)
    followed = optimizer.followed()
    kinds = set()
    for path, layer in registry.layers.items():
        A, B, _ = layer.stored("default")
        assert not A.requires_grad
        scaling = layer.scaling["default"]
        steps = layer.layout.split(A.detach(), followed[B], scaling)
        own = layer.layout.split(A.detach(), B.grad, scaling)
        for step, gradient in zip(steps, own, strict=True):
            # g_B = scaling * G A^T says G on A's rows: G A^+ A = g_B (A^T)^+ / scaling
            projected = gradient.B @ torch.linalg.pinv(gradient.A.mT) / scaling
            torch.testing.assert_close(step.delta(F64), projected, rtol=1e-8, atol=1e-12, msg=path)
        kinds.add(type(layer).__name__)
    assert kinds == {"Linear", "Embedding", "Conv", "ParamWrapper"}


def test_follows_the_full_gradient_of_a_linear_layer():
    """Against the gradient of the weight itself."""
    layer = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    full = layer[0].weight
    x = torch.randn(5, 8, dtype=F64)
    model = get_peft_model(layer, LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    randomise(model)
    optimizer = create_lorafa_optimizer(model, 3, 5, lr=1.0)
    optimizer.__class__ = OneStep
    model(x).square().sum().backward()
    A, B, _ = registry_of(model).layers["0"].stored("default")
    weight = (full + 5 / 3 * B @ A).detach().requires_grad_()
    (x @ weight.T).square().sum().backward()
    onto = torch.linalg.pinv(A.detach()) @ A.detach()
    step = 5 / 3 * optimizer.followed()[B] @ A.detach()
    torch.testing.assert_close(step, weight.grad @ onto)


def test_several_adapters_ranks_and_scalings():
    """Each follows its own A; the first step of AdamW is lr, but for what eps takes off small gradients."""
    model = with_adapter(tiny(dtype=F64), rank_pattern={"layers.1.q_proj": 2})
    another(model, "other", r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "q_proj"])
    another(model, "idle", seed=5)
    model.set_adapter(["default", "other"])
    optimizer = create_lorafa_optimizer(model, None, None, lr=1e-2)
    backward(model)
    wanted = {
        id(item): item.clone()
        for name in ("default", "other", "idle")
        for item in adapter_of(model, name).values()
    }
    ranks = set()
    for layer in registry_of(model).layers.values():
        for name in {"default", "other"} & layer.r.keys():
            A, B, _ = layer.stored(name)
            gradient = B.grad @ torch.linalg.inv(A @ A.mT) / layer.scaling[name] ** 2
            wanted[id(B)] = B - 1e-2 * gradient / (gradient.abs() + 1e-6 / (1 - 0.999) ** 0.5)
            ranks.add((name, A.shape[0], round(layer.scaling[name], 4)))
    assert ranks == {("default", 4, 2.0), ("default", 2, 4.0), ("other", 2, 2.1213)}
    optimizer.step()
    for name in ("default", "other", "idle"):
        for key, tensor in adapter_of(model, name).items():
            torch.testing.assert_close(tensor, wanted[id(tensor)], msg=f"{name} {key}")


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in {"nf4", "int8", "torchao-int4", "hqq-4"}], ids=str
)
@pytest.mark.parametrize("make", ["LoRA+", "LoRA-FA"])
def test_quantised_bases(make, kind):
    model = get_peft_model(Pair(kind), LoraConfig(r=4, target_modules=["up", "down"]))
    if make == "LoRA+":
        optimizer = lorakit.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    else:
        optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_only_h_is_kept_for_backward():
    """With A frozen a layer needs nothing of its input: (rows, r) for each adapter, and the trained part's own tensors."""
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(10, 64)

    def kept():
        found = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t):
            found[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        return sum(t.numel() for key, t in found.items() if key not in own)

    assert kept() == 10 * 64 + 10 * 2
    create_lorafa_optimizer(model, 2, 8, lr=1e-3)
    assert kept() == 10 * 2


def train(model, optimizer, steps):
    for number in range(steps):
        backward(model, ids(number))
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_continues_to_the_same_bits(dtype, tmp_path):
    """Moments are in fp32 under bf16 too, and stay so through a file."""

    def begun():
        model = get_peft_model(
            tiny(dtype=dtype),
            LoraConfig(r=4, target_modules=["q_proj", "c_fc"], modules_to_save=["head"], lora_bias=False),
            autocast_adapter_dtype=False,
        )
        randomise(model)
        return model, create_lorafa_optimizer(model, 4, 8, lr=1e-2, weight_decay=0.1)

    whole, optimizer = begun()
    train(whole, optimizer, 3)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    train(whole, optimizer, 3)
    model, resumed = begun()
    saved = torch.load(tmp_path / "state")
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, resumed, 3)
    assert {state["exp_avg_sq"].dtype for state in resumed.state.values()} == {torch.float32}
    assert len(resumed.state) == 5
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert all(
        torch.equal(s["exp_avg"], optimizer.state[p]["exp_avg"])
        for s, p in zip(resumed.state.values(), optimizer.state, strict=True)
    )


def test_the_second_moment_decays_in_bf16():
    """Kept in bf16 it would not: 0.999 times a number rounds to that number."""
    model = with_adapter(tiny(dtype=torch.bfloat16))
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.0)
    backward(model)
    optimizer.step()
    first = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
    for parameter in optimizer.state:
        parameter.grad.zero_()
    for _ in range(10):
        optimizer.step()
    for old, state in zip(first, optimizer.state.values(), strict=True):
        torch.testing.assert_close(state["exp_avg_sq"], old * 0.999**10)


def test_writes_to_a_and_new_scalings_are_seen():
    model = with_adapter(tiny())
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    optimizer.__class__ = OneStep
    layer = registry_of(model).layers["layers.0.q_proj"]
    A, B, _ = layer.stored("default")
    backward(model)
    first = optimizer.followed()[B]
    with torch.no_grad():
        A.mul_(2)
    torch.testing.assert_close(optimizer.followed()[B], first / 4)
    layer.set_scale("default", 3.0)
    torch.testing.assert_close(optimizer.followed()[B], first / 36)
    layer.scaling["default"] = 0.0
    assert not optimizer.followed()[B].any()


def test_ranks_that_are_padding_stay_zero():
    model = with_adapter(tiny())
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    train(model, optimizer, 2)
    for layer in registry_of(model).layers.values():
        _, B, _ = layer.stored("default")
        assert B[:, :4].ne(0).all()
        assert not B[:, 4:].any()


def test_a_closure_is_run_with_gradients():
    model = with_adapter(tiny())
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(ids()).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_autocast_and_a_gradient_scaler():
    model = with_adapter(tiny())
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plain = copy.deepcopy(model)
    other = create_lorafa_optimizer(plain, 4, 8, lr=1e-2)
    scaler.scale(model(ids()).square().mean()).backward()
    scaler.step(optimizer)
    backward(plain)
    other.step()
    for key, tensor in adapter_of(plain).items():
        torch.testing.assert_close(adapter_of(model)[key], tensor)


REFUSED = [
    ({"r": 8}, ConfigError, "r: got 8, but 'default' was made with 4"),
    ({"lora_alpha": 16}, ConfigError, "lora_alpha: got 16, but 'default' was made with 8"),
    ({"use_rslora": True}, ConfigError, "use_rslora: got True, but 'default' was made with False"),
    ({"lr": -1.0}, ConfigError, "lr: got -1.0"),
    ({"lr": None}, TypeError, "lr: got a NoneType"),
    ({"weight_decay": float("nan")}, ConfigError, "weight_decay: got nan"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refusals(changes, kind, message):
    model = with_adapter(tiny())
    before = Snapshot(model)
    with pytest.raises(kind, match=message):
        create_lorafa_optimizer(model, **{"r": 4, "lora_alpha": 8, "lr": 1e-3, **changes})
    before.assert_same(model)


@pytest.mark.parametrize("changes", [{"betas": (1.0, 0.9)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}], ids=str)
def test_refusals_of_the_class(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        LoraFAOptimizer([nn.Parameter(torch.zeros(2))], pairs={}, **changes)


def test_refuses_what_could_not_learn():
    """An embedding's A begins at zero, tied factors belong to two layers; both are named at once."""
    model = get_peft_model(
        tiny_llama(tie=True),
        LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
    )
    before = Snapshot(model)
    with pytest.raises(
        UnsupportedError, match=r"(?s)embed_tokens: A is zero.*lm_head: its factors are another layer's"
    ):
        create_lorafa_optimizer(model, 2, 8, lr=1e-3)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "mica"}, "layers.0.q_proj: its B is not trained"),
        ({"alora_invocation_tokens": [3]}, ""),
        (
            {"use_qalora": True, "qalora_group_size": 2},
            "layers.0.q_proj: QA-LoRA does not act by the product",
        ),
    ],
    ids=str,
)
def test_variants(changes, message):
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], **changes))
    if not message:
        assert create_lorafa_optimizer(model, 4, 8, lr=1e-3)
        return
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match=message):
        create_lorafa_optimizer(model, 4, 8, lr=1e-3)
    before.assert_same(model)


def test_refuses_sparse_gradients():
    base = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["1"], modules_to_save=["0"]))
    optimizer = create_lorafa_optimizer(model, 2, 8, lr=1e-3)
    backward(model)
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match="dense gradients"):
        optimizer.step()
    before.assert_same(model)
    assert not optimizer.state


def test_nothing_to_train():
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        create_lorafa_optimizer(tiny(), 4, 8, lr=1e-3)
    model = with_adapter(tiny())
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterStateError, match="none of the adapters"):
        create_lorafa_optimizer(model, 4, 8, lr=1e-3)


def test_peft_s_places():
    assert lorakit.optimizers.create_lorafa_optimizer is create_lorafa_optimizer
