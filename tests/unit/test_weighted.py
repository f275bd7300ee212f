"""A new adapter out of several: right for every kind of layer and of content, or refused and nothing changed."""

from __future__ import annotations

import pytest
import torch

from integration.oracle import KINDS, ids, zoo
from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from models import Snapshot, another, logits, randomise, tiny, tiny_llama, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")
WEIGHTS = [0.7, -0.4]
EXACT = ("sum", "cat")


def pair(first, second, model=None, ranks=(2, 4)):
    """A model with two adapters of different ranks and scalings; neither is active alone for good."""
    peft = get_peft_model(model or zoo(), LoraConfig(**{"r": ranks[0], "lora_alpha": 3.0, **first}), "a")
    peft.add_adapter("b", LoraConfig(**{"r": ranks[1], "lora_alpha": 5.0, "use_rslora": True, **second}))
    for seed, name in enumerate("ab"):
        randomise(peft, name, seed=seed, scale=0.3)
    return peft.eval()


def run(peft, name):
    """The model's output under one adapter."""
    with torch.no_grad(), peft.use_adapter(name):
        return peft(ids())


def weights_of(peft, name):
    """Every weight of the model as it is with one adapter merged: dense, without any factors."""
    peft.set_adapter(name)
    peft.merge_adapter()
    found = {key: value.detach().clone() for key, value in peft.get_base_model().named_parameters()}
    peft.unmerge_adapter()
    keep = {
        key.replace("base_layer.", ""): value
        for key, value in found.items()
        if not any(part in key for part in ("lora_", "modules_to_save", "original_module", "token_adapter"))
    }
    wrappers = peft.base_model.registry.saved
    for path, wrapper in wrappers.items():
        keep |= {
            f"{path}.{key}": value.detach().clone()
            for key, value in wrapper.active_module.state_dict().items()
        }
    return keep


def dense(weight, like):
    """A grouped convolution's weight as the ungrouped one that merging makes of it."""
    if weight.shape == like.shape:
        return weight
    out = torch.zeros_like(like)
    half, columns = weight.shape[0] // 2, weight.shape[1]
    out[:half, :columns], out[half:, columns:] = weight[:half], weight[half:]
    return out


CASES = {
    "matrices": ("matrices", "matrices"),
    "lookups and convolutions": ("lookup", "lookup"),
    "grouped convolutions": ("groups", "groups"),
    "experts and attention": ("experts", "attention"),
    "attention": ("attention", "attention"),
    "different layers": ("matrices", "lookup"),
    "whole modules": ("whole", "whole"),
    "one has a whole module": ("whole", "matrices"),
    "tokens": ("tokens", "more tokens"),
    "the same token": ("tokens", "same token"),
    "biases": ("biases", "biases"),
    "one has biases": ("matrices", "biases"),
    "biased factors": ("biased factors", "biased factors"),
    "one has biased factors": ("matrices", "biased factors"),
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", list(CASES))
def test_the_weighted_sum_of_what_they_change(case, method):
    fields = [dict(KINDS[kind][0]) for kind in CASES[case]]
    fields[1].pop("use_rslora", None)
    peft = pair(*fields)
    base = {key: value.clone() for key, value in zoo().named_parameters()}
    each = [weights_of(peft, name) for name in "ab"]
    report = peft.add_weighted_adapter(["a", "b"], WEIGHTS, "both", method)
    assert all(kept == 1.0 for kept in report.kept.values())
    found = weights_of(peft, "both")
    for key, value in found.items():
        start = dense(base[key], value)
        wanted = start + sum(
            w * (dense(one[key], value) - start) for w, one in zip(WEIGHTS, each, strict=True)
        )
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    "method", ["sum", "svd", "cat", "slerp", "ties_svd", "della", "sce", "dare_linear_svd"]
)
@pytest.mark.parametrize(
    "case", ["lookups and convolutions", "grouped convolutions", "experts and attention"]
)
def test_it_always_loads_again(case, method, tmp_path):
    if method == "slerp" and case == "experts and attention":
        pytest.skip("slerp needs both adapters on every layer")
    kinds = CASES[case]
    peft = pair(*(KINDS[kind][0] for kind in kinds))
    density = {"density": 0.6} if method in {"ties_svd", "della", "sce", "dare_linear_svd"} else {}
    peft.add_weighted_adapter(["a", "b"], WEIGHTS, "both", method, **density)
    wanted = run_active(peft, "both")
    peft.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(zoo(), tmp_path / "both").eval()
    with torch.no_grad():
        assert torch.equal(fresh(ids()), wanted)


def run_active(peft, name):
    peft.set_adapter(name)
    with torch.no_grad():
        return peft(ids())


