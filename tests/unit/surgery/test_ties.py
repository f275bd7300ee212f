"""Every row of the tables in docs/tied-weights.md, on tied and untied models of each kind."""

from __future__ import annotations

import copy
import re
import sys
import warnings
import zlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lorakit import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from lorakit.errors import KeyMismatchError, PlanError
from lorakit.layers import LoraLayer
from lorakit.surgery import make_plan
from models import Snapshot, randomise, registry_of
from tied import KINDS, ROWS, TOKENS, VOCABULARY, WIDTH, Row, batch, build, logits_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
R = 4


def expected(kind, tie, row):
    """Paths with an adapter there, and those of them that use the parameters of the embedding."""
    about = KINDS[kind]
    embedding, head, others = about.tied[0], about.tied[-1], about.tied[1:]
    named = {"list": [embedding], "one": [embedding], "head": [head]}.get(row.which, [embedding, head])
    keeps = row.ensure
    if row.field == "trainable_token_indices":  # rows follow the embedding's unless they are other tokens
        keeps = row.ensure or (embedding in named and row.which != "different")
    return (set(about.tied), set(others)) if tie and keeps else (set(named), set())


def refused(tie, row):
    return tie and row.ensure and row.which == "different"


def note(tie, row):
    if row.ensure:
        return None if tie else "no weights of this model are tied"
    touches = tie and row.field != "trainable_token_indices"
    return "of the tied modules .* ensure_weight_tying=True to keep them tied" if touches else None


def numbers(kind, row, path):
    """How many parameters an adapter has on one module, and the shapes of those."""
    if row.field == "target_modules":
        return R * (VOCABULARY + WIDTH)
    if row.field == "trainable_token_indices":
        return len(TOKENS) * WIDTH
    bias = VOCABULARY if kind == "bert" and path == KINDS[kind].tied[-1] else 0
    return VOCABULARY * WIDTH + bias


def make(kind, tie, row, name="default", seed=3, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|ensure_weight_tying)")
        fields = {**row.config(kind), "fan_in_fan_out": False, **more}
        peft = get_peft_model(build(kind, tie), LoraConfig(**fields), name).eval()
    fill(peft, name, seed)
    return peft


def fill(peft, name, seed):
    """Every tensor of an adapter normal, whatever order they are in; nothing depends on what else is there."""
    for item in sorted(registry_of(peft).tensors(name), key=lambda item: item.file_name):
        if item.state_name:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(item.file_name.encode()))
            with torch.no_grad():
                item.tensor.copy_(torch.randn(item.tensor.shape, generator=generator) * 0.3)


def spread(peft, name="default"):
    """Paths where an adapter is, of the modules in question, and those of them that are tied."""
    registry = registry_of(peft)
    linear = KINDS_OF_LINEAR
    here = {path for path, layer in registry.layers.items() if name in layer.adapters}
    here = {path for path in here if not path.endswith(linear)}
    here |= {path for path, wrapper in registry.saved.items() if name in wrapper.adapters}
    tied = {p for p, layer in registry.layers.items() if name in layer.tied or name in layer.tied_rows}
    owners = {}
    for path, wrapper in registry.saved.items():
        if name in wrapper.adapters:
            owners.setdefault(id(wrapper.modules_to_save[name].weight), []).append(path)
    return here, tied, list(owners.values())


KINDS_OF_LINEAR = tuple(f".{about.linear}" for about in KINDS.values())

CASES = [(kind, tie, row) for kind in KINDS for tie in (True, False) for row in ROWS]
# untied models give what any models give: two kinds; BART differs from T5 only in what becomes of its files;
# tokens named for the embedding are those of a list
LIVING = [
    (kind, tie, row)
    for kind, tie, row in CASES
    if not refused(tie, row)
    and kind != "bart"
    and (tie or kind in {"llama", "bert"})
    and (row.field, row.which) != ("trainable_token_indices", "one")
]
SAVED = LIVING + [("bart", True, row) for row in ROWS if not refused(True, row)]


