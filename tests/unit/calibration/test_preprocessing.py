"""CorDA and LoRA-GA on a model: gathered, kept, used up, cached; and a model left as it was."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lorakit import (
    CordaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    preprocess_corda,
    preprocess_loraga,
)
from lorakit.calibration import caches
from lorakit.calibration.caches import read_cache, write_cache
from lorakit.errors import (
    AdapterFormatError,
    ConfigError,
    KeyMismatchError,
    NonFiniteError,
    PlanError,
    UnsupportedError,
)
from lorakit.init import lora_ga
from lorakit.init.gathered import gathered
from models import WORDS, Snapshot, logits, randomise, tiny, tiny_llama, with_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj"]
SCHEMES = ["corda", "lora_ga"]


def batches(count=6, seed=0, shape=(2, 9)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, WORDS, shape, generator=generator) for _ in range(count)]


def run(model, data=None):
    for ids in batches() if data is None else data:
        model(input_ids=ids)


def step(model, data=None):
    for ids in batches() if data is None else data:
        model(input_ids=ids, labels=ids).loss.backward()


def config(scheme, **fields):
    options = {
        key: fields.pop(key)
        for key in ("corda_method", "cache_file", "covariance_file", "prune_temporary_fields", "verbose", "use_float16_for_covariance")
        if key in fields
    }  # fmt: skip
    own = (
        {"corda_config": CordaConfig(**options)} if scheme == "corda" else {"lora_ga_config": LoraGAConfig()}
    )
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": [*ATTENTION, "down_proj"],
            "init_lora_weights": scheme,
            **own,
            **fields,
        }
    )


def gather(scheme, model, settings=None, **arguments):
    settings = config(scheme) if settings is None else settings
    if scheme == "corda":
        preprocess_corda(model, settings, run_model=arguments.pop("go", lambda: run(model)), **arguments)
    else:
        preprocess_loraga(model, settings, arguments.pop("go", lambda: step(model)), **arguments)
    return settings


def begun(scheme, model=None, settings=None, **arguments):
    model = tiny_llama() if model is None else model
    return get_peft_model(model, gather(scheme, model, settings, **arguments))


def kept(model, scheme):
    return [path for path, module in model.named_modules() if gathered(module, scheme) is not None]


each = pytest.mark.parametrize("scheme", SCHEMES)


@each
def test_begins_without_a_change_and_the_base_is_untouched(scheme):
    base = tiny_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    wanted = logits(base)
    peft = begun(scheme, base)
    torch.testing.assert_close(logits(peft), wanted, rtol=0, atol=1e-6)
    assert all(layer.lora_B["default"].weight.any() for layer in peft.base_model.registry.layers.values())
    randomise(peft)
    assert not torch.allclose(logits(peft), wanted, rtol=0, atol=1e-3)
    assert torch.equal(logits(peft.unload()), wanted)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@each
def test_saved_as_plain_lora(scheme, tmp_path):
    peft = begun(scheme)
    randomise(peft)
    peft.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(peft), rtol=0, atol=1e-5)


@each
def test_it_steps_downhill(scheme):
    peft = begun(scheme)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    ids = batches()[0]
    losses = []
    for _ in range(4):
        loss = peft(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3


@each
def test_conv1d_is_read_the_right_way_round(scheme):
    """The same weights in an nn.Linear give the same factors."""
    model = tiny()

    other = copy.deepcopy(model)
    for layer in other.layers:
        twin = nn.Linear(8, 12)
        twin.weight = nn.Parameter(layer.c_fc.weight.detach().T.clone())
        twin.bias = nn.Parameter(layer.c_fc.bias.detach().clone())
        layer.c_fc = twin
    found = []
    for base in (model, other):
        data = batches()
        settings = config(scheme, target_modules=["c_fc"])

        def go(base=base, data=data):
            for ids in data:
                out = base(ids)
                if scheme == "lora_ga":
                    out.logsumexp(-1).sum().backward()

        gather(scheme, base, settings, go=go)
        found.append(get_peft_model(base, settings).base_model.registry.layers)
    assert isinstance(model.layers[0].c_fc.base_layer, Conv1D)
    for path, layer in found[0].items():
        for one, two in zip(layer.blocks("default"), found[1][path].blocks("default"), strict=True):
            torch.testing.assert_close(one.delta(), two.delta(), rtol=0, atol=1e-6)


# ---- what is kept, and how long -----------------------------------------------------------------------------


@each
def test_used_up_by_the_adapter_that_begins_from_it(scheme):
    model = tiny_llama()
    settings = gather(scheme, model)
    assert len(kept(model, scheme)) == 8
    twin = copy.deepcopy(model)  # which has it too
    assert not any("gathered" in key for key in model.state_dict())
    get_peft_model(model, settings)
    assert kept(model, scheme) == []
    assert not any("_lorakit_gathered" in module.__dict__ for module in model.modules())
    get_peft_model(twin, settings)
    with pytest.raises(PlanError, match=r"q_proj: .*nothing was gathered.*call preprocess_"):
        get_peft_model(tiny_llama(), settings)


def test_kept_for_good_on_request():
    model = tiny_llama()
    settings = gather("corda", model, config("corda", prune_temporary_fields=False))
    peft = get_peft_model(model, settings)
    first = (
        peft.base_model.registry.layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.clone()
    )
    peft.add_adapter("again", settings)
    again = peft.base_model.registry.layers["model.layers.0.self_attn.q_proj"].lora_A["again"].weight
    assert torch.equal(first, again)


@each
def test_a_refused_adapter_uses_nothing_up(scheme):
    model = tiny_llama()
    settings = gather(scheme, model)
    with pytest.raises(PlanError):
        get_peft_model(model, config(scheme, target_modules=["q_proj", "nope"]))
    assert len(kept(model, scheme)) == 8
    get_peft_model(model, settings)


@each
def test_beside_another_adapter(scheme):
    """The unmerged weight is read, and the other adapter acts in what the layers are given."""
    peft = with_adapter(tiny_llama(), "first", target_modules=["q_proj"])
    with torch.no_grad():
        wanted = peft(batches()[0]).logits
    settings = gather(scheme, peft, go=lambda: (run if scheme == "corda" else step)(peft))
    peft.add_adapter("second", settings)
    for path, layer in peft.base_model.registry.layers.items():
        assert layer.lora_A["second"].weight.any(), path
    peft.set_adapter(["first", "second"])
    with torch.no_grad():
        torch.testing.assert_close(peft(batches()[0]).logits, wanted, rtol=0, atol=1e-6)


# ---- what the layers see ---------------------------------------------------------------------------------------


def covariances_of(model, path, data):
    """The mean over calls of x^T x, each x divided by its largest entry."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run(model, data)
    hook.remove()
    parts = [x.double().flatten(0, -2) / x.double().max().abs() for x in seen]
    return torch.stack([x.T @ x for x in parts]).mean(dim=0)


