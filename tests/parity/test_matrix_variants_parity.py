"""KaSA, BD-LoRA, QA-LoRA and MonteCLoRA, with PEFT as the judge.

PEFT dispatches QA-LoRA on GPTQ layers alone; there its variant is called on a plain layer.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lorakit
from lorakit.layers.varied import held_by
from parity.models import NAMED_WARNINGS, batch, build, loss_of, output_of, peft, randomize

pytestmark = NAMED_WARNINGS

BD = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "layers.1.mlp.up"],
    "nblocks": 4,
}


class Row(NamedTuple):
    """A config: what it says beside r=8 and lora_alpha=12, and its option group as (field, class, arguments)."""

    name: str
    kind: str
    field: str
    group: str
    options: dict
    fields: dict

    def config(self, library):
        options = {self.field: getattr(library, self.group)(**self.options)}
        return library.LoraConfig(**{"r": 8, "lora_alpha": 12, **self.fields, **options})

    def __str__(self):
        return self.name


QV = {"target_modules": ["q_proj", "v_proj"]}
ROWS = (
    Row("kasa", "llama", "kasa_config", "KasaConfig", {}, QV),
    Row("kasa_all", "llama", "kasa_config", "KasaConfig", {"beta": 0.02, "gamma": 0.3}, {"target_modules": "all-linear"}),
    Row("kasa_bias", "llama_bias", "kasa_config", "KasaConfig", {}, {**QV, "lora_bias": True, "use_rslora": True}),
    Row("kasa_ranks", "bert", "kasa_config", "KasaConfig", {}, {"target_modules": ["query", "dense"], "rank_pattern": {"query": 2}}),
    Row("bdlora", "llama", "use_bdlora", "BdLoraConfig", BD, {"target_modules": ["q_proj", "o_proj", "down_proj", "layers.1.mlp.up_proj"]}),
    Row("bdlora_some", "llama", "use_bdlora", "BdLoraConfig", {**BD, "match_strict": False}, {"target_modules": "all-linear"}),
    Row("bdlora_one", "llama_bias", "use_bdlora", "BdLoraConfig", {"target_modules_bd_a": ["proj"]}, {**QV, "lora_bias": True}),
    Row("monteclora", "llama", "monteclora_config", "MontecloraConfig", {"buffer_size": 2}, QV),
    Row("monteclora_all", "bert", "monteclora_config", "MontecloraConfig",
        {"buffer_size": 2, "num_samples": 3, "use_entropy": True, "kl_loss_weight": 0.02, "dirichlet_prior": 0.6}, {"target_modules": "all-linear"}),
)  # fmt: skip
each = pytest.mark.parametrize("row", ROWS, ids=str)


def theirs_of(row, dtype=torch.float32):
    """PEFT's adapter with an effect, in eval mode."""
    model = peft.get_peft_model(build(row.kind, dtype), row.config(peft))
    randomize(model)
    return model.eval()


def values(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "lora_" in key}


def number(value):
    """PEFT says 0.0 where there is no penalty, else a tensor with a history."""
    return value if isinstance(value, float) else value.item()


@pytest.fixture
def pair(row, tmp_path):
    """PEFT's adapter, and ours loaded from its file; eval mode."""
    theirs = theirs_of(row)
    theirs.save_pretrained(tmp_path)
    ours = lorakit.PeftModel.from_pretrained(build(row.kind), tmp_path, is_trainable=True).eval()
    return ours, theirs


@each
def test_files_go_both_ways(row, pair, tmp_path):
    ours, theirs = pair
    wanted = output_of(theirs, row.kind)
    assert (wanted - output_of(build(row.kind), row.kind)).abs().max() > 1e-2
    torch.testing.assert_close(output_of(ours, row.kind), wanted, atol=2e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = peft.PeftModel.from_pretrained(build(row.kind), tmp_path / "again").eval()
    torch.testing.assert_close(output_of(again, row.kind), wanted, atol=2e-5, rtol=1e-4)
    assert (
        again.peft_config["default"].to_dict()[row.field]
        == theirs.peft_config["default"].to_dict()[row.field]
    )


@each
def test_names_and_shapes(row, pair):
    ours, theirs = pair
    mine = {key: value for key, value in values(ours).items() if "lora_offset" not in key}
    assert {key: value.shape for key, value in mine.items()} == {
        key: value.shape for key, value in values(theirs).items()
    }
    state, wanted = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in wanted.items()
    }
    fresh = lorakit.get_peft_model(build(row.kind), row.config(lorakit))
    lorakit.set_peft_model_state_dict(fresh, wanted)
    torch.testing.assert_close(
        output_of(fresh.eval(), row.kind), output_of(theirs, row.kind), atol=2e-5, rtol=1e-4
    )


@each
def test_merged(row, pair):
    ours, theirs = pair
    ours, theirs = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=2e-5, rtol=1e-4, msg=key)


