"""`replace_lora_weights_loftq` on bases that real libraries quantised, with the original weights in files or at hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, get_peft_model
from lorakit.checkpoint import model_files
from lorakit.errors import (
    AdapterFormatError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterStateError,
    KeyMismatchError,
    NonFiniteError,
    UnsupportedError,
)
from lorakit.loftq import replace_lora_weights_loftq
from models import bits, ids, tiny_llama
from quantised import BY_NAME

bnb = pytest.importorskip("bitsandbytes")
LAYERS = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def quantised(kind="nf4"):
    """A model whose blocks are quantised, and the weights that it had."""
    torch.manual_seed(0)
    model = Model()
    originals = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    for block in model.layers:
        for name in ("up", "down"):
            plain = copy.deepcopy(getattr(block, name)).requires_grad_(False)
            setattr(block, name, BY_NAME[kind].quantised(plain))
    return model, originals


def adapted(kind="nf4", targets=("up", "down"), **changes):
    model, originals = quantised(kind)
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": list(targets), **changes})
    return get_peft_model(model, config), originals


def layer_of(peft, path):
    return peft.base_model.model.get_submodule(path)


def state(peft, name="default"):
    return [bits(item.tensor) for item in peft.base_model.registry.tensors(name)]


def dequantised(layer):
    return layer.read_weight(torch.float64)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "hqq-4"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_best_fit_of_what_was_lost(kind, use_rslora, capsys):
    peft, originals = adapted(kind, use_rslora=use_rslora)
    x = torch.randn(16, 64)
    full = Model()
    full.load_state_dict(originals)
    with torch.no_grad():
        wanted, plain = full(x), peft(x)
        errors = replace_lora_weights_loftq(peft, originals)
        now = peft(x)
    assert tuple(errors) == LAYERS
    for path, misfit in errors.items():
        layer, W = layer_of(peft, path), originals[f"{path}.weight"].double()
        lost = W - dequantised(layer)
        U, S, Vh = torch.linalg.svd(lost)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        delta = layer.get_delta_weight("default").double()
        assert (lost - delta).norm() <= (lost - best).norm() * (1 + 1e-4)
        assert misfit == pytest.approx([matrix.norm().item() for matrix in (W, lost, lost - delta)], rel=1e-4)
    assert (now - wanted).norm() < (plain - wanted).norm()
    printed = capsys.readouterr().out
    assert all(f"{path}: {misfit}" in printed for path, misfit in errors.items())


def test_a_second_adapter_and_an_optimiser_keep_what_they_have():
    peft, originals = adapted()
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    parameters = {item.file_name: item.tensor for item in peft.base_model.registry.tensors("default")}
    before, flags = state(peft), [tensor.requires_grad for tensor in parameters.values()]
    other = state(peft, "other")
    replace_lora_weights_loftq(peft, originals, adapter_name="default")
    assert state(peft, "other") == other
    assert state(peft) != before
    after = {item.file_name: item.tensor for item in peft.base_model.registry.tensors("default")}
    assert all(after[name] is tensor for name, tensor in parameters.items())
    assert [tensor.requires_grad for tensor in after.values()] == flags
    peft(torch.randn(2, 64)).sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in parameters.values())


def test_layers_that_are_not_quantised_are_passed_over():
    peft, originals = adapted(targets=("up", "head"))
    head = bits(layer_of(peft, "head").lora_A["default"].weight)
    errors = replace_lora_weights_loftq(peft, originals)
    assert tuple(errors) == ("layers.0.up", "layers.1.up")
    assert bits(layer_of(peft, "head").lora_A["default"].weight) == head


# ---- where the weights come from --------------------------------------------------------------------------


def sharded(folder, tensors):
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / model_files.INDEX).write_text(json.dumps(index))


def single(folder, tensors):
    save_file(tensors, folder / model_files.SINGLE)


@pytest.mark.parametrize("write", [single, sharded])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["same names", "with the base's prefix"])
@pytest.mark.parametrize("place", ["folder", "file", "config"])
def test_files_give_the_same_as_tensors(tmp_path, write, prefix, place, monkeypatch):
    peft, originals = adapted()
    expected = replace_lora_weights_loftq(peft, originals), state(peft)
    peft, originals = adapted()
    write(tmp_path, {prefix + name: tensor for name, tensor in originals.items()})
    file = tmp_path / (model_files.SINGLE if write is single else model_files.INDEX)
    given = {"folder": str(tmp_path), "file": file, "config": None}[place]
    if place == "config":
        peft.base_model.model.config = type("Config", (), {"_name_or_path": str(tmp_path)})()
    assert (replace_lora_weights_loftq(peft, given), state(peft)) == expected


def test_a_file_without_the_base_models_prefix():
    class Outer(nn.Module):
        base_model_prefix = "model"

        def __init__(self, model):
            super().__init__()
            self.model = model

    model, originals = quantised()
    peft = get_peft_model(Outer(model), LoraConfig(target_modules=["up"]))
    assert tuple(replace_lora_weights_loftq(peft, originals)) == ("model.layers.0.up", "model.layers.1.up")


def test_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    peft, originals = adapted()
    sharded(tmp_path, originals)
    order = []
    read = model_files.ModelFiles.read
    monkeypatch.setattr(
        model_files.ModelFiles, "read", lambda self, name: (order.append(name), read(self, name))[1]
    )

    def callback(_model, path):
        order.append(path)
        return True

    replace_lora_weights_loftq(peft, tmp_path, callback=callback)
    assert order == [entry for path in LAYERS for entry in (f"{path}.weight", path)]


def test_a_conv1d_that_transformers_quantised_is_read_the_other_way_round():
    peft, originals = adapted(targets=("up",))
    expected = replace_lora_weights_loftq(peft, originals)
    peft, originals = adapted(targets=("up",))
    for path in LAYERS[::2]:
        layer_of(peft, path).get_base_layer().source_cls = Conv1D
        originals[f"{path}.weight"] = originals[f"{path}.weight"].T.contiguous()
    found = replace_lora_weights_loftq(peft, originals)
    assert {path: pytest.approx(misfit, rel=1e-6) for path, misfit in found.items()} == expected


@pytest.mark.parametrize("whole", [True, False], ids=["with head", "without head"])
def test_a_model_that_transformers_quantises(tmp_path, whole):
    """The place of its weights is known from its config."""
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    original = tiny_llama()
    original.save_pretrained(tmp_path)
    kind = AutoModelForCausalLM if whole else AutoModel
    base = kind.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(True, bnb_4bit_quant_type="nf4")
    )
    peft = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4))
    batch = ids()
    with torch.no_grad():
        wanted = (original if whole else original.model)(batch)[0]
        before = (peft(batch)[0] - wanted).norm()
        errors = replace_lora_weights_loftq(peft)
        assert (peft(batch)[0] - wanted).norm() < before
    assert len(errors) == 14
    assert all(misfit.after < 0.8 * misfit.before for misfit in errors.values())


# ---- callback ---------------------------------------------------------------------------------------------


def test_the_callback_decides_layer_by_layer(capsys):
    peft, originals = adapted()
    seen = []

    def callback(model, path):
        assert model is peft
        assert torch.is_grad_enabled()
        seen.append(path)
        return len(seen) % 2 == 0

    before = {path: bits(layer_of(peft, path).lora_A["default"].weight) for path in LAYERS}
    errors = replace_lora_weights_loftq(peft, originals, callback=callback)
    assert tuple(seen) == LAYERS
    assert tuple(errors) == LAYERS[1::2]
    for path in LAYERS:
        assert (bits(layer_of(peft, path).lora_A["default"].weight) == before[path]) == (path not in errors)
        assert layer_of(peft, path).lora_B["default"].weight.any() == (path in errors)
    assert f"{LAYERS[0]}: not wanted, left as it was" in capsys.readouterr().out


def test_an_exception_in_the_callback_undoes_all():
    peft, originals = adapted()
    before = state(peft)

    def callback(_model, path):
        if path == LAYERS[2]:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        replace_lora_weights_loftq(peft, originals, callback=callback)
    assert state(peft) == before


# ---- refusals ---------------------------------------------------------------------------------------------


def refuses(error, match, peft, *args, **kwargs):
    before = state(peft)
    with pytest.raises(error, match=match):
        replace_lora_weights_loftq(peft, *args, **kwargs)
    assert state(peft) == before


def test_a_base_that_is_not_quantised():
    peft = get_peft_model(Model(), LoraConfig(target_modules=["up"]))
    refuses(AdapterStateError, "none of the weights under adapter 'default' is quantised", peft, {})


def test_names():
    peft, originals = adapted()
    refuses(AdapterNameError, "no adapter named", peft, originals, adapter_name="other")
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        replace_lora_weights_loftq(Model(), originals)


def test_merged():
    peft, originals = adapted()
    peft.merge_adapter()
    refuses(AdapterStateError, "merged", peft, originals)


def test_missing_and_other_shapes_are_all_listed(tmp_path):
    peft, originals = adapted()
    del originals["layers.0.up.weight"], originals["layers.1.down.weight"]
    originals["layers.1.up.weight"] = torch.zeros(64, 96)
    single(tmp_path, originals)
    for given in (originals, tmp_path):
        refuses(
            KeyMismatchError,
            r"(?s)missing: layers\.0\.up\.weight.*missing: layers\.1\.down\.weight.*"
            r"layers\.1\.up\.weight: found \(64, 96\), expected \(96, 64\)",
            peft,
            given,
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value):
    peft, originals = adapted()
    originals["layers.1.down.weight"][3, 5] = value
    refuses(NonFiniteError, r"^layers\.1\.down: the original weight: NaN or infinity", peft, originals)


def test_originals_that_are_quantised_themselves():
    peft, originals = adapted()
    originals["layers.1.up.weight"] = originals["layers.1.up.weight"].to(torch.int8)
    refuses(AdapterFormatError, r"^layers\.1\.up: the original weight is torch\.int8", peft, originals)


def test_more_than_plain_lora():
    peft, originals = adapted()
    layer = layer_of(peft, LAYERS[0])
    layer.frozen["default"] = frozenset({"B"})
    refuses(UnsupportedError, rf"{LAYERS[0]}: its \['B'\] is never trained", peft, originals)
    del layer.frozen["default"]
    layer.set_scale("default", 0.0)
    refuses(UnsupportedError, rf"{LAYERS[0]}: its scaling is 0", peft, originals)


def test_files_that_are_not_there(tmp_path, monkeypatch):
    peft, originals = adapted()
    refuses(AdapterNotFoundError, "neither a safetensors file nor a folder", peft, tmp_path)
    refuses(AdapterNotFoundError, "neither a safetensors file nor a folder", peft, tmp_path / "none")
    refuses(AdapterStateError, "names no place of its weights; pass model_path", peft)
    peft.base_model.model.config = type("Config", (), {"_name_or_path": "nobody/nothing-of-this-name"})()
    refuses(AdapterNotFoundError, "neither a folder nor a model in the hub's cache", peft)
    sharded(tmp_path, originals)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuses(AdapterNotFoundError, "no such file, though the index names it", peft, tmp_path)


def test_files_that_are_damaged(tmp_path):
    peft, originals = adapted()
    (tmp_path / model_files.SINGLE).write_bytes(b"\0" * 40)
    refuses(AdapterFormatError, "copy or download it again", peft, tmp_path)
    (tmp_path / model_files.SINGLE).unlink()
    for content in ("[]", '{"weight_map": {"a": "../b"}}', '{"weight_map": 3}', "{}"):
        (tmp_path / model_files.INDEX).write_text(content)
        refuses(AdapterFormatError, "weight_map", peft, tmp_path)
    sharded(tmp_path, originals)
    wrong = {name: f"model-0000{n}-of-00002.safetensors" for name in originals for n in (1,)}
    (tmp_path / model_files.INDEX).write_text(json.dumps({"weight_map": wrong}))
    refuses(AdapterFormatError, "copy or download it again", peft, tmp_path)  # a tensor is in the other file
