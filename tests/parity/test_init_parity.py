"""Initialisers that look at the weight against PEFT: the same adapters up to sign, the same training.

Where PEFT does otherwise, and a test here says so:
- PiSSA and OLoRA write what is left into the base. Here the base keeps its weight, and the adapter takes the part off.
- OLoRA of a `Conv1D` decomposes the weight the wrong way round, and the adapter then does not fit its layer.
- `pissa_niter_N` is a random sketch, off by more than the whole decomposition that lorakit gives for it.
- LoftQ moves to CUDA whatever there is, and its factors do not know of the scaling. Its own functions run here with
  "cpu" in the place of "cuda".
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorakit
from lorakit.init import initialise
from models import spec_of
from parity.models import NAMED_WARNINGS, adapter_parameters, build, loss_of, output_of, peft

pytestmark = NAMED_WARNINGS

TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "intermediate.dense"],
}


def both(kind, init, dtype=torch.float32, **fields):
    """Ours and PEFT's adapter on equal bases."""
    fields = {
        "r": 6,
        "lora_alpha": 15,
        "target_modules": TARGETS[kind],
        "fan_in_fan_out": kind == "gpt2",
        "init_lora_weights": init,
        **fields,
    }
    ours = lorakit.get_peft_model(build(kind, dtype), lorakit.LoraConfig(**fields))
    return ours, peft.get_peft_model(build(kind, dtype), peft.LoraConfig(**fields))


def layers(model):
    """By path."""
    inner = model.base_model.model
    return {name: module for name, module in inner.named_modules() if hasattr(module, "base_layer")}


def factors(layer):
    if "default" in layer.lora_A:
        found = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    else:
        found = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return [factor.detach().double() for factor in found]


def delta(layer):
    A, B = factors(layer)
    return layer.scaling["default"] * (B @ A)


def same_up_to_sign(ours, theirs, tolerance):
    """Columns of B, and rows of A with them; equal singular values would leave more open."""
    (A, B), (other_A, other_B) = ours, theirs
    signs = (B * other_B).sum(dim=0).sign()
    assert (signs != 0).all()
    assert (B * signs - other_B).norm() <= tolerance * other_B.norm()
    assert (A * signs[:, None] - other_A).norm() <= tolerance * max(other_A.norm(), 1e-9)


# ---- PiSSA, OLoRA, MiCA -----------------------------------------------------------------------------------

SCHEMES = [
    *(
        (kind, "pissa", options)
        for kind in TARGETS
        for options in ({}, {"use_rslora": True}, {"lora_alpha": 3})
    ),
    *((kind, "olora", options) for kind in ("llama", "bert") for options in ({}, {"lora_alpha": 3})),
    *((kind, "mica", options) for kind in TARGETS for options in ({}, {"lora_alpha": 3})),
    ("llama", "mica", {"target_modules": ["embed_tokens", "q_proj"]}),
]
schemes = pytest.mark.parametrize(("kind", "init", "options"), SCHEMES, ids=str)


@schemes
def test_the_same_factors_and_the_same_outputs(kind, init, options):
    ours, theirs = both(kind, init, **options)
    mine, other = layers(ours), layers(theirs)
    assert mine.keys() == other.keys()
    for path, layer in mine.items():
        # neighbours among the smallest singular values are close: PEFT's float32 tells them apart to 1e-3
        same_up_to_sign(factors(layer), factors(other[path]), 3e-3 if init == "mica" else 1e-4)
    with torch.no_grad():
        wanted = output_of(build(kind), kind)
        assert (output_of(ours, kind) - wanted).abs().max() <= 1e-5
        assert (output_of(theirs, kind) - wanted).abs().max() <= 1e-5


@schemes
def test_what_peft_takes_off_the_base_is_taken_off_beside_it(kind, init, options):
    ours, theirs = both(kind, init, **options)
    for path, layer in layers(ours).items():
        before = build(kind).get_submodule(path).weight
        assert torch.equal(layer.get_base_layer().weight, before)
        taken = (before - layers(theirs)[path].get_base_layer().weight).detach().double()
        if init == "mica":
            assert not taken.any()
            assert layer.lora_offset is None
            continue
        assert (delta(layer) - (taken.T if kind == "gpt2" else taken)).norm() <= 1e-4 * taken.norm()


@schemes
def test_the_same_training(kind, init, options):
    """Signs make no difference to the loss, nor to Adam."""
    ours, theirs = both(kind, init, **options)
    trained = [adapter_parameters(model) for model in (ours, theirs)]
    assert trained[0].keys() == trained[1].keys()
    assert init != "mica" or not any("lora_B" in name or "embedding_B" in name for name in trained[0])
    curves = []
    for model, parameters in zip((ours, theirs), trained, strict=True):
        optimiser = torch.optim.Adam(parameters.values(), lr=3e-2)
        curve = []
        for _ in range(5):
            loss = loss_of(model, kind)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=2e-4)
    assert curves[0][-1] < curves[0][0] - 5e-4


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_a_bf16_base_begins_from_the_same_numbers(init):
    ours, theirs = both("llama", init, torch.bfloat16)
    other = layers(theirs)
    for path, layer in layers(ours).items():
        same_up_to_sign(factors(layer), factors(other[path]), 1e-2)  # PEFT rounds them to bf16 on the way
    with torch.no_grad():
        wanted = output_of(build("llama", torch.bfloat16), "llama").float()
        errors = [
            (output_of(model, "llama").float() - wanted).norm() / wanted.norm() for model in (ours, theirs)
        ]
    assert errors[0] <= 0.02
    assert errors[0] <= 2 * errors[1] + 1e-3  # PEFT rounds what is left of the base to bf16 again