def named(cases):
    return [f"{kind}-{'tied' if tie else 'untied'}-{row}" for kind, tie, row in cases]


each = pytest.mark.parametrize(("kind", "tie", "row"), LIVING, ids=named(LIVING))
each_tied = pytest.mark.parametrize(
    ("kind", "row"),
    [(kind, row) for kind, tie, row in LIVING if tie and expected(kind, tie, row)[1]],
    ids=[f"{kind}-{row}" for kind, tie, row in LIVING if tie and expected(kind, tie, row)[1]],
)


@pytest.mark.parametrize(("kind", "tie", "row"), CASES, ids=named(CASES))
def test_what_is_trained_and_said(kind, tie, row):
    model = build(kind, tie)
    before = Snapshot(model)
    config = LoraConfig(**{**row.config(kind), "fan_in_fan_out": False})
    if refused(tie, row):
        with pytest.raises(PlanError, match="different tokens"):
            get_peft_model(model, config)
        before.assert_same(model)
        return
    words = note(tie, row)
    with pytest.warns(UserWarning, match=words) if words else nullcontext():
        peft = get_peft_model(model, config)
    paths, tied = expected(kind, tie, row)
    here, tied_layers, groups = spread(peft)
    assert here == paths
    if row.field == "modules_to_save":
        assert sorted(map(sorted, groups)) == sorted([sorted(paths)] if tied else [[path] for path in paths])
    else:
        assert tied_layers == tied
    rest = sum(
        p.numel() for n, p in peft.named_parameters() if p.requires_grad and f".{KINDS[kind].linear}." in n
    )
    own = sum(numbers(kind, row, path) for path in paths - tied)
    if row.field == "modules_to_save" and tied and kind == "bert":
        own += VOCABULARY  # the head's bias is its own
    assert peft.get_nb_trainable_parameters()[0] == own + rest
    peft.unload()
    before.assert_same(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert make_plan(model, config).parameters == own + rest


def apart(kind, row):
    """The same config with every tied module named, and nothing tied."""
    paths = list(KINDS[kind].tied)
    fields = row.config(kind, ensure_weight_tying=False, fan_in_fan_out=False)
    if row.field == "modules_to_save":
        return {**fields, "modules_to_save": paths}
    if row.field == "target_modules":
        return {**fields, "target_modules": [KINDS[kind].linear, *paths]}
    return {**fields, "trainable_token_indices": {path: list(TOKENS) for path in paths}}


@each_tied
def test_tied_is_apart_with_the_same_numbers_and_the_sum_of_its_gradients(kind, row):
    """On an untied model whose weights are equal, as the other side of the comparison."""
    tied = make(kind, True, row)
    base = build(kind, True)
    for path in KINDS[kind].tied[1:]:
        module = base.get_submodule(path)
        module.weight = nn.Parameter(module.weight.detach().clone())
    other = get_peft_model(base, LoraConfig(**apart(kind, row))).eval()
    values = {item.file_name: item.tensor.detach() for item in registry_of(tied).tensors("default")}
    source = KINDS[kind].tied[0]
    rows = "token_adapter.trainable_tokens_delta"
    with torch.no_grad():
        for item in registry_of(other).tensors("default"):
            name = item.file_name
            name = f"{source}.{rows}" if name not in values and name.endswith(rows) else name
            item.tensor.copy_(values[name])
    torch.testing.assert_close(logits_of(tied), logits_of(other), **CLOSE)
    for model in (tied, other):
        model(**batch()).loss.backward()
    gradients = {item.file_name: item.tensor.grad for item in registry_of(other).tensors("default")}
    sums = {}
    for name, gradient in gradients.items():
        path = next((path for path in KINDS[kind].tied if name.startswith(f"{path}.")), None)
        if path is None or name.endswith(".bias"):
            sums[name] = gradient
            continue
        if gradient is None:  # an embedding that this model never calls
            continue
        suffix = name.removeprefix(f"{path}.")
        crossed = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
        gradient = gradient.T if suffix in crossed else gradient
        key = f"{source}.{crossed.get(suffix, suffix)}"
        sums[key] = sums.get(key, 0) + gradient
    mine = {
        item.file_name: item.tensor.grad for item in registry_of(tied).tensors("default") if item.state_name
    }
    if row.field == "modules_to_save":
        mine = {name: g for name, g in mine.items() if not (name.endswith(".weight") and name not in sums)}
    assert mine.keys() == sums.keys()
    for name, gradient in sums.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@each
def test_disabled_merged_and_unmerged(kind, tie, row):
    peft = make(kind, tie, row)
    bare, output = logits_of(build(kind, tie)), logits_of(peft)
    assert (output - bare).abs().max() > 1e-3
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft), bare)
    before = Snapshot(peft)
    peft.merge_adapter()
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)
    layers = [registry_of(peft).layers.get(path) for path in KINDS[kind].tied]
    weights = {id(layer.get_base_layer().weight) for layer in layers if layer is not None}
    _, tied = expected(kind, tie, row)
    if layers[0] is not None and tied:
        assert len(weights) == 1
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft), bare)
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)
    peft.unmerge_adapter()
    before.assert_same(peft)
    assert torch.equal(logits_of(peft), output)


