"""EVA, CorDA and LoRA-GA against PEFT on the same batches: the same factors up to sign, the same ranks."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import pytest
import torch
from torch.nn.functional import cosine_similarity

import lorakit
from parity.models import NAMED_WARNINGS, VOCABULARY, build, output_of, peft

pytestmark = [
    *NAMED_WARNINGS,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # of PEFT's LoRA-GA
]

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
}


def batches(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (6, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = torch.randint(3, (6,), generator=generator) if kind == "bert" else ids.clone()
        if kind != "bert":
            labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


# ---- EVA -------------------------------------------------------------------------------------------------


def with_eva(library, kind, **options):
    fields = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    options = library.EvaConfig(**options)
    config = library.LoraConfig(**fields, init_lora_weights="eva", eva_config=options)
    return library.get_peft_model(build(kind), config, low_cpu_mem_usage=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"rho": 4.0, "tau": 0.9}, {"rho": 4.0, "tau": 0.9, "use_label_mask": False}], ids=str
)
def test_eva_finds_the_same_components_and_ranks(kind, options):
    """PEFT's decomposition of a batch cuts off nothing where as many components as inputs are wanted (rho 4)."""
    data = batches(kind, 60)
    theirs = peft.get_eva_state_dict(with_eva(peft, kind, **options), data, show_progress_bar=False)
    ours = lorakit.get_eva_state_dict(with_eva(lorakit, kind, **options), data, show_progress_bar=False)
    assert {name: len(A) for name, A in ours.items()} == {name: len(A) for name, A in theirs.items()}
    closeness = torch.cat([cosine_similarity(A, theirs[name], dim=1).abs() for name, A in ours.items()])
    assert float(closeness.min()) > 1 - 1e-5


def test_eva_explains_more_where_their_decomposition_cuts_off():
    """PEFT keeps of each batch what was wanted so far; here nothing is cut off before the end."""
    data, path = batches("llama", 60), "model.layers.1.mlp.gate_proj"
    rows, base = [], build("llama")
    base.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in data:
            base(**batch)
    kept = [x[(b["attention_mask"] == 1) & (b["labels"] != -100)] for x, b in zip(rows, data, strict=True)]
    X = torch.cat(kept).double()
    X -= X.mean(dim=0)
    explained = []
    for library in (lorakit, peft):
        model = with_eva(library, "llama", rho=1.0, tau=0.999)
        A = library.get_eva_state_dict(model, data, show_progress_bar=False)[
            f"base_model.model.{path}"
        ].double()
        assert A.shape == (8, 32)
        explained.append(float((X @ A.T).square().sum()))
    best = float(torch.linalg.svdvals(X)[:8].square().sum())
    assert explained[1] < explained[0] <= best * (1 + 1e-6)
    assert explained[0] > 0.999 * best


@pytest.mark.parametrize("adjust", [True, False])
def test_eva_leaves_the_same_adapter(adjust, tmp_path):
    """Ranks, scalings and factors; and the file of one library loads in the other."""
    data, options = batches("llama", 60), {"rho": 4.0, "tau": 0.9, "adjust_scaling_factors": adjust}
    theirs, ours = with_eva(peft, "llama", **options), with_eva(lorakit, "llama", **options)
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    lorakit.initialize_lora_eva_weights(ours, data, show_progress_bar=False)
    layers = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 12
    for name, layer in layers.items():
        mine = ours.get_submodule(name)
        assert (mine.r, mine.lora_alpha, mine.scaling) == (layer.r, layer.lora_alpha, layer.scaling)
        A, B = layer.lora_A["default"].weight.detach(), mine.lora_A["default"].weight.detach()
        assert float(cosine_similarity(A, B, dim=1).abs().min()) > 1 - 1e-5
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in ours.base_model.registry.layers.values():
            layer.lora_B["default"].weight.normal_(std=0.1, generator=generator)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(output_of(loaded, "llama"), output_of(ours.eval(), "llama"), rtol=0, atol=2e-6)


def test_eva_takes_their_state_dict_and_gives_them_ours():
    data = batches("llama", 10)
    theirs, ours = with_eva(peft, "llama"), with_eva(lorakit, "llama")
    state = lorakit.get_eva_state_dict(ours, data, show_progress_bar=False)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=copy.copy(state))
    lorakit.initialize_lora_eva_weights(ours, eva_state_dict=state)
    mine = {key: tensor for key, tensor in ours.state_dict().items() if "lora_A" in key}
    assert mine
    assert all(torch.equal(theirs.state_dict()[key], tensor) for key, tensor in mine.items())


def test_eva_whitens_layers_of_one_input_once():
    """PEFT divides a shared input's components anew for each of its layers, so the first ones are divided thrice."""
    data, options = batches("llama", 60), {"rho": 4.0, "whiten": True, "tau": 0.9}
    theirs = peft.get_eva_state_dict(with_eva(peft, "llama", **options), data, show_progress_bar=False)
    ours = lorakit.get_eva_state_dict(with_eva(lorakit, "llama", **options), data, show_progress_bar=False)
    sharing = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
    for name, A in ours.items():
        times = sharing[name.rpartition(".")[2]]
        norms, wrong = A[:3].norm(dim=1), theirs[name][:3].norm(dim=1).float()
        torch.testing.assert_close(wrong, norms**times, rtol=1e-4, atol=0)


