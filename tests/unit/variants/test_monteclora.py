"""MonteCLoRA: the distribution of what a step draws, its repetition, its penalties, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorakit import LoraConfig, MontecloraConfig, get_peft_model
from lorakit.errors import ConfigError, PlanError
from models import bits, randomise, registry_of, tiny

R, IN, OUT = 3, 6, 5
TRAINED, FROZEN = ("std_prior", "expert_weights_prior"), ("gaussian_var_prior", "expert_weights")


class Only(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.only = nn.Linear(IN, OUT).to(dtype)

    def forward(self, x):
        return self.only(x)


def options(**changes):
    return MontecloraConfig(**{"num_samples": 4, "sample_scaler": 0.5, "kl_loss_weight": 0.3, **changes})


def adapted(dtype=torch.float64, given=None, **changes):
    fields = {
        "r": R,
        "lora_alpha": 6,
        "target_modules": ["only"],
        "monteclora_config": given or options(),
        **changes,
    }
    model = get_peft_model(Only(dtype), LoraConfig(**fields))
    with torch.no_grad():
        layer = layer_of(model)
        layer.lora_B["default"].weight.normal_(std=0.5)
        holder(model).std_prior.copy_(torch.tensor([-0.3, 0.1, 0.4]))
    return model


def layer_of(model):
    return registry_of(model).layers["only"]


def holder(model):
    return layer_of(model).lora_monteclora_sampler["default"]


def x():
    return torch.randn(4, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ---- what a step draws ----------------------------------------------------------------------------------


def naive_draw(A, s, e, scale):
    """The method as it is written: `samples` matrices of noise, averaged with drawn weights."""
    n, r = len(e), len(s)
    wishart = torch.zeros(r, r, dtype=A.dtype)  # by Bartlett's decomposition
    for i in range(r):
        wishart[i, i] = torch.distributions.Chi2(torch.tensor(float(r - i), dtype=A.dtype)).sample().sqrt()
        for j in range(i):
            wishart[i, j] = torch.randn((), dtype=A.dtype)
    wishart = wishart @ wishart.T
    variance = (torch.diag(s.exp()) @ wishart @ torch.diag(s.exp())).diagonal().clamp(min=1e-3)
    alpha = e.exp()
    spread = (1 / alpha * (1 - 2 / n) + (1 / alpha).sum() / n**2).clamp(min=1e-6) + 1e-6
    logits = spread.sqrt() * torch.randn(n, dtype=A.dtype) + alpha.log() - alpha.log().mean()
    weights = logits.softmax(0)
    noise = torch.randn(n, *A.shape, dtype=A.dtype) * variance.sqrt()[:, None]
    return A + scale * torch.einsum("n,nri->ri", weights, noise)


def statistics(away):
    """For each draw: squares and fourth powers, row by row, and products of squares within a row and across rows."""
    square = away.square()
    within = square[..., 0] * square[..., 1]
    across = (square[:, :-1] * square[:, 1:]).mean(2)
    return torch.cat([away.mean(2), square.mean(2), square.square().mean(2), within, across], dim=1)


def test_a_is_drawn_from_the_distribution_that_the_method_describes():
    model = adapted().train()
    layer = layer_of(model)
    A, B, _ = (part if part is None else part.detach() for part in layer.stored("default"))
    base, ones, count = Only().only, torch.eye(IN, dtype=torch.float64), 4000
    pull = torch.linalg.pinv(B) / layer.scaling["default"]
    with torch.no_grad():
        plain = ones @ base.weight.T + base.bias
        found = statistics(torch.stack([pull @ (model(ones) - plain).T - A for _ in range(count)]))
        s, e = holder(model).std_prior, holder(model).expert_weights_prior
        wanted = statistics(torch.stack([naive_draw(A, s, e, 0.5) - A for _ in range(count)]))
    error = ((found.var(0) + wanted.var(0)) / count).sqrt()
    away = (found.mean(0) - wanted.mean(0)) / error
    assert away.abs().max() < 4, away  # 14 numbers, each within 4 of its standard deviations


def test_the_variance_of_a_rank_has_a_floor():
    model = adapted().train()
    with torch.no_grad():
        holder(model).std_prior.fill_(-30.0)
        different = torch.stack([model(x()) for _ in range(200)]).std(0).mean()
    assert different > 1e-3


def test_eval_mode_and_merging_are_plain():
    model = adapted().eval()
    A, B, _ = layer_of(model).stored("default")
    wanted = x() @ (Only().only.weight + layer_of(model).scaling["default"] * B @ A).T + Only().only.bias
    assert torch.allclose(model(x()), wanted, atol=1e-12)
    model.train()
    assert not torch.allclose(model(x()), wanted, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(model(x()), wanted, atol=1e-12)  # also in training mode


def test_a_seed_repeats_a_step_and_another_does_not():
    model = adapted(lora_dropout=0.3).train()
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(model(x()).detach())
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


def step(model, call, *, penalised):
    torch.manual_seed(3)
    loss = call(x()).square().sum()
    if penalised:
        loss = loss + model.get_adapter_loss()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("penalised", [False, True])
def test_a_checkpointed_step_is_the_same(reentrant, penalised):
    model = adapted(lora_dropout=0.3).train()
    loss, wanted = step(model, model, penalised=penalised)
    inside = lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)  # noqa: E731
    again, found = step(model, inside, penalised=penalised)
    assert torch.equal(loss, again)
    assert found.keys() == wanted.keys()
    assert {
        f"base_model.model.only.lora_monteclora_sampler.default.{part}" for part in TRAINED
    } <= found.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        assert torch.equal(found[name], value), name


def test_gradients_are_those_of_the_draw():
    """By differences, with the draw held still."""
    model = adapted().train()
    _, found = step(model, model, penalised=True)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        for place in (0, p.numel() - 1):
            values = []
            for change in (1e-6, -2e-6):
                with torch.no_grad():
                    p.view(-1)[place] += change
                values.append(step(model, model, penalised=True)[0])
            with torch.no_grad():
                p.view(-1)[place] += 1e-6
            slope = (values[0] - values[1]) / 2e-6
            assert torch.allclose(found[name].view(-1)[place], slope, rtol=1e-5, atol=1e-7), name


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    model = adapted(torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x_ = x().float()
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight.mul_(2)
    torch.manual_seed(1)
    wanted = model(x_)
    torch.manual_seed(1)
    found = compiled(x_)
    assert torch.allclose(found, wanted, atol=1e-6)
    found.sum().backward()
    assert holder(model).std_prior.grad.abs().max() > 0
    assert model.get_adapter_loss().item() != 0.0
    torch.manual_seed(2)
    assert not torch.allclose(compiled(x_), wanted, atol=1e-3)


def test_half_adapters_draw_in_single_precision():
    given = LoraConfig(r=R, target_modules=["only"], monteclora_config=options(), init_lora_weights=False)
    model = get_peft_model(Only(torch.bfloat16), given, autocast_adapter_dtype=False).train()
    assert holder(model).std_prior.dtype == torch.bfloat16
    y = model(x().bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert model.get_adapter_loss().dtype == torch.float32


# ---- penalties ------------------------------------------------------------------------------------------


def naive_penalty(part, weights, variance, given, r=R):
    s, e = part.std_prior.detach(), part.expert_weights_prior.detach().exp()
    n = len(e)
    prior = torch.full_like(e, given.dirichlet_prior)
    gamma = lambda value: torch.lgamma(value).exp()  # noqa: E731
    first = torch.log(gamma(e.sum()) / gamma(prior.sum()))
    for k in range(n):
        first = first + torch.log(gamma(e[k]) / gamma(prior[k]))
        first = first + (e[k] - prior[k]) * (torch.digamma(e[k]) - torch.digamma(e.sum()))
    square = (2 * s).exp()
    second = 0.5 * (-r * square.log().sum() + r * square.sum() - r**2)
    third = n * 0.5 * (variance.sum() - variance.log().sum() - r)
    total = given.kl_loss_weight * (first + second + third)
    return total + (weights**2).sum() if given.use_entropy else total


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_penalty_before_a_step(entropy, samples):
    given = options(use_entropy=entropy, num_samples=samples, dirichlet_prior=0.7)
    model = adapted(given=given)
    wanted = naive_penalty(holder(model), holder(model).expert_weights, torch.ones(R), given)
    assert torch.allclose(model.train().get_adapter_loss(), wanted, atol=1e-12)
    assert model.eval().get_adapter_loss() == 0.0


def test_the_penalty_is_of_the_last_steps_draw():
    model = adapted(given=options(use_entropy=True)).train()
    before = model.get_adapter_loss()
    model(x())
    seen = [model.get_adapter_loss(), model.get_adapter_loss()]
    assert torch.equal(*seen)
    assert not torch.allclose(seen[0], before)
    draw = layer_of(model).kept["default"]["draw"]
    variance = ((2 * holder(model).std_prior).exp() * draw.squares).clamp(min=1e-3).detach()
    alpha = holder(model).expert_weights_prior.detach().exp()
    spread = (1 / alpha * (1 - 2 / 4) + (1 / alpha).sum() / 16 + 1e-6).sqrt()
    weights = (spread * draw.normals + alpha.log()).softmax(0)
    wanted = naive_penalty(holder(model), weights, variance, options(use_entropy=True))
    assert torch.allclose(seen[0], wanted, atol=1e-10)
    model(x())
    assert not torch.allclose(model.get_adapter_loss(), seen[0])


def test_it_is_the_mean_over_layers():
    given = LoraConfig(r=R, target_modules=["q_proj", "c_fc"], monteclora_config=options())
    model = get_peft_model(tiny(dtype=torch.float64), given).train()
    layers = registry_of(model).layers.values()
    parts = [layer.lora_monteclora_sampler["default"] for layer in layers]
    each = [naive_penalty(part, part.expert_weights, torch.ones(R), options()) for part in parts]
    assert len(each) == 4
    assert torch.allclose(model._get_monteclora_loss(), sum(each) / 4, atol=1e-12)
    assert torch.allclose(model.get_adapter_loss(), sum(each) / 4, atol=1e-12)
    assert model._get_kasa_loss() == 0.0


def test_many_samples_have_a_finite_penalty():
    """The gamma function of their sum has no place in float32."""
    model = adapted(torch.float32, options(num_samples=100)).train()
    assert model.get_adapter_loss().isfinite()
    model(x().float())
    model.get_adapter_loss().backward()
    assert all(p.grad.isfinite().all() for p in holder(model).parameters() if p.grad is not None)


# ---- memory and limits ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor holds that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return found


def test_a_step_draws_no_more_for_many_samples():
    samples = 2**16
    model = adapted(torch.float32, options(num_samples=samples)).train()
    with Largest() as seen:
        (model(x().float()).sum() + model.get_adapter_loss()).backward()
    assert seen.numel == samples
    model = adapted(torch.float32, options(num_samples=2)).train()
    with Largest() as seen:
        model(x().float()).sum().backward()
    assert seen.numel <= max(IN * OUT, 4 * IN)


@pytest.mark.parametrize("samples", [0, -1, 2**16 + 1, 10**6, 2.0])
def test_too_many_samples_are_refused_by_name(samples):
    with pytest.raises(
        ConfigError, match=r"monteclora_config.num_samples: got .* wanted an int from 1 to 65536"
    ):
        LoraConfig(monteclora_config={"num_samples": samples})


def test_embeddings_are_refused():
    with pytest.raises(PlanError, match="embed: MonteCLoRA is not defined on a embedding"):
        get_peft_model(tiny(), LoraConfig(target_modules=["embed"], monteclora_config={}))


# ---- its tensors ----------------------------------------------------------------------------------------


def test_two_of_its_tensors_are_never_trained():
    model = adapted().train()
    for name in FROZEN:
        assert not getattr(holder(model), name).requires_grad
    assert all(getattr(holder(model), name).requires_grad for name in TRAINED)
    before = [bits(getattr(holder(model), name)) for name in FROZEN]
    model.base_model.set_requires_grad("default", True)
    assert not holder(model).expert_weights.requires_grad
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        (model(x()).square().sum() + model.get_adapter_loss()).backward()
        optimiser.step()
    assert [bits(getattr(holder(model), name)) for name in FROZEN] == before


def test_they_begin_as_the_method_says_and_move_with_the_model():
    torch.manual_seed(4)
    model = get_peft_model(Only(), LoraConfig(r=R, target_modules=["only"], monteclora_config=options()))
    part = holder(model)
    assert torch.equal(part.gaussian_var_prior, torch.eye(R, dtype=torch.float64))
    assert torch.equal(part.expert_weights, torch.full((4,), 0.25, dtype=torch.float64))
    for name in TRAINED:
        value = getattr(part, name)
        assert ((value >= 0) & (value < 1)).all()
        assert len(value.unique()) == len(value)
    names = {n.split("lora_monteclora_sampler.")[1] for n in model.state_dict() if "sampler" in n}
    assert names == {f"default.{name}" for name in (*TRAINED, *FROZEN)}
    model.train()(x())
    model.float()  # after a step
    randomise(model)
    assert model.get_adapter_loss().item() != 0.0
    assert model(x().float()).dtype == torch.float32