def group(model, kind):
    return {id(model.get_submodule(path).weight) for path in KINDS[kind].tied}


@pytest.mark.parametrize(("kind", "tie", "row"), SAVED, ids=named(SAVED))
def test_merged_for_good_and_saved_by_transformers(kind, tie, row, tmp_path):
    peft = make(kind, tie, row)
    output = logits_of(peft)
    says = peft.get_base_model().config.tie_word_embeddings
    paths, tied = expected(kind, tie, row)
    parts = tie and not tied
    bias = kind == "bert" and tie and row.field == "modules_to_save" and KINDS[kind].tied[-1] in paths
    with pytest.warns(UserWarning, match="shared a weight") if parts or bias else nullcontext():
        merged = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), output, **CLOSE)
    exact = logits_of(merged)
    keeps = (not parts and says) or (tie and kind in {"t5", "bart"})
    assert merged.config.tie_word_embeddings == keeps
    assert (len(group(merged, kind)) == 1) == (tie and not parts)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), exact)
    assert len(group(again, kind)) == 1 or parts or not tie


@each
def test_files(kind, tie, row, tmp_path):
    peft = make(kind, tie, row)
    output = logits_of(peft)
    peft.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(build(kind, tie), tmp_path / "one")
    assert torch.equal(logits_of(again), output)
    assert spread(again)[:2] == spread(peft)[:2]
    assert list(map(len, spread(again)[2])) == list(map(len, spread(peft)[2]))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = make(kind, tie, Row("trainable_token_indices", False, "list"), seed=8)
    report = other.load_adapter(tmp_path / "one", "default", replace=True, strict=False)
    assert report.missing_keys == report.unexpected_keys == ()
    assert torch.equal(logits_of(other), output)
    other.load_adapter(tmp_path / "one", "second")
    assert torch.equal(logits_of(other), output)
    other.set_adapter("second")
    assert torch.equal(logits_of(other), output)


# ---- several adapters with different ideas of ties -----------------------------------------------------


def merges_alike(first, second):
    """Whole modules have no place for another adapter's factors or rows, nor those for them."""
    return (first.field == "modules_to_save") == (second.field == "modules_to_save")