def test_olora_of_a_conv1d():
    ours, _ = both("gpt2", "olora", target_modules=["attn.c_proj"])  # square: PEFT's own does not raise
    for path, layer in layers(ours).items():
        Q, R = torch.linalg.qr(build("gpt2").get_submodule(path).weight.detach().double().T)
        A, B = factors(layer)
        assert (B - Q[:, :6]).norm() <= 1e-5 * B.norm()
        assert (A - R[:6]).norm() <= 1e-5 * A.norm()
    broken = peft.LoraConfig(target_modules=["c_fc"], init_lora_weights="olora", fan_in_fan_out=True)
    with pytest.raises(RuntimeError):
        output_of(peft.get_peft_model(build("gpt2"), broken), "gpt2")


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_pissa_niter_is_no_further_from_the_best(steps):
    torch.manual_seed(3)
    ours, theirs = both("llama", f"pissa_niter_{steps}")
    exact, _ = both("llama", "pissa")
    apart = []
    for model in (ours, theirs):
        wanted = {path: delta(layer) for path, layer in layers(exact).items()}
        found = {path: delta(layer) for path, layer in layers(model).items()}
        apart.append(max((found[path] - wanted[path]).norm() / wanted[path].norm() for path in wanted))
    assert apart[0] <= min(1e-6, apart[1])


def test_mica_is_refused_where_peft_refuses():
    config = {"r": 33, "target_modules": ["q_proj"], "init_lora_weights": "mica"}
    with pytest.raises(ValueError, match="max usable r is 32"):
        peft.get_peft_model(build("llama"), peft.LoraConfig(**config))
    with pytest.raises(lorakit.PlanError, match="which has rank 32 at the most, got 33"):
        lorakit.get_peft_model(build("llama"), lorakit.LoraConfig(**config))


# ---- LoftQ ------------------------------------------------------------------------------------------------


def on_cpu(function):
    """A function of PEFT's with "cpu" in the place of "cuda"."""
    source = inspect.getsource(function)
    assert source.count('"cuda"') == 1
    names = {**inspect.unwrap(function).__globals__, "is_xpu_available": lambda: False}
    exec(source.replace('"cuda"', '"cpu"'), names)
    return names[function.__name__]


def fitted(W, bits, steps, r):
    spec = spec_of(tuple(W.shape), r=r, alpha=r, init="loftq")
    spec = replace(spec, init_options=lorakit.LoftQConfig(bits, steps))
    (result,) = initialise(spec, lambda dtype: W.to(dtype, copy=True))
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape", [(128, 192), (192, 128)], ids=str)
def test_loftq_is_as_close_to_the_weight(bits, steps, shape):
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    Q, A, B = on_cpu(peft.utils.loftq_utils.loftq_init)(W, num_bits=bits, reduced_rank=8, num_iter=steps)
    ours = fitted(W, bits, steps, 8)
    errors = [
        (W.double() - q.double() - change).norm().item()
        for q, change in ((ours.base_weight, ours.factors.delta(torch.float64)), (Q, B.double() @ A.double()))
    ]
    # int8 is rounded from float16 by bitsandbytes, and a step that begins elsewhere ends elsewhere: chance of both signs
    assert errors[0] <= errors[1] * (1 + (1e-4 if bits == 4 and steps == 1 else 5e-3))
    if bits == 4 and steps == 1:
        assert torch.equal(ours.base_weight, Q)
        assert (ours.factors.delta() - B @ A).norm() <= 3e-2 * (B @ A).norm()
        assert torch.allclose(ours.factors.A.norm(dim=1), A.norm(dim=1), rtol=1e-2)  # S shared alike


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_replace_lora_weights_loftq_gives_the_same(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    fields = {"r": 6, "lora_alpha": 6, "target_modules": TARGETS["llama"]}
    models = [
        library.get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings),
            library.LoraConfig(**fields),
        )
        for library in (lorakit, peft)
    ]
    monkeypatch.setattr(
        peft.utils.loftq_utils, "_loftq_init_new", on_cpu(peft.utils.loftq_utils._loftq_init_new)
    )
    seen = {lorakit: [], peft: []}
    for library, model in zip((lorakit, peft), models, strict=True):
        library.replace_lora_weights_loftq(
            model, str(tmp_path), callback=lambda _, name, own=library: seen[own].append(name) or True
        )
    assert seen[lorakit] == seen[peft] == list(layers(models[0]))
    others = layers(models[1])
    for path, layer in layers(models[0]).items():
        assert (delta(layer) - delta(others[path])).norm() <= 1e-5 * delta(layer).norm()