# ---- CorDA and LoRA-GA -------------------------------------------------------------------------------------

ALL_LINEAR = {"llama": [*TARGETS["llama"], "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


@pytest.fixture
def their_corda(monkeypatch):
    """PEFT's module takes `dataclass` from attrs, which need not be installed."""
    if "attr" not in sys.modules:
        stand_in = types.ModuleType("attr")
        stand_in.dataclass = dataclasses.dataclass
        monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora import corda

    return corda.preprocess_corda


def fields_of(kind, scheme, **fields):
    own = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR[kind], "fan_in_fan_out": kind == "gpt2"}
    return {**own, "init_lora_weights": scheme, **fields}


def samples(count=20):
    """One sentence a call, as PEFT's CorDA needs it."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (1, 12), generator=generator) for _ in range(count)]


def run(model):
    for ids in samples():
        model(input_ids=ids)


def step(model):
    for ids in samples(3):
        model(input_ids=ids, labels=ids).loss.backward()


def factors_of(model):
    """A and B of every layer, by path."""
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {
        path: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for path, layer in layers.items()
    }


def begin(library, preprocess, kind, fields, go, **arguments):
    model, config = build(kind), library.LoraConfig(**fields)
    preprocess(model, config, lambda: go(model), **arguments)
    return library.get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_begins_as_the_same_part(kind, method, their_corda):
    from peft.tuners.lora.config import CordaConfig

    fields = fields_of(kind, "corda", corda_config=CordaConfig(corda_method=method))
    theirs = begin(peft, their_corda, kind, fields, run)
    fields["corda_config"] = lorakit.CordaConfig(corda_method=method)
    ours = begin(lorakit, lorakit.preprocess_corda, kind, fields, run)
    mine = factors_of(ours)
    assert mine
    for path, (A, B) in factors_of(theirs).items():
        wanted, found = B @ A, mine[path][1] @ mine[path][0]
        assert float((found - wanted).norm() / wanted.norm()) < 3e-3, path
        # A and B share the singular values evenly, so each is the other's up to a rotation of equal ones
        torch.testing.assert_close(mine[path][0].norm(), A.norm(), rtol=3e-3, atol=0)
    untouched(ours, kind)


def untouched(ours, kind):
    """Their base has changed by now; ours computes and holds what it did."""
    base = build(kind)
    torch.testing.assert_close(output_of(ours.eval(), kind), output_of(base, kind), rtol=0, atol=1e-6)
    held = ours.unload().state_dict()
    assert all(torch.equal(held[key], value) for key, value in base.state_dict().items())


def turned(found, wanted):
    """Rows with the signs of others."""
    return found * (found * wanted).sum(dim=1, keepdim=True).sign()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_begins_as_the_same_vectors(kind, direction, scale):
    """PEFT's singular vectors come from a random sketch: 1 % off, and under "weight_svd" 5 %.

    Under "stable" it takes a Conv1D's inputs for its outputs.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    options = {"direction": direction, "scale": scale}
    fields = fields_of(kind, "lora_ga", lora_ga_config=peft.LoraGAConfig(**options))
    torch.manual_seed(0)
    theirs = begin(peft, preprocess_loraga, kind, fields, step)
    fields["lora_ga_config"] = lorakit.LoraGAConfig(**options)
    ours = begin(lorakit, lorakit.preprocess_loraga, kind, fields, step)
    mine = factors_of(ours)
    for path, (A, B) in factors_of(theirs).items():
        swapped = (A.shape[1] / B.shape[0]) ** 0.25 if (kind, scale) == ("gpt2", "stable") else 1.0
        pairs = ((mine[path][0], A, 1.0), (mine[path][1].T, B.T, swapped))
        for found, wanted, factor in pairs:
            difference = turned(found, wanted) * factor - wanted
            assert float(difference.norm() / wanted.norm()) < (0.06 if scale == "weight_svd" else 0.01), path
    untouched(ours, kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_their_caches_are_read(kind, their_corda, tmp_path):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    file = str(tmp_path / "corda.pt")
    theirs = begin(
        peft, their_corda, kind, fields_of(kind, "corda", corda_config=CordaConfig(cache_file=file)), run
    )
    fields = fields_of(kind, "corda", corda_config=lorakit.CordaConfig(cache_file=file))
    ours = begin(lorakit, lorakit.preprocess_corda, kind, fields, None)
    for path, (A, B) in factors_of(theirs).items():
        torch.testing.assert_close(factors_of(ours)[path], (A, B), rtol=1e-5, atol=1e-7)

    file = str(tmp_path / "lora_ga.pt")
    fields = fields_of(kind, "lora_ga", lora_ga_config=peft.LoraGAConfig())
    begin(peft, preprocess_loraga, kind, fields, step, cache_file=file)
    fields["lora_ga_config"] = lorakit.LoraGAConfig()
    from_file = begin(lorakit, lorakit.preprocess_loraga, kind, fields, None, cache_file=file)
    from_run = factors_of(begin(lorakit, lorakit.preprocess_loraga, kind, fields, step))
    for path, (A, B) in factors_of(from_file).items():
        torch.testing.assert_close(turned(A, from_run[path][0]), from_run[path][0], rtol=0, atol=2e-3)
        assert B.shape == from_run[path][1].shape