PAIRS = [
    (Row("target_modules", True, "one"), Row("target_modules", False, "one")),
    (Row("target_modules", True, "one"), Row("target_modules", False, "head")),
    (Row("target_modules", True, "both"), Row("target_modules", True, "head")),
    (Row("target_modules", True, "one"), Row("trainable_token_indices", False, "list")),
    (Row("target_modules", False, "both"), Row("trainable_token_indices", True, "same")),
    (Row("target_modules", True, "one"), Row("trainable_token_indices", False, "head")),
    (Row("trainable_token_indices", False, "list"), Row("target_modules", False, "head")),
    (Row("modules_to_save", True, "one"), Row("modules_to_save", False, "one")),
    (Row("modules_to_save", False, "head"), Row("modules_to_save", True, "both")),
    (Row("target_modules", True, "one"), Row("modules_to_save", True, "one")),
    (Row("modules_to_save", False, "head"), Row("trainable_token_indices", False, "one")),
]


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda row: str(row))
def test_two_adapters_with_other_ties(kind, first, second):
    alone = [logits_of(make(kind, True, row, seed=seed)) for row, seed in ((first, 3), (second, 4))]
    peft = make(kind, True, first)
    before = Snapshot(peft)
    config = LoraConfig(**{**second.config(kind), "fan_in_fan_out": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        if not merges_alike(first, second):
            with pytest.raises(PlanError, match="trained whole"):
                peft.add_adapter("other", config)
            before.assert_same(peft)
            return
        peft.add_adapter("other", config)
    fill(peft, "other", 4)
    assert torch.equal(logits_of(peft), alone[0])
    peft.set_adapter("other")
    assert torch.equal(logits_of(peft), alone[1])
    if first.field != "modules_to_save":
        merged_together(peft, kind)
    peft.set_adapter("default")
    peft.delete_adapter("other")
    before.assert_same(peft)


def merged_together(peft, kind):
    for name in ("default", "other"):
        peft.set_adapter(name)
        alone = logits_of(peft)
        peft.merge_adapter()
        torch.testing.assert_close(logits_of(peft), alone, **CLOSE)
        peft.unmerge_adapter()
    peft.set_adapter(["default", "other"])
    state, both = Snapshot(peft), logits_of(peft)
    for steps in ([["default"], ["other"]], [["other"], ["default"]], [["default", "other"]]):
        for names in steps:
            peft.merge_adapter(names)
        torch.testing.assert_close(logits_of(peft), both, **CLOSE)
        peft.unmerge_adapter()
        state.assert_same(peft)
        assert torch.equal(logits_of(peft), both)


@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_is_planned_on_the_ties_that_a_merge_hides(kind):
    peft = make(kind, True, Row("target_modules", False, "head"))
    peft.merge_adapter()
    peft.add_adapter(
        "other", LoraConfig(**Row("target_modules", True, "one").config(kind, fan_in_fan_out=False))
    )
    assert spread(peft, "other")[1] == set(KINDS[kind].tied[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_one_of_two_tied_layers_parts_them_when_merging(kind):
    peft = make(kind, True, Row("target_modules", True, "one"))
    layer = registry_of(peft).layers[KINDS[kind].tied[-1]]
    layer.scale_layer(2.0)
    output = logits_of(peft)
    peft.merge_adapter()
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)
    with pytest.warns(UserWarning, match="shared a weight"):
        merged = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), output, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(("first", "second"), PAIRS[:7], ids=lambda row: str(row))
@pytest.mark.parametrize("merged", [[], ["default"], ["other"]], ids=str)
def test_two_adapters_merged_for_good(kind, first, second, merged, tmp_path):
    peft = make(kind, True, first)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        peft.add_adapter("other", LoraConfig(**second.config(kind)))
    fill(peft, "other", 4)
    peft.set_adapter(["default", "other"])
    output = logits_of(peft)
    parts = [expected(kind, True, row)[1] != set(KINDS[kind].tied[1:]) for row in (first, second)]
    if merged:
        peft.merge_adapter(merged)
    with pytest.warns(UserWarning, match="shared a weight") if any(parts) else nullcontext():
        model = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(model), output, **CLOSE)
    assert (len(group(model, kind)) == 1) == (not any(parts))
    exact = logits_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path).eval()), exact)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_merge_for_good_that_is_interrupted(kind, monkeypatch):
    peft = make(kind, True, Row("target_modules", True, "one"))
    output = logits_of(peft)
    real, calls = LoraLayer.commit_merge_for_good, []

    def failing(self, prepared):
        calls.append(1)
        if len(calls) == len(registry_of(peft).layers) - 1:
            raise KeyboardInterrupt
        real(self, prepared)

    monkeypatch.setattr(LoraLayer, "commit_merge_for_good", failing)
    with pytest.raises(KeyboardInterrupt):
        peft.merge_and_unload()
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)
    monkeypatch.setattr(LoraLayer, "commit_merge_for_good", real)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shared a weight")
        model = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(model), output, **CLOSE)