@each
@pytest.mark.parametrize("training", [False, True])
def test_what_is_added_to_a_loss(row, pair, training):
    ours, theirs = (model.train(training) for model in pair)
    for name in ("_get_kasa_loss", "_get_monteclora_loss"):
        found, wanted = getattr(ours, name)(), getattr(theirs, name)()
        assert isinstance(found, float) == isinstance(wanted, float)
        assert number(found) == pytest.approx(number(wanted), rel=1e-5, abs=1e-7)
    either = theirs._get_kasa_loss() + theirs._get_monteclora_loss()
    assert number(ours.get_adapter_loss()) == pytest.approx(number(either), rel=1e-5, abs=1e-7)
    assert (number(either) != 0.0) == (
        row.field == "kasa_config" or (training and row.field == "monteclora_config")
    )


@pytest.mark.parametrize("row", [row for row in ROWS if row.field != "monteclora_config"], ids=str)
def test_training_takes_the_same_way(row, pair):
    seen = []
    for model in pair:
        model.train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimiser = torch.optim.SGD(trained.values(), lr=0.1)
        for _ in range(3):
            loss = loss_of(model, row.kind) + model._get_kasa_loss()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seen.append({**{name: p.detach() for name, p in trained.items()}, "loss": loss.detach()})
    ours, theirs = seen
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("row", ROWS[:4], ids=str)
def test_kasa_begins_from_the_same_base(row):
    theirs = peft.get_peft_model(build(row.kind), row.config(peft)).eval()
    ours = lorakit.get_peft_model(build(row.kind), row.config(lorakit)).eval()
    wanted = output_of(theirs, row.kind)
    assert (wanted - output_of(build(row.kind), row.kind)).abs().max() > 1e-4
    torch.testing.assert_close(output_of(ours, row.kind), wanted, atol=2e-5, rtol=1e-4)
    with ours.disable_adapter():  # PEFT has no way back
        assert torch.equal(output_of(ours, row.kind), output_of(build(row.kind), row.kind))


def test_bdlora_begins_with_the_same_spread():
    row = ROWS[4]
    theirs, ours = peft.get_peft_model(build(row.kind), row.config(peft)), None
    ours = lorakit.get_peft_model(build(row.kind), row.config(lorakit))
    mine, wanted = values(ours), values(theirs)
    for key, value in wanted.items():
        assert mine[key].std() == pytest.approx(number(value.std()), rel=0.25), key
        assert mine[key].abs().max() == pytest.approx(number(value.abs().max()), rel=0.2), key


# ---- QA-LoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_qalora_is_their_formula(size, lead):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "middle"], "use_qalora": True}
    size = min(size, 8)
    ours = lorakit.get_peft_model(build("plain"), lorakit.LoraConfig(**fields, qalora_group_size=size)).eval()
    config = peft.LoraConfig(**fields, qalora_group_size=size)
    theirs = peft.get_peft_model(build("plain"), config).eval()
    variant = peft.tuners.lora.variants.QALoraLinearVariant
    for path in ("first", "middle"):
        layer, judge = ours.get_base_model().get_submodule(path), theirs.get_base_model().get_submodule(path)
        variant.init(judge, "default", config)
        with torch.no_grad():
            for one, other in ((layer.lora_A, judge.lora_A), (layer.lora_B, judge.lora_B)):
                assert one["default"].weight.shape == other["default"].weight.shape
                one["default"].weight.normal_()
                other["default"].weight.copy_(one["default"].weight)
        x = torch.randn(*lead, layer.in_features)
        base = judge.base_layer(x)
        wanted = variant.forward(judge, active_adapter="default", x=x, result=base)
        assert (wanted - base).abs().max() > 0.1
        torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


# ---- MonteCLoRA -----------------------------------------------------------------------------------------


class Draws:
    """In place of PEFT's buffer: given draws."""

    def __init__(self, squares, normals, noise):
        self.given = {"z_mvn": noise, "z_wishart": torch.diag(squares), "z_dirichlet": normals}

    def get(self):
        return self.given


def montecloras():
    """Our adapter on one matrix in double precision, PEFT's with the same tensors, in training mode."""
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["first"]}
    options = {"num_samples": 4, "sample_scaler": 0.5, "use_entropy": True, "kl_loss_weight": 0.2}
    theirs = peft.get_peft_model(
        build("plain", torch.float64),
        peft.LoraConfig(**fields, monteclora_config=peft.MontecloraConfig(**options, buffer_size=50)),
    )
    randomize(theirs)
    ours = lorakit.get_peft_model(
        build("plain", torch.float64),
        lorakit.LoraConfig(**fields, monteclora_config=lorakit.MontecloraConfig(**options)),
    )
    lorakit.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours.train(), theirs.train()


