"""Comparing files: what deltas say, however A and B are written, and what only one file has."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.oracle import KINDS, zoo
from lorakit import LoraConfig, diff, get_peft_model, resize
from lorakit.checkpoint.sites import read_source
from lorakit.errors import AdapterNotFoundError, UnsupportedError
from models import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")


def saved(folder, change=None, *, seed=0, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(zoo(), LoraConfig(**{"r": 4, "lora_alpha": 6.0, **fields}))
    randomise(peft, seed=seed)
    if change is not None:
        with torch.no_grad():
            change(peft.base_model.model)
    peft.save_pretrained(folder)
    return folder


def dense(folder):
    """Each weight's delta as one long vector."""
    sites = read_source(folder, instead="").sites
    return {
        path: torch.cat([block.delta(torch.float64).flatten() for block in site.blocks])
        for path, site in sites.items()
    }


@pytest.mark.parametrize("kind", ["matrices", "lookup", "groups", "attention", "biased factors"])
def test_against_dense(tmp_path, kind):
    fields = KINDS[kind][0]
    a = saved(tmp_path / "a", **fields)
    b = saved(tmp_path / "b", seed=1, **{**fields, "r": 6})
    found = diff(a, b)
    first, second = dense(a), dense(b)
    assert {layer.path for layer in found.layers} == set(first)
    for layer in found.layers:
        x, y = first[layer.path], second[layer.path]
        assert layer.norm_a == pytest.approx(float(x.norm()))
        assert layer.norm_b == pytest.approx(float(y.norm()))
        assert layer.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-12)
        assert layer.difference == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())))
        assert (layer.rank_a, layer.rank_b) == (4, 6)
        assert 0.0 <= layer.columns.overlap <= 1.0
        assert layer.rows.smallest <= layer.rows.largest <= 90.0
    x, y = (torch.cat(list(each.values())) for each in (first, second))
    assert found.difference == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())))
    assert found.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-12)
    assert [(field.field, field.a, field.b) for field in found.config] == [("r", 4, 6)]


def test_the_same_however_it_is_written(tmp_path):
    a = saved(tmp_path / "a", target_modules=["q", "conv"])
    resize(a, tmp_path / "b", rank=8)
    found = diff(a, tmp_path / "b")
    assert found.largest < 1e-12
    assert found.cosine == pytest.approx(1.0)
    assert all(layer.columns.overlap == pytest.approx(1.0) for layer in found.layers)
    same = diff(a, a)
    assert same.largest == same.difference == 0.0
    assert (same.config, same.only_a, same.only_b) == ((), (), ())


def test_opposite_and_zero(tmp_path):
    a = saved(tmp_path / "a", target_modules=["q", "c"])

    def turn(model):
        model.q.lora_B["default"].weight.neg_()
        model.c.lora_B["default"].weight.zero_()

    found = diff(a, saved(tmp_path / "b", turn, target_modules=["q", "c"]))
    c, q = found.layers
    assert (q.difference, q.cosine) == (pytest.approx(2.0), pytest.approx(-1.0))
    assert (c.difference, c.cosine, c.columns, c.rows) == (pytest.approx(1.0), None, None, None)


def test_what_only_one_has(tmp_path):
    a = saved(tmp_path / "a", target_modules=["q", "c"], modules_to_save=["norm"])
    b = saved(tmp_path / "b", target_modules=["q", "head"], trainable_token_indices={"embed": [4]})
    found = diff(a, b)
    assert [layer.path for layer in found.layers] == ["q"]
    assert found.only_a == ("c", "norm.bias", "norm.weight")
    assert found.only_b == ("head", "embed.token_adapter.trainable_tokens_delta[4]")
    first, second = dense(a), dense(b)
    apart = math.hypot(
        float((first["q"] - second["q"]).norm()), float(first["c"].norm()), float(second["head"].norm())
    )
    assert found.difference == pytest.approx(apart / max(found.norm_a, found.norm_b))
    assert found.largest == max(1.0, found.difference)


def test_whole_tensors_and_rows(tmp_path):
    fields = {
        "target_modules": ["q"],
        "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed": [4, 7]},
    }
    a = saved(tmp_path / "a", **fields)

    def change(model):
        model.norm.modules_to_save["default"].weight.mul_(3.0)

    found = diff(a, saved(tmp_path / "b", change, **fields))
    told = {tensor.name: tensor.difference for tensor in found.tensors}
    assert told["norm.weight"] == pytest.approx(2 / 3)
    assert told["norm.bias"] == told["embed.token_adapter.trainable_tokens_delta[7]"] == 0.0
    assert found.difference == 0.0
    assert found.largest == pytest.approx(2 / 3)


def test_weights_of_other_shapes_are_no_pair(tmp_path):
    a = saved(tmp_path / "a", target_modules=["q"])
    b = saved(tmp_path / "b", target_modules=["head"])
    tensors = load_file(b / "adapter_model.safetensors")
    save_file(
        {key.replace("head", "q"): tensor for key, tensor in tensors.items()}, b / "adapter_model.safetensors"
    )
    found = diff(a, b)
    assert found.layers == ()
    assert found.only_a == found.only_b == ("q",)


def test_what_cannot_be_compared(tmp_path):
    a = saved(tmp_path / "a", target_modules=["q"])
    with pytest.raises(AdapterNotFoundError):
        diff(a, tmp_path / "none")
    b = saved(tmp_path / "dora", target_modules=["q"], use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA is more than its factors"):
        diff(a, b)