def test_a_copy_of_the_model_has_ties_of_its_own():
    peft = make("t5", True, Row("target_modules", True, "one"))
    output = logits_of(peft)
    twin = copy.deepcopy(peft)
    fill(twin, "default", 9)
    assert torch.equal(
        logits_of(twin), logits_of(make("t5", True, Row("target_modules", True, "one"), seed=9))
    )
    assert torch.equal(logits_of(peft), output)


# ---- what else may be asked ----------------------------------------------------------------------------


def test_a_module_inside_one_that_is_trained_whole_is_not_tied():
    fields = {"target_modules": ["query"], "modules_to_save": ["predictions", "word_embeddings"]}
    model = build("bert", True)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=re.escape("'cls.predictions.decoder'] are parts of")):
        get_peft_model(model, LoraConfig(**fields, ensure_weight_tying=True))
    before.assert_same(model)


def test_internal_ties_of_a_whole_module_come_back_from_a_file(tmp_path):
    fields = {"target_modules": ["query"], "modules_to_save": ["predictions"]}
    peft = get_peft_model(build("bert", True), LoraConfig(**fields))
    randomise(peft)
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert", True), tmp_path, is_trainable=True)
    copy = again.get_base_model().cls.predictions.modules_to_save["default"]
    assert copy.bias is copy.decoder.bias
    assert again.get_nb_trainable_parameters() == peft.get_nb_trainable_parameters()


def test_factors_on_a_module_that_ties_make_whole():
    fields = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    model = build("llama", True)
    before = Snapshot(model)
    with pytest.raises(PlanError, match="lm_head"):
        get_peft_model(model, LoraConfig(**fields, ensure_weight_tying=True))
    before.assert_same(model)


def test_a_base_that_was_tied_after_its_adapters_left():
    """What is shared is looked at when the first adapter comes, also the first of a second time."""
    peft = make("llama", False, Row("target_modules", False, "head"))
    base = peft.get_base_model()
    peft.delete_adapter("default")
    base.lm_head.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True
    with pytest.warns(UserWarning, match="of the tied modules"):
        peft.add_adapter("default", LoraConfig(**Row("target_modules", False, "head").config("llama")))
    fill(peft, "default", 3)
    output = logits_of(peft)
    with pytest.warns(UserWarning, match="shared a weight"):
        model = peft.merge_and_unload()
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(model), output, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    "row",
    [
        Row("target_modules", True, "one"),
        Row("modules_to_save", True, "one"),
        Row("trainable_token_indices", False, "list"),
        Row("target_modules", False, "both"),
    ],
    ids=str,
)
def test_replacing_that_fails_late_brings_ties_back(kind, row, tmp_path, monkeypatch):
    make(kind, True, Row("trainable_token_indices", False, "head")).save_pretrained(tmp_path)
    peft = make(kind, True, row)
    output, shape = logits_of(peft), spread(peft)[:2]
    flags = {name: p.requires_grad for name, p in peft.named_parameters()}
    calls = []

    def fail_once(*_args):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(sys.modules["lorakit.surgery.attach"], "_add_slots", fail_once)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        with pytest.raises(MemoryError):
            peft.load_adapter(tmp_path, "default", replace=True)
    assert torch.equal(logits_of(peft), output)
    assert spread(peft)[:2] == shape
    assert {name: p.requires_grad for name, p in peft.named_parameters()} == flags


