"""Schemes that look at the weight, on a model with every kind of layer: what they promise holds from end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from lorakit.errors import NonFiniteError, PlanError
from lorakit.init.loftq import ROUNDERS
from models import Snapshot, bits, ids, logits, registry_of, tiny
from zoo import KINDS, zoo, zoo_config

pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")
UNCHANGED = ("pissa", "pissa_niter_8", "olora", "mica")
UNGROUPED = [kind for kind in KINDS if kind not in {"wave", "volume"}]


def begun(init, model=None, **changes):
    """Rank 2, which every weight of the zoo has."""
    return get_peft_model(
        zoo() if model is None else model, zoo_config(r=2, init_lora_weights=init, **changes)
    )


def trained(model, steps=3):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids(seed=9).flatten()).backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("init", UNCHANGED)
def test_nothing_changes_at_first_and_everything_trains(init):
    plain, model = zoo(), begun(init)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-12
    before = {name: bits(parameter) for name, parameter in model.named_parameters()}
    trained(model)
    assert (logits(model) - logits(plain)).abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        never = "lora_" not in name or (init == "mica" and ("lora_B" in name or "embedding_B" in name))
        assert parameter.requires_grad != never, name
        assert (bits(parameter) == before[name]) == never, name


@pytest.mark.parametrize("init", UNCHANGED)
def test_the_base_is_there_whenever_it_is_wanted(init):
    base = zoo()
    before = Snapshot(base)
    model = trained(begun(init, base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(zoo()))
    changed = logits(model)
    model.merge_adapter()
    assert (logits(model) - changed).abs().max() <= 1e-12
    model.unmerge_adapter()
    assert torch.equal(logits(model), changed)
    before.assert_same(model.unload())


@pytest.mark.parametrize("init", [*UNCHANGED, "loftq"])
def test_saved_and_loaded(init, tmp_path):
    """LoftQ's base belongs to it; the others fit the base that was there."""
    targets = {"target_modules": UNGROUPED} if init == "loftq" else {}
    model = trained(begun(init, **targets))
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload() if init == "loftq" else zoo()
    state = torch.get_rng_state()
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        logits(again) - logits(model)
    ).abs().max() <= 1e-6  # PiSSA is written as a plain adapter, by an SVD


@pytest.mark.parametrize("bits_", [2, 4, 8])
def test_loftq_quantises_the_base_and_comes_closer_to_what_it_was(bits_, capsys):
    plain = zoo(dtype=torch.float32)
    model = begun(
        "loftq",
        copy.deepcopy(plain),
        target_modules=UNGROUPED,
        loftq_config=LoftQConfig(loftq_bits=bits_, loftq_iter=3),
    )
    misfits, printed = model.base_model.misfits["default"], capsys.readouterr().out
    for path, layer in registry_of(model).layers.items():
        Q = layer.read_weight(torch.float32)
        misfit = misfits[path]
        assert f"{path}: {misfit}" in printed
        assert misfit.after < misfit.before
        named = dict(plain.named_parameters())
        W = named[path if path in named else f"{path}.weight"].detach()
        W = W.T if layer.layout.transposed else W
        W = W if layer.layout.experts else W.flatten(1)
        blocks = zip(W, Q, strict=True) if layer.layout.experts else [(W, Q)]
        factors = layer.layout.split(*layer.stored("default")[:2], layer.scaling["default"])
        blocks = list(blocks)
        left = [
            weight - quantised - pair.delta()
            for (weight, quantised), pair in zip(blocks, factors, strict=True)
        ]
        assert misfit.after == pytest.approx(float(torch.stack(left).detach().norm()), rel=1e-4)
        for (weight, quantised), pair in zip(blocks, factors, strict=True):
            assert torch.equal(ROUNDERS[bits_](quantised), quantised)
            plainly = (weight - ROUNDERS[bits_](weight)).norm()
            assert (weight - quantised - pair.delta()).norm() < plainly
    assert (logits(model) - logits(plain)).abs().max() > 0
    model.delete_adapter("default")
    assert not model.base_model.misfits


def test_what_does_not_fit_is_refused_at_once_and_changes_nothing():
    model = zoo()
    before = Snapshot(model)
    with pytest.raises(PlanError) as caught:
        get_peft_model(model, zoo_config(r=4, init_lora_weights="pissa"))
    assert [line.split(":")[0] for line in caught.value.problems] == ["image"]
    with pytest.raises(PlanError) as caught:
        get_peft_model(model, zoo_config(r=12, init_lora_weights="olora"))
    assert {"embed", "wave", "image", "volume", "line", "turned", "experts.weights"} <= {
        line.split(":")[0] for line in caught.value.problems
    }
    with pytest.raises(PlanError, match="even rank for each group, got 1"):
        get_peft_model(model, zoo_config(r=2, init_lora_weights="orthogonal"))
    before.assert_same(model)


@pytest.mark.parametrize("init", [*UNCHANGED, "loftq"])
def test_a_weight_that_is_no_number_is_refused_and_changes_nothing(init):
    model = tiny()
    model.layers[1].q_proj.weight.data[2, 3] = float("nan")
    before = Snapshot(model)
    with pytest.raises(NonFiniteError, match=r"^layers\.1\.q_proj: .*NaN or infinity"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "c_fc"], init_lora_weights=init))
    before.assert_same(model)


def test_ranks_and_alphas_by_pattern():
    model = begun("pissa", rank_pattern={"line": 5}, alpha_pattern={"line": -3.0, "turned": 0.25})
    assert (logits(model) - logits(zoo())).abs().max() <= 1e-12
    layer = registry_of(model).layers["line"]
    assert (layer.r["default"], layer.scaling["default"]) == (5, -0.6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_base_that_is_quantised(kind):
    """What looks at the weight begins from its dequantised numbers; LoftQ, which would quantise, is refused."""
    bnb = pytest.importorskip("bitsandbytes")

    def model():
        torch.manual_seed(0)
        line = nn.Linear(64, 96)
        if kind == "int8":
            packed = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
        else:
            packed = bnb.nn.Linear4bit(64, 96, quant_type=kind)
        packed.load_state_dict(line.state_dict())
        return nn.Sequential(packed.to("cpu"), nn.ReLU(), nn.Linear(96, 3))

    x = torch.randn(5, 64)
    for init in UNCHANGED:
        plain, adapted = (
            model().eval(),
            get_peft_model(model().eval(), LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)),
        )
        with torch.no_grad():
            wanted = plain(x)
            assert (adapted(x) - wanted).abs().max() <= 1e-2 * wanted.abs().max()
        layer = registry_of(adapted).layers["0"]
        if init.startswith("pissa"):
            A, B, _ = layer.stored("default")
            left = layer.read_weight(torch.float32) - layer.scaling["default"] * B @ A
            values = torch.linalg.svdvals(layer.read_weight(torch.float32))
            assert torch.linalg.matrix_norm(left.detach(), 2) <= values[4] * 1.001
    with pytest.raises(PlanError, match=r"(?s)0: .*quantised already.*replace_lora_weights_loftq\(\)"):
        get_peft_model(model(), LoraConfig(target_modules=["0"], init_lora_weights="loftq"))
