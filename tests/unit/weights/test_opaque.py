"""Layers of libraries that cannot be installed here, as stand-ins of the same names and attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import LoraConfig, PeftModel, PlanError, UnsupportedError, get_layer_status, get_peft_model
from lorakit.layers import kind_of
from lorakit.weights import find_codec
from lorakit.weights.opaque import BACKENDS, OpaqueCodec, backend_of
from models import Snapshot, randomise

OUT, IN = 6, 8


class Packed(nn.Module):
    """A linear layer that keeps its matrix as integers, and gives what it likes."""

    sizes = ("out_features", "in_features")

    def __init__(self):
        super().__init__()
        for name, size in zip(self.sizes, (OUT, IN), strict=True):
            setattr(self, name, size)
        codes = torch.randint(-7, 8, (IN, OUT), generator=torch.Generator().manual_seed(1))
        self.register_buffer("qweight", codes.to(torch.int32))
        self.register_buffer("scales", torch.full((OUT,), 0.1, dtype=torch.float16))
        self.register_buffer("bias", torch.ones(OUT, dtype=torch.float16))

    def forward(self, x):
        return (x @ (self.qweight * self.scales).to(x.dtype) + self.bias.to(x.dtype)).to(x.dtype)


class Fp8(nn.Linear):
    """One that comes from torch's and keeps its weight in another dtype."""

    def __init__(self):
        super().__init__(IN, OUT)
        scaled = self.weight.detach().to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(scaled, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class DenseLooking(nn.Linear):
    """One that holds floating-point numbers and multiplies by their signs."""

    def __init__(self):
        super().__init__(IN, OUT)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


def named(parent, package, name, **attributes):
    """A class as that package has it; layers are of a class of their own that comes from it."""
    base = type(name, (parent,), {"__module__": f"{package}.somewhere.linear", **attributes})
    return type(f"{name}Triton", (base,), {"__module__": f"{package}.kernels"})


def stand_in(package, name):
    parent = (
        DenseLooking
        if name in {"AutoBitLinear", "PatchedLinear"} or package == "transformer_engine"
        else Packed
    )
    old_names = {"sizes": ("outfeatures", "infeatures")} if package == "auto_gptq" else {}
    return named(parent, package, name, **old_names)


ROWS = [(stand_in(*key), backend) for key, backend in BACKENDS.items()]
each = pytest.mark.parametrize(
    ("kind", "backend"), ROWS, ids=[f"{package}-{name}" for package, name in BACKENDS]
)


def model(kind):
    torch.manual_seed(1)
    made = nn.Sequential()
    made.inner, made.head = kind(), nn.Linear(OUT, 3)
    return made


def with_adapter(kind, **changes):
    peft = get_peft_model(model(kind), LoraConfig(**{"r": 2, "target_modules": ["inner"], **changes}))
    randomise(peft)
    return peft


def inputs():
    return torch.randn(4, IN, generator=torch.Generator().manual_seed(2))


@each
def test_it_is_known_and_of_known_shape(kind, backend):
    base = kind()
    codec = find_codec(base)
    assert isinstance(codec, OpaqueCodec)
    assert not codec.can_read
    assert not codec.can_write
    assert backend_of(base) == backend
    assert codec.layout(base).shape == (OUT, IN)
    assert kind_of(base).is_linear


def test_a_linear_layer_with_a_weight_of_its_own_is_known_by_that():
    base = Fp8()
    assert backend_of(base) == "Fp8"
    assert isinstance(find_codec(base), OpaqueCodec)
    assert find_codec(base).dtype(base) == torch.float32


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), nn.LayerNorm(2), named(Packed, "mine", "QuantLinear")()],
    ids=["linear", "norm", "other"],
)
def test_others_are_none(module):
    assert backend_of(module) is None


def test_a_known_class_that_holds_plain_numbers_is_an_ordinary_linear_layer():
    """As transformers' `FP8Linear` does after it was dequantised."""
    base = named(nn.Linear, "transformers", "FP8Linear")(IN, OUT)
    assert find_codec(base).name == "dense"


def test_a_known_class_without_sizes_is_nobodys():
    base = named(nn.Identity, "gptqmodel", "BaseQuantLinear")()
    assert find_codec(base) is None
    with pytest.raises(PlanError, match="cannot adapt"):
        get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"]))


@each
def test_all_linear_finds_it(kind, backend):
    peft = get_peft_model(model(kind), LoraConfig(r=2, target_modules="all-linear"))
    assert set(peft.peft_config["default"].target_modules) == {"inner", "head"}


@each
def test_it_trains_and_infers(kind, backend):
    peft = with_adapter(kind)
    layer, x = peft.base_model.model.inner, inputs().requires_grad_()
    assert layer.lora_A["default"].weight.dtype == torch.float32
    found = layer(x)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = layer.base_layer(x) + layer.scaling["default"] * (x @ A.T @ B.T)
    torch.testing.assert_close(found, wanted)
    mine = torch.autograd.grad(found.square().sum(), [A, B, x])
    theirs = torch.autograd.grad(wanted.square().sum(), [A, B, x])
    for got, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    with peft.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    status = {row.name.rpartition(".")[2]: row for row in get_layer_status(peft)}
    assert status["inner"].quantization_backend == "opaque"


@each
def test_mixed_batches(kind, backend):
    peft = with_adapter(kind)
    peft.add_adapter("other", LoraConfig(r=3, target_modules=["inner"]))
    randomise(peft, "other", seed=5)
    x, names = inputs(), ["default", "other", "__base__", "default"]
    with torch.no_grad():
        mixed = peft.eval()(x, adapter_names=names)
        for row, name in enumerate(names):
            alone = peft(x[row : row + 1], adapter_names=[name])
            torch.testing.assert_close(mixed[row : row + 1], alone)


@each
@pytest.mark.parametrize("options", [{}, {"force": True}, {"dequantize": True}], ids=str)
def test_merging_is_refused_by_name(kind, backend, options):
    peft = with_adapter(kind, target_modules=["inner", "head"])
    before = Snapshot(peft)
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(UnsupportedError, match=f"inner: .*{backend}.*full precision"):
            merge(**options)
        before.assert_same(peft)


def test_reading_and_writing_are_refused():
    base = stand_in("gptqmodel", "BaseQuantLinear")()
    codec = find_codec(base)
    state = codec.state(base)
    calls = (
        lambda: codec.read(base, torch.float32),
        lambda: codec.encode(base, torch.zeros(OUT, IN)),
        lambda: codec.merged(base, state, []),
        lambda: codec.swap(base, state),
    )
    for call in calls:
        with pytest.raises(UnsupportedError, match="GPTQ"):
            call()


@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}], ids=str
)
def test_what_looks_at_the_weight_is_refused_while_planning(changes):
    made = model(stand_in("gptqmodel", "BaseQuantLinear"))
    before = Snapshot(made)
    with pytest.raises(PlanError, match=r"inner: .*needs to know the weight"):
        get_peft_model(made, LoraConfig(r=2, target_modules=["inner"], **changes))
    before.assert_same(made)


@each
def test_it_is_taken_off_and_files_are_alike(kind, backend, tmp_path):
    peft = with_adapter(kind)
    base = peft.base_model.model.inner.base_layer
    wanted = peft.eval()(inputs())
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model(kind), tmp_path)
    torch.testing.assert_close(again(inputs()), wanted, rtol=0, atol=0)
    assert peft.unload().inner is base