def test_ranks_of_tied_modules_are_one():
    model = build("llama", True)
    before = Snapshot(model)
    fields = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    for pattern in ({"rank_pattern": {"lm_head": 2}}, {"alpha_pattern": {"embed_tokens": 2}}):
        with pytest.raises(PlanError, match=r"lm_head: has the rank and the alpha of model.embed_tokens"):
            get_peft_model(model, LoraConfig(**fields, **pattern))
        before.assert_same(model)
    both = {"lm_head": 2, "embed_tokens": 2}
    get_peft_model(model, LoraConfig(**fields, rank_pattern=both, alpha_pattern=both))


@pytest.mark.parametrize(
    "row", [Row("target_modules", True, "one"), Row("modules_to_save", True, "one")], ids=str
)
def test_values_by_key_that_contradict_each_other(row):
    peft = make("llama", True, row)
    values = {key: value.clone() for key, value in get_peft_model_state_dict(peft).items()}
    set_peft_model_state_dict(peft, values)
    before = Snapshot(peft)
    key = next(key for key in values if "lm_head" in key)
    with pytest.raises(KeyMismatchError, match=r"lm_head.*is the same parameter as .*embed_tokens"):
        set_peft_model_state_dict(peft, {**values, key: values[key] + 1})
    before.assert_same(peft)
    values = {key: value * 2 for key, value in values.items()}
    set_peft_model_state_dict(peft, values)
    assert all(torch.equal(value, values[key]) for key, value in get_peft_model_state_dict(peft).items())


@pytest.mark.parametrize(
    "row", [Row("target_modules", True, "one"), Row("trainable_token_indices", True, "list")], ids=str
)
def test_the_bases_embeddings_in_a_file_are_without_what_is_merged(row, tmp_path):
    peft = make("llama", True, row)
    output = logits_of(peft)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        peft.add_adapter("bare", LoraConfig(target_modules=["q_proj"]))
    peft.merge_adapter()
    peft.save_pretrained(tmp_path, save_embedding_layers=True)
    other = build("llama", True)
    nn.init.normal_(other.get_submodule(KINDS["llama"].tied[0]).weight)
    again = PeftModel.from_pretrained(other, tmp_path, allow_base_weights=True)
    torch.testing.assert_close(logits_of(again), output, **CLOSE)
    again.load_adapter(tmp_path / "bare", "bare", allow_base_weights=True)
    again.set_adapter("bare")
    torch.testing.assert_close(logits_of(again), logits_of(build("llama", True)), **CLOSE)
    again.unload()


def test_the_config_names_what_ties_added():
    cases = {
        "modules_to_save": ({"modules_to_save": ["embed_tokens"]}, ["embed_tokens", "lm_head"]),
        "target_modules": ({"target_modules": ["embed_tokens"]}, {"embed_tokens", "lm_head"}),
        "trainable_token_indices": (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4]}},
            {"lm_head": [4], "model.embed_tokens": [4]},
        ),
    }
    for field, (fields, wanted) in cases.items():
        given = LoraConfig(**{"target_modules": ["q_proj"], **fields}, ensure_weight_tying=True)
        before = given.to_dict()
        peft = get_peft_model(build("llama", True), given)
        assert getattr(peft.peft_config["default"], field) == wanted
        assert given.to_dict() == before
    pattern = get_peft_model(
        build("llama", True), LoraConfig(target_modules=r".*embed_tokens", ensure_weight_tying=True)
    )
    assert pattern.peft_config["default"].target_modules == r"(?:.*embed_tokens)|lm_head"


