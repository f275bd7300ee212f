"""Rows of embeddings and heads that an adapter replaces (`trainable_token_indices`)."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import embedding, linear

from lorakit import LoraConfig, PeftModel, get_model_status, get_peft_model, set_peft_model_state_dict
from lorakit.errors import (
    AdapterStateError,
    ConfigError,
    KeyMismatchError,
    NonFiniteError,
    PlanError,
    UnsupportedError,
)
from models import Snapshot, bits, randomise, registry_of
from tied import OTHERS, TOKENS, VOCABULARY, WIDTH, batch, build, logits_of

EMBED, HEAD = "model.embed_tokens", "lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(tokens=None, **changes):
    tokens = list(TOKENS) if tokens is None else tokens
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj"],
            "trainable_token_indices": tokens,
            **changes,
        }
    )


def make(tie=True, name="default", seed=3, tokens=None, dtype=torch.float32, **changes):
    peft = get_peft_model(build("llama", tie, dtype), config(tokens, **changes), name).eval()
    randomise(peft, name, seed)
    return peft


def rows_of(peft, path=EMBED, name="default"):
    return registry_of(peft).layers[path].token_adapter.rows(name)


# ---- what is trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("dtype", "widen", "wanted"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.float64, True, torch.float64),
    ],
)
def test_only_the_rows_learn(tie, dtype, widen, wanted):
    base = build("llama", tie, dtype)
    before = {name: bits(parameter) for name, parameter in base.named_parameters()}
    original = base.get_submodule(EMBED).weight[TOKENS].clone()
    peft = get_peft_model(base, config(target_modules=[]), autocast_adapter_dtype=widen)
    rows = rows_of(peft)
    assert (rows.dtype, tuple(rows.shape)) == (wanted, (len(TOKENS), WIDTH))
    assert torch.equal(rows.to(dtype), original)
    assert peft.get_nb_trainable_parameters()[0] == rows.numel()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    peft(**batch()).loss.backward()
    assert all(row.abs().max() > 0 for row in rows.grad)
    optimizer.step()
    assert not torch.equal(rows.to(dtype), original)
    peft.merge_adapter()
    peft.unmerge_adapter()
    bare = peft.unload()
    assert {name: bits(parameter) for name, parameter in bare.named_parameters()} == before


class Words(nn.Module):
    """An embedding with any way of counting gradients, called on the tokens; its weight may be read for the output."""

    def __init__(self, *, reads=False, **options):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, **options)
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.reads = reads

    def forward(self, input_ids):
        hidden = torch.tanh(self.words(input_ids))
        return linear(hidden, self.words.weight) if self.reads else self.out(hidden)


def on_words(tokens=None, **options):
    torch.manual_seed(0)
    model = Words(**options)
    tokens = {"words": list(TOKENS) if tokens is None else tokens}
    peft = get_peft_model(model, config(tokens, target_modules=[]))
    randomise(peft)
    return peft


IDS = torch.tensor([[5, 3, 5, 9], [5, 0, 3, 30]])


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"scale_grad_by_freq": True, "padding_idx": 5}],
)
def test_gradients_are_those_of_one_weight_with_the_rows_in_it(options):
    with pytest.warns(UserWarning, match="padding") if "padding_idx" in options else nullcontext():
        peft = on_words(tokens=[5, 30, 3], **options)
    layer = registry_of(peft).layers["words"]
    rows = layer.token_adapter.trainable_tokens_delta["default"]
    pull = torch.randn(*IDS.shape, WIDTH)
    (layer(IDS) * pull).sum().backward()
    base = layer.get_base_layer()
    weight = base.weight.detach().clone()
    weight[[5, 30, 3]] = rows.detach()
    weight.requires_grad_()
    found = embedding(IDS, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
    (found * pull).sum().backward()
    torch.testing.assert_close(rows.grad, weight.grad[[5, 30, 3]])
    assert torch.equal(layer(IDS), found)


def test_a_padding_token_that_cannot_learn_is_pointed_out():
    with pytest.warns(UserWarning, match=r"words: .*token 3 .*padding"):
        on_words(padding_idx=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_words(padding_idx=4)
        make(tokens=[0])  # the head gives its row a gradient
    with pytest.warns(UserWarning, match="padding"):
        make(tie=False, tokens=[0])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), ()])
def test_ids_of_any_shape_and_kind(shape):
    peft = on_words()
    layer = registry_of(peft).layers["words"]
    ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    ids.view(-1)[0] = TOKENS[0]
    weight = layer.weight.detach()
    for given in (ids, ids.int(), ids.T if ids.ndim == 2 else ids):
        assert torch.equal(layer(given), embedding(given, weight))


# ---- models that read the weight -----------------------------------------------------------------------


def test_a_model_that_reads_the_weight_sees_the_rows():
    peft = on_words(reads=True)
    layer, base = registry_of(peft).layers["words"], peft.get_base_model().words.base_layer
    whole = base.weight.detach().clone()
    whole[TOKENS] = rows_of(peft, "words").detach()
    output = peft(IDS)
    assert torch.equal(output, linear(torch.tanh(embedding(IDS, whole)), whole))
    output.sum().backward()
    reference = whole.clone().requires_grad_()
    linear(torch.tanh(embedding(IDS, reference)), reference).sum().backward()
    torch.testing.assert_close(rows_of(peft, "words").grad, reference.grad[TOKENS])
    with peft.disable_adapter():
        assert layer.weight is base.weight
        bare = peft(IDS)
    peft.merge_adapter()
    assert layer.weight is base.weight
    assert torch.equal(peft(IDS), output)
    peft.unmerge_adapter()
    with peft.use_adapter("__base__"):
        assert torch.equal(peft(IDS), bare)
    peft.add_adapter("other", config({"words": [7]}, target_modules=[]))
    randomise(peft, "other", 5)
    with peft.use_adapter("other"):
        assert torch.equal(layer.weight[7], rows_of(peft, "words", "other")[0])
        assert torch.equal(layer.weight[TOKENS], base.weight[TOKENS])
    assert torch.equal(peft(IDS), output)


# ---- rows stand for themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_new_tokens_of_a_vocabulary_that_grew(tie, tmp_path):
    def grown(seed):
        model = build("llama", tie)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        return model

    new = [VOCABULARY, VOCABULARY + 2]
    tokens = new if tie else {"embed_tokens": new, "lm_head": new}
    peft = get_peft_model(grown(1), config(tokens)).eval()
    randomise(peft)
    peft.save_pretrained(tmp_path)
    ids = torch.tensor([[3, VOCABULARY, 7, VOCABULARY + 2]])
    other = grown(2)
    assert not torch.equal(other.get_submodule(EMBED).weight, grown(1).get_submodule(EMBED).weight)
    again = PeftModel.from_pretrained(other, tmp_path)
    used = [token for token in range(VOCABULARY + 3) if token != VOCABULARY + 1]
    assert torch.equal(again(ids).logits[..., used], peft(ids).logits[..., used])
    short = build("llama", tie)
    before = Snapshot(short)
    with pytest.raises(
        PlanError, match=rf"\[{VOCABULARY}, {VOCABULARY + 2}\] are not among the {VOCABULARY} rows"
    ):
        PeftModel.from_pretrained(short, tmp_path)
    before.assert_same(short)


def test_a_base_with_other_rows_gives_the_same_rows(tmp_path):
    peft = make()
    peft.save_pretrained(tmp_path)
    other = build("llama", True)
    with torch.no_grad():
        other.get_submodule(EMBED).weight.normal_()
    again = PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(rows_of(again), rows_of(peft))
    ids = torch.tensor(TOKENS)
    layers = [registry_of(model).layers[EMBED] for model in (peft, again)]
    assert torch.equal(layers[0](ids), layers[1](ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_rows_change_nothing_of_a_scaled_embedding(dtype):
    """Gemma multiplies by a rounded number; a row must be multiplied by the same."""
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )
    ).to(dtype)  # fmt: skip
    ids = torch.arange(3, 13).reshape(2, 5)
    wanted = model.model.embed_tokens(ids)
    peft = get_peft_model(model, config(target_modules=[]))
    layer = registry_of(peft).layers[EMBED]
    assert torch.equal(layer(ids), wanted)
    randomise(peft)
    hits = torch.isin(ids, torch.tensor(TOKENS))
    changed = layer(ids)
    assert torch.equal(changed[~hits], wanted[~hits])
    output = peft(ids).logits
    peft.merge_adapter()
    assert torch.equal(layer(ids), changed)
    torch.testing.assert_close(
        peft(ids).logits, output, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5
    )


# ---- several adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_disjoint_tokens_act_together(tie):
    peft = make(tie, target_modules=[])
    peft.add_adapter("other", config(OTHERS, target_modules=[]))
    randomise(peft, "other", 5)
    peft.set_adapter(["default", "other"])
    both = make(tie, tokens=[*TOKENS, *OTHERS], target_modules=[])
    with torch.no_grad():
        rows_of(both).copy_(torch.cat([rows_of(peft), rows_of(peft, name="other")]))
    assert torch.equal(logits_of(peft), logits_of(both))
    before = Snapshot(peft)
    for names in (["default", "other"], ["other", "default"]):
        for name in names:
            peft.merge_adapter([name])
        torch.testing.assert_close(logits_of(peft), logits_of(both), **CLOSE)
        peft.unmerge_adapter()
        before.assert_same(peft)
    peft(**batch()).loss.backward()
    assert rows_of(peft).grad.abs().max() > 0
    assert rows_of(peft, name="other").grad.abs().max() > 0


def test_overlapping_tokens_are_refused_by_name():
    peft = make()
    peft.add_adapter("other", config([9, TOKENS[1]]))
    randomise(peft, "other", 5)
    alone = {}
    for name in ("other", "default"):
        peft.set_adapter(name)
        alone[name] = logits_of(peft)
    before = Snapshot(peft)
    both = ["default", "other"]
    words = f"'default' and 'other' each replace the row of token {TOKENS[1]}"
    with pytest.raises(AdapterStateError, match=f"embed_tokens: .*{words}"):
        peft.set_adapter(both)
    before.assert_same(peft)
    for call in (peft.merge_adapter, lambda names: peft.merge_and_unload(adapter_names=names)):
        with pytest.raises(AdapterStateError, match=words):
            call(both)
        before.assert_same(peft)
    with pytest.raises(AdapterStateError, match=words), peft.use_adapter(both):
        pass
    peft.merge_adapter()
    merged = Snapshot(peft)
    with pytest.raises(AdapterStateError, match=words):
        peft.merge_adapter(["other"])
    merged.assert_same(peft)
    peft.unmerge_adapter()
    mixed = peft(**batch(), adapter_names=["default", "other"]).logits
    for number, name in enumerate(("default", "other")):
        torch.testing.assert_close(mixed[number], alone[name][number], **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_adapters_by_sample(kind, tie):
    """Rows of embedding and head, with and without factors on the same modules."""
    linear_name = {"llama": "q_proj", "gpt2": "c_attn"}[kind]
    embed = {"llama": "embed_tokens", "gpt2": "wte"}[kind]
    fields = {
        "rows": {"trainable_token_indices": TOKENS, "target_modules": [linear_name]},
        "rows on factors": {"trainable_token_indices": [7, 3], "target_modules": [linear_name, embed]},
        "factors": {"target_modules": [embed, "lm_head"], "ensure_weight_tying": True},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        names = [name.replace(" ", "-") for name in fields]
        peft = get_peft_model(build(kind, tie), LoraConfig(r=2, **fields["rows"]), names[0]).eval()
        for name, changes in zip(names[1:], list(fields.values())[1:], strict=True):
            peft.add_adapter(name, LoraConfig(r=2, **changes))
    for number, name in enumerate(names):
        randomise(peft, name, number)
    given = batch()
    given = {key: torch.cat([value, value]) for key, value in given.items()}
    chosen = [names[2], "__base__", names[0], names[1]]
    wanted = []
    for number, name in enumerate(chosen):
        with peft.use_adapter(name):
            wanted.append(peft(**given).logits[number])
    mixed = peft(**given, adapter_names=chosen).logits
    torch.testing.assert_close(mixed, torch.stack(wanted), **CLOSE)
    assert len({bits(w) for w in wanted}) == 4


def test_with_factors_on_the_same_embedding(tmp_path):
    """Rows take the base's place, factors are added on top."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        peft = make(target_modules=["embed_tokens", "lm_head"])
    registry = registry_of(peft)
    layer = registry.layers[EMBED]
    ids = torch.arange(VOCABULARY)
    whole = layer.get_base_layer().weight.detach().clone()
    whole[TOKENS] = rows_of(peft).detach()
    torch.testing.assert_close(layer(ids), whole + layer.get_delta_weight("default"), **CLOSE)
    output = logits_of(peft)
    before = Snapshot(peft)
    peft.merge_adapter()
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)
    peft.unmerge_adapter()
    before.assert_same(peft)
    peft.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tied")
        again = PeftModel.from_pretrained(build("llama", True), tmp_path)
    assert torch.equal(logits_of(again), output)
    with pytest.warns(UserWarning, match="shared a weight"):
        merged = peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), output, **CLOSE)