def test_ranks_and_patterns_are_read_off_the_tensors(tmp_path):
    first = {"target_modules": ["q", "c"], "rank_pattern": {"q": 3}, "alpha_pattern": {"c": 1.0}}
    peft = pair(first, {"target_modules": ["q", "head"], "rank_pattern": {"head": 1}})
    peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "cat")
    config = peft.peft_config["both"]
    assert {config.r, *config.rank_pattern.values()} == {7, 2, 1}
    assert config.alpha_pattern == config.rank_pattern
    assert config.lora_alpha == config.r
    assert config.target_modules == {"q", "c", "head"}
    peft.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(zoo(), tmp_path / "both").peft_config["default"].r == config.r


def test_energy_and_rank_reduce_and_say_what_is_kept():
    peft = pair(KINDS["matrices"][0], KINDS["matrices"][0])
    whole = peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "whole", "sum")
    most = peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "most", "sum", energy=0.9)
    one = peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "one", "svd", svd_rank=1)
    assert set(whole.ranks.values()) == {6}
    for path in whole.ranks:
        assert most.ranks[path] < 6
        assert 0.9 <= most.kept[path] < 1
        assert one.kept[path] < most.kept[path]
        assert one.ranks[path] == 1
    deltas = [peft.get_base_model().q.get_delta_weight(name) for name in ("whole", "one")]
    error = (deltas[0] - deltas[1]).square().sum() / deltas[0].square().sum()
    assert 1 - error.item() == pytest.approx(one.kept["q"], abs=1e-9)


def test_the_new_adapter_waits_and_can_be_trained():
    peft = pair(KINDS["matrices"][0], KINDS["matrices"][0])
    before = run(peft, "a")
    peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert peft.active_adapters == ["a"]
    assert torch.equal(run(peft, "a"), before)
    assert not any(item.tensor.requires_grad for item in peft.base_model.registry.tensors("both"))
    peft.set_adapter("both")
    peft(ids()).square().sum().backward()
    grads = [item.tensor.grad for item in peft.base_model.registry.tensors("both")]
    assert all(grad is not None and grad.any() for grad in grads)


def test_an_adapter_may_be_given_twice_and_alone():
    peft = pair(KINDS["whole"][0], KINDS["matrices"][0])
    peft.add_weighted_adapter(["a", "a"], [0.25, 0.75], "again", "sum")
    torch.testing.assert_close(run(peft, "again"), run(peft, "a"), rtol=1e-9, atol=1e-9)
    peft.add_weighted_adapter(["a"], [1.0], "twin")
    torch.testing.assert_close(run(peft, "twin"), run(peft, "a"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """PEFT refuses an SVD in half precision."""
    peft = pair(KINDS["lookup"][0], {"target_modules": ["embed", "conv", "q"]}, zoo().to(dtype))
    peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "svd", svd_rank=6)
    layer = peft.get_base_model().q
    wanted = 0.5 * (layer.factors("a").delta() + layer.factors("b").delta())
    torch.testing.assert_close(layer.factors("both").delta(), wanted, rtol=1e-4, atol=1e-5)
    assert layer.lora_A["both"].weight.dtype == torch.float32


# ---- ties ---------------------------------------------------------------------------------------------


def tied(**fields):
    peft = with_adapter(
        tiny_llama(tie=True).double(), "a", target_modules=["q_proj", "embed_tokens"], **fields
    )
    another(peft, "b", target_modules=["q_proj", "embed_tokens"], r=6, **fields)
    return peft


def test_tied_adapters_stay_tied():
    peft = tied(ensure_weight_tying=True)
    peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "sum")
    assert peft.peft_config["both"].ensure_weight_tying
    head, embedding = peft.get_base_model().lm_head, peft.get_base_model().model.embed_tokens
    wanted = 0.5 * (embedding.get_delta_weight("a") + embedding.get_delta_weight("b"))
    torch.testing.assert_close(embedding.get_delta_weight("both"), wanted)
    torch.testing.assert_close(head.get_delta_weight("both"), wanted)


