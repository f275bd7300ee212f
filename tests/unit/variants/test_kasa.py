"""KaSA against a naive reference, what it takes off the base, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import KasaConfig, LoraConfig, PeftModel, get_peft_model, plan
from lorakit.errors import AdapterNameError, PlanError
from models import Snapshot, bits, logits, randomise, registry_of, tiny

R, IN, OUT = 3, 10, 7


class Only(nn.Module):
    def __init__(self, kind="linear", dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.only = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
        self.to(dtype)

    def forward(self, x):
        return self.only(x)

    def matrix(self):
        weight = self.only.weight.detach()
        return weight if isinstance(self.only, nn.Linear) else weight.T


def config(**changes):
    fields = {"r": R, "lora_alpha": 5, "target_modules": ["only"], "kasa_config": {}, **changes}
    return LoraConfig(**fields)


def adapted(kind="linear", dtype=torch.float64, **changes):
    model = get_peft_model(Only(kind, dtype), config(**changes)).eval()
    randomise(model)
    return model


def truncated(W, r=R):
    """W without its r least singular values."""
    U, S, Vh = torch.linalg.svd(W.double())
    S[-r:] = 0
    return U[:, : len(S)] @ torch.diag(S) @ Vh[: len(S)]


def x():
    return torch.randn(4, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def naive(model, base, x, rate=None):
    layer = registry_of(model).layers["only"]
    A, B, bias = layer.stored("default")
    h = A @ x.T
    d = layer.lora_diag["default"]
    added = torch.stack([sum(B[:, k] * d[k] * h[k, n] for k in range(R)) for n in range(len(x))])
    if bias is not None:
        added = added + bias
    return x @ truncated(base.matrix()).T + base.only.bias.detach() + layer.scaling["default"] * added


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_gradients(kind, biased, rslora):
    model, base = adapted(kind, lora_bias=biased, use_rslora=rslora), Only(kind)
    x_ = x().requires_grad_()
    weights = torch.randn(4, OUT, dtype=torch.float64)
    wanted = naive(model, base, x_)
    assert (wanted - base(x_)).abs().max() > 0.1
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 if biased else 3
    grads = torch.autograd.grad((wanted * weights).sum(), [x_, *trained.values()])
    found = model(x_)
    assert torch.allclose(found, wanted, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), [x_, *trained.values()]), grads, strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_new_adapter_is_the_base_without_its_least_singular_values():
    model, base = get_peft_model(Only(), config()).eval(), Only()
    layer = registry_of(model).layers["only"]
    acting = base.matrix() + layer.get_delta_weight("default")
    assert torch.allclose(acting, truncated(base.matrix()), atol=1e-12)
    assert torch.linalg.matrix_rank(acting) == min(IN, OUT) - R
    assert torch.allclose(model(x()), x() @ truncated(base.matrix()).T + base.only.bias, atol=1e-12)
    assert bits(layer.base_layer.weight) == bits(base.only.weight)
    assert layer.lora_diag["default"].std() > 0.1


def test_dropout_acts_on_the_adapter_and_not_on_what_is_taken_off():
    model = get_peft_model(Only(), config(lora_dropout=0.5)).train()
    base = Only()
    assert torch.allclose(model(x()), x() @ truncated(base.matrix()).T + base.only.bias, atol=1e-12)
    randomise(model)
    torch.manual_seed(1)
    assert not torch.allclose(model(x()), naive(model, base, x()), atol=1e-3)


def test_others_on_the_same_base_see_nothing_of_it():
    model, base = adapted(), Only()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["only"]))
    model.set_adapter("plain")
    assert torch.equal(model(x()), base(x()))
    model.set_adapter("default")
    wanted = model(x())
    with model.disable_adapter():
        assert torch.equal(model(x()), base(x()))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x()), wanted)
    assert bits(model.unload().only.weight) == bits(base.only.weight)


def test_ranks_by_pattern_take_off_as_many():
    model = get_peft_model(
        tiny(),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 5}, kasa_config={}),
    )
    for path, layer in registry_of(model).layers.items():
        assert len(layer.lora_offset["default"].A) == (5 if path.endswith("q_proj") else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_off_the_very_same(tmp_path, dtype):
    model = adapted(dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Only(dtype=dtype), tmp_path)
    one, other = (registry_of(m).layers["only"].lora_offset["default"] for m in (model, loaded))
    assert bits(one.A) == bits(other.A)
    assert bits(one.B) == bits(other.B)
    assert one.A.dtype == torch.float32
    x_ = x().to(dtype)
    assert torch.equal(model(x_), loaded(x_))


def test_combined_adapters_are_plain():
    model = adapted()
    model.add_adapter("other", config(kasa_config=KasaConfig(beta=0.5)))
    randomise(model, "other", 4)
    model.base_model.set_adapter(["default", "other"])
    wanted = model(x())
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "sum")
    model.set_adapter("both")
    assert torch.allclose(model(x()), wanted, atol=1e-10)
    assert model.peft_config["both"].kasa_config is None


# ---- penalties ------------------------------------------------------------------------------------------


def naive_penalty(layer, beta, gamma, name="default"):
    A, B, _ = layer.stored(name)
    d = layer.lora_diag[name]
    total = beta * sum(value**2 for value in d)
    for gram in (B.T @ B, A @ A.T):
        off = [gram[i, j] - float(i == j) for i in range(R) for j in range(R)]
        total = total + gamma * sum(value**2 for value in off) ** 0.5
    return total


def test_the_penalty_is_the_sum_over_layers_and_adapters():
    options = LoraConfig(r=R, target_modules=["q_proj", "c_fc"], kasa_config=KasaConfig(0.3, 0.7))
    model = get_peft_model(tiny(dtype=torch.float64), options)
    model.add_adapter("other", LoraConfig(r=R, target_modules=["v_proj"], kasa_config=KasaConfig(2.0, 0.0)))
    model.add_adapter("plain", LoraConfig(r=R, target_modules=["v_proj"]))
    randomise(model)
    randomise(model, "other", 4)
    layers = registry_of(model).layers.values()
    wanted = sum(naive_penalty(layer, 0.3, 0.7) for layer in layers if "default" in layer.r)
    other = sum(naive_penalty(layer, 2.0, 0.0, "other") for layer in layers if "other" in layer.r)
    for found in (model.get_adapter_loss(), model._get_kasa_loss(), model.get_adapter_loss("default")):
        assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(
        model.get_adapter_loss(["default", "other", "plain", "other"]), wanted + other, atol=1e-12
    )
    assert model.get_adapter_loss("plain") == 0.0
    assert model._get_monteclora_loss() == 0.0
    with pytest.raises(AdapterNameError, match="none"):
        model.get_adapter_loss("none")
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(wanted, trained)
    for one, two in zip(torch.autograd.grad(model.get_adapter_loss(), trained), grads, strict=True):
        assert torch.allclose(one, two, atol=1e-12)
        assert two.abs().max() > 0


def test_the_loss_of_the_model_is_the_models():
    model = get_peft_model(tiny(), LoraConfig(r=R, target_modules=["q_proj"], kasa_config={"beta": 100.0}))
    alone = logits(model.train())
    model.get_adapter_loss()
    assert torch.equal(logits(model), alone)


def test_half_adapters_are_penalised_in_single_precision():
    model = get_peft_model(Only(dtype=torch.bfloat16), config(), autocast_adapter_dtype=False)
    found = model.get_adapter_loss()
    assert found.dtype == torch.float32
    assert found.item() > 0


# ---- refusals -------------------------------------------------------------------------------------------


def refused(base, options, *said):
    before = Snapshot(base)
    with pytest.raises(PlanError) as caught:
        get_peft_model(base, options)
    for text in said:
        assert text in str(caught.value)
    before.assert_same(base)


@pytest.mark.parametrize("r", [7, 8])
def test_a_rank_that_leaves_nothing_is_refused_while_planning(r):
    refused(Only(), config(r=r), "only: KaSA takes r of the 7 singular values", f"got r={r}")
    with pytest.raises(PlanError, match="rank below 7"):
        plan(Only(), config(r=r))
    assert plan(Only(), config(r=6)).parameters == 6 * (IN + OUT + 1)


@pytest.mark.parametrize("scheme", ["orthogonal"])
def test_initialisers_that_choose_the_product_are_refused(scheme):
    refused(
        Only(),
        config(r=4, init_lora_weights=scheme),
        f"only: init_lora_weights={scheme!r}",
        "KaSA has a random",
    )


@pytest.mark.parametrize("scheme", [True, False, "gaussian"])
def test_others_begin_with_a_normal_diagonal(scheme):
    model = get_peft_model(Only(), config(r=6, init_lora_weights=scheme))
    layer = registry_of(model).layers["only"]
    assert layer.lora_diag["default"].abs().max() > 0.1
    assert (layer.lora_B["default"].weight == 0).all() == (scheme is not False)


def test_other_kinds_of_layers_are_refused():
    refused(
        tiny(),
        LoraConfig(r=2, target_modules=["embed", "q_proj"], kasa_config={}),
        "embed: KaSA is not defined",
    )


def test_a_base_without_values_is_refused():
    with torch.device("meta"):
        base = Only()
    with pytest.raises(PlanError, match=r"only: KaSA looks at the base weight.*meta"):
        get_peft_model(base, config())
    assert type(base.only) is nn.Linear