@pytest.mark.parametrize(("half", "bound"), [(False, 1e-5), (True, 5e-3)])
def test_covariances_are_means_over_calls(half, bound, tmp_path):
    model, data = tiny_llama(), batches(5)
    file = tmp_path / "deeper" / "covariance"
    settings = config("corda", covariance_file=str(file), use_float16_for_covariance=half)
    preprocess_corda(model, settings, lambda: run(model, data))
    found = read_cache(file)
    assert len(found) == 8
    for path in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        wanted = covariances_of(tiny_llama(), path, data)
        assert found[path].dtype == (torch.float16 if half else torch.float32)
        assert float((found[path].double() - wanted).norm() / wanted.norm()) < bound
    q, k = (found[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert torch.equal(q, k)
    assert file.stat().st_size < 1.1 * 2 * (16**2 + 24**2) * (2 if half else 4) + 2000  # once for q, k, v


def gradient_of(path, data):
    model = tiny_llama().train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    step(model, data)
    return model.get_submodule(path).weight.grad / len(data)


@pytest.mark.parametrize("sketched", [False, True])
def test_gradients_are_means_over_backwards(sketched, monkeypatch):
    if sketched:
        monkeypatch.setattr(lora_ga, "LARGEST_WHOLE", 0)
        monkeypatch.setattr(
            lora_ga,
            "new_gradient_sum",
            lambda out, inner, r, device, draw: lora_ga.SketchedGradient(out, inner, device, 2 * r, draw),
        )
        monkeypatch.setattr("lorakit.calibration.lora_ga.new_gradient_sum", lora_ga.new_gradient_sum)
    model, data = tiny_llama(), batches(3)
    gather("lora_ga", model, go=lambda: step(model, data))
    for path in kept(model, "lora_ga"):
        svd = gathered(model.get_submodule(path), "lora_ga").gradient
        G = gradient_of(path, data)
        wanted = torch.linalg.svd(G, full_matrices=False)
        # 8 of 16 triplets; the sketch is 17 wide, which is all of it
        torch.testing.assert_close(svd.S, wanted.S[:8], rtol=1e-3, atol=1e-7)
        closeness = (svd.Vh[:4] * wanted.Vh[:4]).sum(dim=1).abs()
        assert float(closeness.min()) > 0.99


def test_half_precision_gradients_are_summed_in_float32():
    model, data = tiny_llama().bfloat16(), batches(3)
    gather("lora_ga", model, go=lambda: step(model, data))
    path = "model.layers.1.mlp.down_proj"
    svd = gathered(model.get_submodule(path), "lora_ga").gradient
    assert svd.U.dtype == torch.float32
    torch.testing.assert_close(svd.S[:2], torch.linalg.svdvals(gradient_of(path, data))[:2], rtol=0.1, atol=0)


def test_gradient_checkpointing_changes_nothing():
    class Deep(nn.Module):
        def __init__(self, saved):
            super().__init__()
            self.first, self.second, self.saved = nn.Linear(8, 8), nn.Linear(8, 8), saved

        def inner(self, x):
            h = self.first(x)
            h += 1.0  # written into
            return self.second(torch.tanh(h))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if self.saved else self.inner(x)

    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for saved in (False, True):
        torch.manual_seed(1)
        model = Deep(saved)
        settings = config("lora_ga", target_modules=["first", "second"])
        preprocess_loraga(model, settings, lambda model=model: model(x).square().sum().backward())
        found.append(gathered(model.first, "lora_ga").gradient)
    torch.testing.assert_close(found[0].S, found[1].S)
    assert float(found[0].S[0]) > 0.1


def test_another_model_may_be_run():
    model, twin = tiny_llama(), tiny_llama()
    settings = config("corda")
    preprocess_corda(model, settings, lambda: run(twin), hooked_model=twin)
    assert kept(twin, "corda") == []
    other = begun("corda")
    peft = get_peft_model(model, settings)
    assert torch.equal(logits(peft), logits(other))


# ---- the model afterwards ------------------------------------------------------------------------------------


@contextmanager
def unchanged(model):
    """The model, its gradients and torch's generator are what they were."""
    before, generator = Snapshot(model), torch.get_rng_state()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    yield
    before.assert_same(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())


class Stop(Exception):
    pass


def prepared():
    """Modes, flags and a gradient that are not the usual ones; a buffer that training changes."""
    model = tiny_llama()
    model.counting = nn.BatchNorm1d(3)
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad = False
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


@each
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_alone(scheme, fails):
    model = prepared()

    def go():
        (run if scheme == "corda" else step)(model, batches(2))
        model.counting(torch.rand(4, 3))
        if fails:
            raise Stop

    if fails:
        with unchanged(model), pytest.raises(Stop):
            gather(scheme, model, go=go)
        assert kept(model, scheme) == []
        return
    before = Snapshot(model)
    generator = torch.get_rng_state()
    grad = model.lm_head.weight.grad
    gather(scheme, model, go=go)
    assert [key for key in before.differences(Snapshot(model)) if not key.startswith("attributes")] == []
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.lm_head.weight.grad is grad
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "lm_head.weight"
    ]


# ---- files -----------------------------------------------------------------------------------------------------


def settings_with_cache(scheme, path):
    return (
        (config(scheme, cache_file=str(path)), {})
        if scheme == "corda"
        else (config(scheme), {"cache_file": path})
    )


def never():
    raise AssertionError("it was run though there is a file")


@each
def test_a_cache_takes_the_place_of_the_run(scheme, tmp_path):
    settings, arguments = settings_with_cache(scheme, tmp_path / "new" / "cache")
    first = begun(scheme, settings=settings, **arguments)
    second = begun(scheme, settings=settings, go=never, **arguments)
    for path, layer in first.base_model.registry.layers.items():
        other = second.base_model.registry.layers[path]
        assert torch.equal(layer.lora_A["default"].weight, other.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"].weight, other.lora_B["default"].weight)
    assert [item.name for item in (tmp_path / "new").iterdir()] == ["cache"]


def test_a_covariance_file_takes_the_place_of_the_run(tmp_path):
    file = str(tmp_path / "covariance")
    first = begun("corda", settings=config("corda", covariance_file=file))
    fewer = config("corda", covariance_file=file, corda_method="ipm", target_modules=["q_proj"])
    model = tiny_llama()
    preprocess_corda(model, fewer)
    second = get_peft_model(model, fewer)
    path = "model.layers.1.self_attn.q_proj"
    one, two = (peft.base_model.registry.layers[path].lora_A["default"].weight for peft in (first, second))
    assert torch.equal(one, two)


@each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, r"wrong shape: model.layers.0.self_attn.q_proj.*found .* expected"),
        ({"target_modules": ["o_proj"]}, r"missing: model.layers.0.self_attn.o_proj"),
    ],
)
def test_a_cache_for_something_else_is_refused(scheme, changes, message, tmp_path):
    settings, arguments = settings_with_cache(scheme, tmp_path / "cache")
    gather(scheme, tiny_llama(), settings, **arguments)
    model = tiny_llama()
    other = config(
        scheme, **changes, **({"cache_file": str(tmp_path / "cache")} if scheme == "corda" else {})
    )
    with unchanged(model), pytest.raises(KeyMismatchError, match=message):
        gather(scheme, model, other, go=never, **arguments)