def test_with_their_draws_a_step_is_theirs():
    """The mean of `w_k z_k` is what we draw as `|w| z`: so their k-th matrix is z w_k / |w|."""
    ours, theirs = montecloras()
    x = batch("plain", torch.float64)["x"]
    torch.manual_seed(9)
    found = ours(x)
    layer = ours.get_base_model().first
    torch.manual_seed(9)
    torch.randn(3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    z = torch.randn(3, 8, dtype=torch.float64)
    draw = layer.kept["default"]["draw"]
    sampler = theirs.get_base_model().first.lora_monteclora_sampler["default"]
    sampler.sampler = Draws(draw.squares, draw.normals, torch.zeros(4, 8, 3, dtype=torch.float64))
    weights = sampler()[1].detach()
    sampler.sampler.given["z_mvn"] = (weights / weights.norm())[:, None, None] * z.T
    wanted = theirs(x)
    with torch.no_grad():
        assert (wanted - theirs.eval()(x)).abs().max() > 1e-2
    theirs.train()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)  # their root is in single precision


def test_penalties_and_their_gradients_after_a_step():
    ours, theirs = montecloras()
    x = batch("plain", torch.float64)["x"]
    ours(x)
    draw = ours.get_base_model().first.kept["default"]["draw"]
    sampler = theirs.get_base_model().first.lora_monteclora_sampler["default"]
    sampler.sampler = Draws(draw.squares, draw.normals, torch.zeros(4, 8, 3, dtype=torch.float64))
    theirs(x)
    found, wanted = ours._get_monteclora_loss(), theirs._get_monteclora_loss()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    found.backward()
    wanted.backward()
    holder = ours.get_base_model().first.lora_monteclora_sampler["default"]
    for name in ("std_prior", "expert_weights_prior"):
        one, other = getattr(holder, name).grad, getattr(sampler, name).grad
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_what_a_step_draws_has_the_moments_of_theirs():
    ours, theirs = montecloras()
    layer, judge = ours.get_base_model().first, theirs.get_base_model().first
    held, variant, count = held_by(layer, "default"), layer.variants["default"], 4000
    mine, wanted = [], []
    with torch.no_grad():
        for _ in range(count):
            mine.append(variant._drawn(held, {}) - held.A)
            noise, weights = judge.lora_monteclora_sampler["default"]()
            wanted.append(torch.einsum("n,nio->oi", weights, noise))
    sides = []
    for draws in (torch.stack(mine), torch.stack(wanted)):
        square = draws.square()
        across = (square[:, :-1] * square[:, 1:]).mean(2)
        sides.append(
            torch.cat(
                [
                    draws.mean(2),
                    square.mean(2),
                    square.square().mean(2),
                    square[..., 0] * square[..., 1],
                    across,
                ],
                1,
            )
        )
    one, other = sides
    away = (one.mean(0) - other.mean(0)) / ((one.var(0) + other.var(0)) / count).sqrt()
    assert away.abs().max() < 4, away


@pytest.mark.parametrize("row", [ROWS[1], ROWS[8]], ids=str)
def test_a_trainer_adds_it(row, pair, tmp_path):
    ours, theirs = pair
    inputs = batch(row.kind)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    found = []
    for library, model in ((lorakit, ours), (peft.helpers, theirs)):
        kind = type("With", (library.MontecloraTrainerMixin, Trainer), {})
        # before a step both have the penalty of how it began
        trainer = kind(model=model.eval(), args=arguments)
        loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
        assert number(loss) == number(trainer.compute_loss(model, dict(inputs)))
        found.append(number(loss) - number(outputs["loss"]))
    assert found[0] == pytest.approx(number(ours.get_adapter_loss()), abs=1e-5)
    assert found[1] == pytest.approx(number(theirs._get_monteclora_loss()), abs=1e-5)
    assert (found[0] > 1e-3) == (row.field == "kasa_config")


def test_two_of_their_tensors_stay_what_the_file_says(tmp_path):
    """PEFT keeps its last draw in them."""
    row = ROWS[7]
    theirs = theirs_of(row).train()
    output_of(theirs, row.kind)
    theirs.save_pretrained(tmp_path)
    ours = lorakit.PeftModel.from_pretrained(build(row.kind), tmp_path, is_trainable=True).train()
    before = copy.deepcopy(values(ours))
    loss_of(ours, row.kind).backward()
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        if "expert_weights" in key or "gaussian" in key:
            name = key.replace("sampler.", "sampler.default.")
            assert torch.equal(before[name], value)
            assert torch.equal(values(ours)[name], value)


def test_their_qalora_on_a_plain_base_is_plain_lora(tmp_path):
    """The flag is ignored there, so the file holds a whole A; it is refused for that, and loads as what it is."""
    fields = {"r": 4, "target_modules": ["first"]}
    theirs = peft.get_peft_model(
        build("plain"), peft.LoraConfig(**fields, use_qalora=True, qalora_group_size=4)
    )
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    with pytest.raises(lorakit.KeyMismatchError, match="lora_A"):
        lorakit.PeftModel.from_pretrained(build("plain"), tmp_path)
    ours = lorakit.PeftModel.from_pretrained(build("plain"), tmp_path, config=lorakit.LoraConfig(**fields))
    torch.testing.assert_close(output_of(ours, "plain"), output_of(theirs, "plain"), atol=1e-6, rtol=1e-5)