def test_a_model_that_ties_by_itself():
    """No config, no names: the parameter is one, so the modules are tied."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.words.weight

        def forward(self, ids):
            return self.out(torch.tanh(self.words(ids)))

    peft = get_peft_model(Plain(), LoraConfig(target_modules=["out"], ensure_weight_tying=True))
    randomise(peft)
    ids = torch.arange(11)
    output = peft(ids).detach()
    assert set(registry_of(peft).layers) == {"words", "out"}
    merged = peft.merge_and_unload()
    assert merged.out.weight is merged.words.weight
    torch.testing.assert_close(merged(ids), output, **CLOSE)
    with pytest.warns(UserWarning, match="of the tied modules"):
        peft = get_peft_model(merged, LoraConfig(target_modules=["out"]))
    randomise(peft)
    output = peft(ids).detach()
    with pytest.warns(UserWarning, match="shared a weight"):
        merged = peft.merge_and_unload()
    torch.testing.assert_close(merged(ids), output, **CLOSE)


def test_a_file_whose_tied_modules_differ_loads_apart(tmp_path):
    """PEFT writes such files where it does not know a tie."""
    row = Row("target_modules", True, "one")
    make("llama", True, row).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t["base_model.model.lm_head.lora_B.weight"].mul_(2))
    with pytest.warns(UserWarning, match="lm_head: is tied .* trained apart"):
        peft = PeftModel.from_pretrained(build("llama", True), tmp_path, is_trainable=True)
    assert spread(peft)[1] == set()
    head = registry_of(peft).layers["lm_head"]
    assert head.lora_B["default"].weight.requires_grad
    output = logits_of(peft)
    with pytest.warns(UserWarning, match="trained apart"):
        peft.load_adapter(tmp_path, "default", replace=True)
    assert torch.equal(logits_of(peft), output)
    with pytest.warns(UserWarning, match="shared a weight"):
        merged = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), output, **CLOSE)


def test_a_file_that_lacks_what_ties_add(tmp_path):
    """The config does not name the head, and nothing of it is there: it carries no adapter."""
    row = Row("modules_to_save", True, "one")
    make("llama", True, row).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("base_model.model.lm_head.weight"))
    peft = PeftModel.from_pretrained(build("llama", True), tmp_path)  # the config names it: it follows
    assert spread(peft)[0] == {"model.embed_tokens", "lm_head"}
    reconfigure(tmp_path, modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match="lm_head: is tied to .* the file has nothing for it"):
        peft = PeftModel.from_pretrained(build("llama", True), tmp_path)
    assert spread(peft)[0] == {"model.embed_tokens"}
    with pytest.warns(UserWarning, match="has nothing for it"):
        peft.load_adapter(tmp_path, "default", replace=True)
    assert spread(peft)[0] == {"model.embed_tokens"}


def test_not_strict_about_a_tied_source(tmp_path):
    row = Row("target_modules", True, "one")
    whole = make("llama", True, row)
    whole.save_pretrained(tmp_path)
    missing = "base_model.model.model.embed_tokens.lora_embedding_A"
    rewrite(tmp_path, lambda t: t.pop(missing))
    model = build("llama", True)
    before = Snapshot(model)
    with pytest.raises(Exception, match=r"missing: .*lora_embedding_A"):
        PeftModel.from_pretrained(model, tmp_path)
    before.assert_same(model)
    with pytest.warns(UserWarning, match="trained apart"):
        peft = PeftModel.from_pretrained(model, tmp_path, strict=False)
    layer = registry_of(peft).layers["lm_head"]
    assert torch.equal(layer.stored("default").B, registry_of(whole).layers["lm_head"].stored("default").B)


def test_a_tied_bias_that_a_file_holds_twice(tmp_path):
    """PEFT writes it under both names."""
    peft = get_peft_model(build("bert", True), LoraConfig(target_modules=["query"], bias="all"))
    randomise(peft)
    peft.save_pretrained(tmp_path)
    one, two = (f"base_model.model.cls.predictions.{name}bias" for name in ("", "decoder."))
    rewrite(tmp_path, lambda t: t.update({two: t[one].clone()}))
    again = PeftModel.from_pretrained(build("bert", True), tmp_path)
    assert torch.equal(logits_of(again), logits_of(peft))
    rewrite(tmp_path, lambda t: t[two].add_(1))
    model = build("bert", True)
    before = Snapshot(model)
    with pytest.raises(Exception, match="one parameter of the model"):
        PeftModel.from_pretrained(model, tmp_path)
    before.assert_same(model)


def rewrite(folder, edit):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def reconfigure(folder, **changes):
    import json

    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