def test_a_covariance_file_for_something_else_is_refused(tmp_path):
    file = str(tmp_path / "covariance")
    write_cache(file, {"model.layers.0.self_attn.q_proj": torch.eye(3)})
    settings = config("corda", covariance_file=file, target_modules=["q_proj"])
    with pytest.raises(
        KeyMismatchError, match=r"(?s)missing: model.layers.1.*found \(3, 3\), expected \(16, 16\)"
    ):
        gather("corda", tiny_llama(), settings, go=never)


BAD_FILES = {
    "no file of tensors": b"this is none",
    "a pickle of something else": None,
    "cut off": b"PK\x03\x04 and then nothing",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_what_is_no_cache_is_refused(what, tmp_path):
    file = tmp_path / "cache"
    if BAD_FILES[what] is None:
        torch.save([1, 2, 3], file)
    else:
        file.write_bytes(BAD_FILES[what])
    with pytest.raises(AdapterFormatError, match=str(file)):
        read_cache(file)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Evil()}, tmp_path / "cache")
    with pytest.raises(AdapterFormatError, match="no file of tensors"):
        read_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("value", "error"),
    [(torch.tensor([1.0, float("nan")]), NonFiniteError), (torch.arange(3), AdapterFormatError)],
)
def test_tensors_that_are_no_numbers_are_refused(value, error, tmp_path):
    torch.save({"fine": torch.ones(2), "layer.x": value}, tmp_path / "cache")
    with pytest.raises(error, match=r"- layer\.x"):
        read_cache(tmp_path / "cache")