# ---- tokens alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[], None])
def test_tokens_alone(targets, tmp_path):
    torch.manual_seed(0)
    base = Words()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    peft = get_peft_model(base, config({"words": TOKENS}, target_modules=targets))
    randomise(peft)
    assert peft.get_nb_trainable_parameters()[0] == len(TOKENS) * WIDTH
    peft.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.words.{DELTA}"}
    fresh = Words()
    fresh.load_state_dict(state)
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(again(IDS), peft(IDS))


def test_status_and_flags():
    peft = make()
    status = get_model_status(peft)
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.active_adapters == ["default"]
    peft.set_requires_grad("default", requires_grad=False)
    assert get_model_status(peft).requires_grad == {"default": False}
    assert not any(parameter.requires_grad for parameter in peft.parameters())
    tied = make(tokens={"embed_tokens": TOKENS}, target_modules=["embed_tokens"], ensure_weight_tying=True)
    tied.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in tied.parameters())
    tied.set_requires_grad("default", requires_grad=True)
    assert get_model_status(tied).requires_grad == {"default": True}


# ---- what does not fit ---------------------------------------------------------------------------------

BAD = {
    "out of range": ([0, VOCABULARY], {}, rf"\[{VOCABULARY}\] are not among the {VOCABULARY} rows; resize"),
    "far out of range": ([10**6], {}, "are not among"),
    "twice": ([4, 5, 4], {}, "named twice"),
    "none": ([], {}, "no tokens are named"),
    "none by name": ({"embed_tokens": []}, {}, "no tokens are named"),
    "a norm": ({"norm": [1]}, {}, "model.norm: LlamaRMSNorm has no rows of tokens"),
    "unknown": ({"embed_token": [1]}, {}, "'embed_token' matches no module.*embed_tokens"),
    "whole": ([1], {"modules_to_save": ["embed_tokens"]}, "'model.embed_tokens' is trained whole"),
    "whole by ties": ([1], {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "trained whole"),
    "head whole": ({"lm_head": [1]}, {"modules_to_save": ["lm_head"]}, "'lm_head' is trained whole"),
    "different": (
        {"embed_tokens": [1], "lm_head": [2]},
        {"ensure_weight_tying": True},
        "ask for different tokens",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_does_not_fit(fault):
    tokens, fields, words = BAD[fault]
    model = build("llama", True)
    before = Snapshot(model)
    with pytest.raises(PlanError, match=f"(?s)trainable_token_indices.*{words}"):
        get_peft_model(model, config(tokens, **fields))
    before.assert_same(model)
    peft = make(tokens=[9])
    before = Snapshot(peft)
    with pytest.raises(PlanError):
        peft.add_adapter("other", config(tokens, **fields))
    before.assert_same(peft)


@pytest.mark.parametrize(
    "tokens", [[-1], ["1"], [1.5], {"embed_tokens": [-2]}, {"": [1]}, [True], "embed_tokens"]
)
def test_what_is_no_token(tokens):
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        config(tokens)


class Odd(nn.Module):
    """Modules with rows that cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.rescaled = nn.Embedding(9, 4, max_norm=1.0)
        self.attention = nn.MultiheadAttention(4, 1)
        self.conv = transformers.pytorch_utils.Conv1D(4, 4)
        self.bytes = nn.Embedding(9, 4, dtype=torch.float32)
        self.bytes.weight = nn.Parameter(torch.zeros(9, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rescaled", "max_norm"),
        ("out_proj", "has no rows of tokens"),
        ("conv", "Conv1D has no rows"),
        ("bytes", "not a plain matrix"),
        ("attention", "MultiheadAttention has no rows"),
    ],
)
def test_modules_without_rows(name, words):
    model = Odd()
    before = Snapshot(model)
    with pytest.raises(PlanError, match=words):
        get_peft_model(model, config({name: [1]}, target_modules=["lin"]))
    before.assert_same(model)


def test_a_list_needs_an_input_embedding():
    with pytest.raises(PlanError, match="names no input embedding; pass a dict"):
        get_peft_model(Odd(), config([1], target_modules=["lin"]))


def test_a_module_inside_a_whole_one_and_whole_ones_of_other_adapters():
    with pytest.raises(PlanError, match="trained whole"):
        get_peft_model(
            build("bert", True), config([4], target_modules=["query"], modules_to_save=["embeddings"])
        )
    peft = make(tie=False)
    before = Snapshot(peft)
    with pytest.raises(PlanError, match=r"modules_to_save: 'model.embed_tokens' .* carry another adapter"):
        peft.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    before.assert_same(peft)
    whole = get_peft_model(
        build("llama", False), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    before = Snapshot(whole)
    with pytest.raises(PlanError, match="trained whole"):
        whole.add_adapter("other", config())
    before.assert_same(whole)


def test_a_head_trained_whole_leaves_the_rows_to_the_embedding():
    with pytest.warns(UserWarning, match="lm_head.*of the tied modules"):
        peft = get_peft_model(build("llama", True), config(modules_to_save=["lm_head"]))
    assert set(registry_of(peft).saved) == {HEAD}
    assert registry_of(peft).layers[EMBED].token_adapter is not None
    peft(**batch()).loss.backward()


# ---- files ---------------------------------------------------------------------------------------------


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


KEY = f"base_model.model.{EMBED}.{DELTA}"
FAULTS = {
    "missing": (lambda t: t.pop(KEY), KeyMismatchError, "missing: .*token_adapter"),
    "shape": (
        lambda t: t.update({KEY: torch.zeros(3, WIDTH)}),
        KeyMismatchError,
        r"\(3, 16\), expected \(2, 16\)",
    ),
    "NaN": (lambda t: t[KEY].fill_(float("nan")), NonFiniteError, "token_adapter"),
    "unexpected": (
        lambda t: t.update({f"base_model.model.model.norm.{DELTA}": torch.zeros(2, WIDTH)}),
        KeyMismatchError,
        "unexpected: .*norm",
    ),
    "twice, another shape": (
        lambda t: t.update({f"base_model.model.{HEAD}.{DELTA}": torch.zeros(3, WIDTH)}),
        KeyMismatchError,
        r"lm_head.*\(3, 16\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_changes_nothing(fault, tmp_path):
    edit, error, words = FAULTS[fault]
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, edit)
    model = build("llama", True)
    before = Snapshot(model)
    with pytest.raises(error, match=f"(?s){words}"):
        PeftModel.from_pretrained(model, tmp_path)
    before.assert_same(model)
    peft = make(tokens=[9])
    before = Snapshot(peft)
    for name, options in (("other", {}), ("default", {"replace": True})):
        with pytest.raises(error):
            peft.load_adapter(tmp_path, name, **options)
        before.assert_same(peft)


def test_not_strict_takes_the_bases_own_rows(tmp_path):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop(KEY))
    peft = make(tokens=[9], seed=8)
    peft.merge_adapter()  # what is missing is the base's, not what is merged into it
    report = peft.load_adapter(tmp_path, "other", strict=False)
    assert report.missing_keys == (KEY,)
    peft.unmerge_adapter()
    base = build("llama", True).get_submodule(EMBED).weight
    assert torch.equal(rows_of(peft, name="other"), base[TOKENS])


def test_rows_that_a_file_holds_twice(tmp_path):
    """PEFT writes those of a tied head too where it does not know the tie."""
    peft = make()
    output = logits_of(peft)
    peft.save_pretrained(tmp_path)
    second = f"base_model.model.{HEAD}.{DELTA}"
    rewrite(tmp_path, lambda t: t.update({second: t[KEY].clone()}))
    again = PeftModel.from_pretrained(build("llama", True), tmp_path)
    assert torch.equal(logits_of(again), output)
    assert registry_of(again).layers[HEAD].tied_rows
    rewrite(tmp_path, lambda t: t[second].mul_(2))
    with pytest.warns(UserWarning, match="lm_head: is tied in this model, but was trained apart"):
        again = PeftModel.from_pretrained(build("llama", True), tmp_path)
    assert not registry_of(again).layers[HEAD].tied_rows
    assert torch.equal(rows_of(again, HEAD), 2 * rows_of(again))


def test_nothing_that_is_not_finite_is_merged():
    peft = make()
    with torch.no_grad():
        rows_of(peft)[0, 0] = float("inf")
    before = Snapshot(peft)
    for call in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(NonFiniteError, match="default"):
            call()
        before.assert_same(peft)


def test_values_of_rows_by_key():
    peft = make()
    new = torch.full((len(TOKENS), WIDTH), 0.5)
    set_peft_model_state_dict(peft, {KEY: new}, strict=False)
    assert torch.equal(rows_of(peft), new)
    assert not any(".tokens_" in key for key in peft.state_dict())


# ---- as a module ---------------------------------------------------------------------------------------


def test_a_copy_of_the_model_has_rows_of_its_own():
    peft = make()
    output = logits_of(peft)
    twin = copy.deepcopy(peft)
    with torch.no_grad():
        rows_of(twin).zero_()
    assert torch.equal(rows_of(twin, HEAD), rows_of(twin))
    assert not torch.equal(logits_of(twin), output)
    assert torch.equal(logits_of(peft), output)


def test_a_model_that_is_moved():
    peft = make()
    output = logits_of(peft)
    peft.double()
    assert rows_of(peft).dtype is torch.float64
    torch.testing.assert_close(logits_of(peft).float(), output, **CLOSE)
    peft.merge_adapter()
    peft.float()
    peft.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft), output, **CLOSE)


@pytest.mark.parametrize("reads", [False, True])
def test_compiled_in_one_graph(reads):
    peft = on_words(reads=reads)
    peft.add_adapter("other", config({"words": OTHERS, "out": OTHERS}, target_modules=[]))
    randomise(peft, "other", 5)
    peft.set_adapter(["default", "other"])
    output = peft(IDS)
    compiled = torch.compile(peft, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), output, **CLOSE)


def test_resizing_is_for_before():
    """Transformers refuses to resize an embedding that it does not know; nothing is lost by it."""
    peft = make()
    output = logits_of(peft)
    with pytest.raises(TypeError, match="Embedding"):
        peft.resize_token_embeddings(VOCABULARY + 1)
    assert torch.equal(logits_of(peft), output)


def test_tokens_are_no_layers_to_replicate_into():
    """Rows of an embedding are outside the layers; a merge is refused for the layers' sake alone."""
    peft = make(layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(UnsupportedError, match="layer_replication"):
        peft.merge_adapter()