def test_tied_tokens():
    peft = with_adapter(
        tiny_llama(tie=True).double(), "a", target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    another(peft, "b", target_modules=["q_proj"], trainable_token_indices=[2, 5])
    peft.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", "sum")
    embedding = peft.get_base_model().model.embed_tokens
    rows, base = embedding.token_adapter, embedding.get_base_layer().weight
    assert rows.token_indices["both"] == [1, 2, 5]
    a, b, both = (rows.rows(name) for name in ("a", "b", "both"))
    wanted = [a[0], base[2] + (a[1] - base[2]) + 0.5 * (b[0] - base[2]), base[5] + 0.5 * (b[1] - base[5])]
    torch.testing.assert_close(both, torch.stack(wanted), rtol=1e-9, atol=1e-9)
    peft.set_adapter("both")
    logits(peft)


# ---- refusals -----------------------------------------------------------------------------------------

REFUSED = {
    "unknown name": ((["a", "nope"], [1, 1], "new"), {}, AdapterNameError, r"nope.*\['a', 'b'\]"),
    "taken": ((["a", "b"], [1, 1], "a"), {}, AdapterNameError, "'a' exists already"),
    "name that is none": ((["a", "b"], [1, 1], "x/y"), {}, AdapterNameError, "x/y"),
    "too few weights": ((["a", "b"], [1.0], "new"), {}, ConfigError, r"1 weight.*2 adapter"),
    "NaN weight": ((["a", "b"], [1.0, float("nan")], "new"), {}, ConfigError, "weight 1.*finite"),
    "method": ((["a", "b"], [1, 1], "new", "svdd"), {}, ConfigError, "svdd.*did you mean 'svd'"),
    "no density": ((["a", "b"], [1, 1], "new", "ties_svd"), {}, ConfigError, "density"),
    "unequal ranks": ((["a", "b"], [1, 1], "new", "linear"), {}, ConfigError, r"q: .*equal ranks.*\[2, 4\]"),
    "no adapters": (([], [], "new"), {}, ConfigError, "no adapters"),
    "two ranks": ((["a", "b"], [1, 1], "new"), {"rank": 2, "svd_rank": 3}, ConfigError, "different things"),
    "overflow": ((["a", "b"], [1e308, 1e308], "new", "sum"), {}, NonFiniteError, "sum"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_sound_changes_nothing(case):
    arguments, options, error, words = REFUSED[case]
    peft = pair(KINDS["matrices"][0], KINDS["matrices"][0])
    before = Snapshot(peft)
    with pytest.raises(error, match=f"(?s){words}"):
        peft.add_weighted_adapter(*arguments, **options)
    before.assert_same(peft)


def test_not_finite_factors_are_refused_by_path():
    peft = pair(KINDS["matrices"][0], KINDS["matrices"][0])
    peft.get_base_model().q.lora_A["b"].weight.data[0, 0] = float("nan")
    before = Snapshot(peft)
    with pytest.raises(NonFiniteError, match=r"(?s)q: .*adapter 1.*A holds NaN"):
        peft.add_weighted_adapter(["a", "b"], [1, 1], "new")
    before.assert_same(peft)


def test_biased_factors_beside_lookups_are_refused():
    peft = pair(KINDS["lookup"][0], KINDS["biased factors"][0])
    before = Snapshot(peft)
    with pytest.raises(UnsupportedError, match=r"lora_bias.*'embed'"):
        peft.add_weighted_adapter(["a", "b"], [1, 1], "new", "sum")
    before.assert_same(peft)


def test_slerp_needs_both_on_every_layer():
    peft = pair({"target_modules": ["q"]}, {"target_modules": ["q", "c"]})
    with pytest.raises(UnsupportedError, match=r"c: slerp"):
        peft.add_weighted_adapter(["a", "b"], [1, 1], "new", "slerp")


def test_merged_adapters_can_be_combined():
    peft = pair(KINDS["matrices"][0], KINDS["matrices"][0])
    wanted = peft.add_weighted_adapter(["a", "b"], [1, 1], "first", "sum")
    peft.merge_adapter(["a"])
    assert peft.add_weighted_adapter(["a", "b"], [1, 1], "second", "sum") == wanted
    peft.unmerge_adapter()
    assert torch.equal(run(peft, "first"), run(peft, "second"))


def test_a_failure_while_putting_it_on_changes_nothing(monkeypatch):
    peft = pair(KINDS["lookup"][0], KINDS["whole"][0])
    before = Snapshot(peft)
    layer = type(peft.get_base_model().q)

    def broken(*_, **__):
        raise AdapterStateError("broken")

    monkeypatch.setattr(layer, "_hold", broken)
    with pytest.raises(AdapterStateError, match="broken"):
        peft.add_weighted_adapter(["a", "b"], [1, 1], "new", "sum")
    before.assert_same(peft)


def test_random_pruning_differs_from_weight_to_weight_and_is_the_same_each_time():
    same = {"target_modules": ["q_proj", "v_proj"]}
    peft = pair(same, same, tiny(), ranks=(4, 4))
    for name in "ab":
        for layer in peft.base_model.registry.layers.values():
            for parameter in layer.parameters_of(name):
                torch.nn.init.ones_(parameter)
    kept = {}
    for name in ("one", "two"):
        peft.add_weighted_adapter(["a", "b"], [1.0, 1.0], name, "dare_linear", density=0.5, seed=3)
        kept[name] = [layer.stored(name).A != 0 for layer in peft.base_model.registry.layers.values()]
    assert all(map(torch.equal, kept["one"], kept["two"]))
    patterns = {tuple(mask.flatten().tolist()) for mask in kept["one"]}
    assert len(patterns) == len(kept["one"]) > 1