def test_what_is_written_is_read_whatever_its_strides(tmp_path):
    wide = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    tensors = {"cut": wide[:, :7], "turned": wide.T, "half": wide.half(), "again": wide, "same": wide}
    write_cache(tmp_path / "cache", tensors)
    found = read_cache(tmp_path / "cache")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "cache"
    write_cache(file, {"x": torch.ones(3)})

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches, "write_all", full)
    with pytest.raises(OSError, match="No space"):
        write_cache(file, {"x": torch.zeros(3)})
    assert torch.equal(read_cache(file)["x"], torch.ones(3))
    assert [item.name for item in tmp_path.iterdir()] == ["cache"]


# ---- refusals ------------------------------------------------------------------------------------------------


def nan_inside():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    return model


def nan_weight():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = float("nan")
    return model


REFUSED = {
    "corda: no data": ("corda", tiny_llama, {}, {"go": None}, ConfigError, "run_model: None"),
    "corda: not called": ("corda", tiny_llama, {}, {"go": lambda: None}, PlanError, "q_proj: run_model did not call it"),
    "corda: NaN": ("corda", nan_inside, {}, {}, NonFiniteError, r"layers\.1\.self_attn\.q_proj: the input"),
    "corda: NaN weight": (
        "corda", nan_weight, {"target_modules": ["layers.1.self_attn.o_proj"]}, {}, NonFiniteError, r"o_proj: ",
    ),
    "corda: rank": ("corda", tiny_llama, {"r": 17}, {}, PlanError, "rank 16 at the most, got 17"),
    "lora_ga: no options": ("lora_ga", tiny_llama, {"lora_ga_config": None}, {}, ConfigError, "lora_ga_config: None"),
    "lora_ga: not called": ("lora_ga", tiny_llama, {}, {"go": lambda: None}, PlanError, "q_proj: train_step gave it no"),
    "lora_ga: NaN": ("lora_ga", nan_inside, {}, {}, NonFiniteError, r"q_proj: the gradient holds NaN"),
    "lora_ga: rank": ("lora_ga", tiny_llama, {"r": 9}, {}, PlanError, "2 r = 18 singular vectors"),
    "corda: embedding": ("corda", tiny_llama, {"target_modules": ["embed_tokens"]}, {}, UnsupportedError, "embed_tokens: is no linear"),
    "lora_ga: embedding": ("lora_ga", tiny_llama, {"target_modules": ["embed_tokens"]}, {}, UnsupportedError, "embed_tokens: is no linear"),
    "corda: no target": ("corda", tiny_llama, {"target_modules": ["nope"]}, {}, PlanError, "nope"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    scheme, make, fields, arguments, error, message = REFUSED[case]
    model, arguments = make(), dict(arguments)
    with unchanged(model), pytest.raises(error, match=message):
        gather(scheme, model, config(scheme, **fields), **arguments)


@each
def test_other_layers_are_refused_while_planning(scheme):
    model = tiny_llama()
    settings = config(scheme, target_modules=["q_proj", "embed_tokens"])
    gather(scheme, model, config(scheme, target_modules=["q_proj"]))
    with pytest.raises(
        PlanError, match=f"embed_tokens: init_lora_weights='{scheme}' begins linear layers only"
    ):
        get_peft_model(model, settings)


@each
def test_another_rank_than_was_gathered_is_refused_while_planning(scheme):
    model = tiny_llama()
    gather(scheme, model)
    with pytest.raises(PlanError, match=r"q_proj: what preprocess_\w+ gathered is for"):
        get_peft_model(model, config(scheme, r=5))


def test_an_overflow_in_half_precision_is_said():
    """A mean over calls stays as large as one of them, but a call of 70,000 rows of ones is too much."""
    model = nn.Sequential(nn.Linear(4, 4))
    settings = config("corda", target_modules=["0"], use_float16_for_covariance=True)
    with pytest.raises(NonFiniteError, match="0: the covariance has overflowed; leave use_float16"):
        preprocess_corda(model, settings, lambda: model(torch.ones(70_000, 4)))


def test_a_progress_bar_if_verbose(capsys):
    begun("corda", settings=config("corda", verbose=True))
    assert "CorDA" in capsys.readouterr().err
    begun("corda")
    assert capsys.readouterr().err == ""
