"""Adapters come on whole or not at all, and go without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit import get_peft_model
from lorakit.errors import AdapterNameError, AdapterStateError, NonFiniteError
from lorakit.layers import LoraLayer, ModulesToSaveWrapper, ParameterSlot, Place
from lorakit.surgery import find_registry
from models import Snapshot, another, bits, config, ids, logits, tiny, tiny_bert, tiny_llama, with_adapter

EVERYTHING = {"modules_to_save": ["head"], "bias": "all"}
STEPS = (
    (LoraLayer, "__init__"),
    (LoraLayer, "add_stored"),
    (ModulesToSaveWrapper, "add"),
    (ParameterSlot, "add"),
)


@pytest.mark.parametrize("second", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize(("owner", "method"), STEPS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whichever_step_fails_the_model_is_as_it_was(monkeypatch, owner, method, second, error):
    failures = 0
    for n in range(20):
        model = tiny()
        model.embed.weight.requires_grad_(False)
        peft = with_adapter(model, "first", target_modules=["down"], bias="lora_only") if second else None
        before, output = Snapshot(model), logits(model)
        real, calls = getattr(owner, method), []

        def failing(*args, _real=real, _calls=calls, _n=n, **kwargs):
            _calls.append(1)
            if len(_calls) > _n:
                raise error("the disk of memory is full")
            return _real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, failing)
            try:
                if peft is None:
                    get_peft_model(model, config(**EVERYTHING), "new")
                else:
                    peft.add_adapter("new", config(**EVERYTHING))
            except error:
                failures += 1
            else:
                break
        before.assert_same(model)
        assert torch.equal(logits(model), output)
    assert failures >= 1
    assert n == failures, "the loop ended before every step had failed once"


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_unload_leaves_no_trace(changes):
    model = tiny()
    model.layers[0].requires_grad_(False)
    before, output = Snapshot(model), logits(model)
    peft = with_adapter(model, **changes)
    assert not torch.equal(logits(peft), output)
    another(peft, "other", target_modules=["v_proj"])
    assert peft.unload() is model
    before.assert_same(model)
    assert find_registry(model) is None


@pytest.mark.parametrize("merged", [False, True])
def test_unload_of_a_merged_model(merged):
    model = tiny(dtype=torch.bfloat16)
    before = Snapshot(model)
    peft = with_adapter(model, bias="lora_only")
    if merged:
        peft.merge_adapter()
    peft.unload()
    before.assert_same(model)


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"target_modules": ["down"]}], ids=str)
def test_add_then_delete_is_as_if_never_added(changes):
    peft = with_adapter(tiny())
    before = Snapshot(peft)
    another(peft, "other", **changes)
    peft.delete_adapter("other")
    before.assert_same(peft)


def test_delete_the_active_one_activates_another_and_the_last_leaves_the_base():
    model = tiny()
    output = logits(model)
    peft = with_adapter(model)
    another(peft, "other")
    with pytest.warns(UserWarning, match="'default' was deleted; 'other' is active"):
        peft.delete_adapter("default")
    assert peft.active_adapters == ["other"]
    peft.delete_adapter("other")
    assert peft.active_adapters == []
    assert torch.equal(logits(peft), output)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert find_registry(model) is None or not find_registry(model).layers


def test_delete_of_a_merged_one_is_refused():
    peft = with_adapter(tiny())
    peft.merge_adapter()
    before = Snapshot(peft)
    with pytest.raises(AdapterStateError, match="merged"):
        peft.delete_adapter("default")
    before.assert_same(peft)


class TiedBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k_proj.bias = self.q_proj.bias

    def forward(self, x):
        return self.k_proj(torch.tanh(self.q_proj(x)))


def test_a_tied_bias_stays_tied():
    model = TiedBiases()
    original = model.q_proj.bias
    peft = with_adapter(model, target_modules=["q_proj"], bias="lora_only")
    copy = peft.base_model.registry.slots["q_proj.bias"].copies["default"]
    assert model.q_proj.base_layer.bias is model.k_proj.bias is copy
    with peft.disable_adapter():
        assert model.q_proj.base_layer.bias is model.k_proj.bias is original
    peft.unload()
    assert model.q_proj.bias is model.k_proj.bias is original


def test_a_slot_by_itself():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.bias = one.bias
    original = one.bias
    slot = ParameterSlot([Place(one, "bias"), Place(two, "bias")])
    slot.add("a")
    slot.add("b", torch.ones(2), trainable=False)
    assert one.bias is original
    for name, trainable in (("a", True), ("b", False)):
        slot.set_adapter([name])
        assert one.bias is two.bias is slot.copies[name]
        assert one.bias.requires_grad is trainable
    with pytest.raises(AdapterStateError, match="only one"):
        slot.set_adapter(["a", "b"])
    slot.enable_adapters(False)
    assert one.bias is original
    slot.enable_adapters(True)
    slot.remove("b")
    assert one.bias is two.bias is original


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"bias": "lora_only"}, EVERYTHING], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_bit_for_bit(changes, merged):
    model = tiny()
    output = logits(model)
    peft = with_adapter(model, **changes)
    acting = logits(peft)
    if merged:
        peft.merge_adapter()
    with peft.disable_adapter():
        assert torch.equal(logits(peft), output)
    torch.testing.assert_close(logits(peft), acting, rtol=1e-4, atol=1e-5)
    if merged:
        peft.unmerge_adapter()
    assert torch.equal(logits(peft), acting)


def test_a_module_trained_whole():
    original = nn.Linear(3, 2)
    wrapper = ModulesToSaveWrapper(original)
    wrapper.add("a")
    assert wrapper.active_module is original
    wrapper.set_adapter(["a"])
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert wrapper.weight.requires_grad
    assert wrapper.weight is not original.weight
    wrapper.set_adapter(["a"], inference_mode=True)
    assert not wrapper.weight.requires_grad
    wrapper.enable_adapters(False)
    assert wrapper.active_module is original
    wrapper.enable_adapters(True)
    wrapper.remove("a")
    assert wrapper.active_module is original
    assert wrapper.out_features == 2
    with pytest.raises(AttributeError):
        _ = wrapper.no_such_thing


@pytest.mark.parametrize("changes", [{"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_two_owners_of_one_thing_are_refused_before_anything_changes(changes):
    peft = with_adapter(tiny(), **changes)
    another(peft, "other", **changes)
    before = Snapshot(peft)
    with pytest.raises(AdapterStateError, match="only one of them"):
        peft.set_adapter(["default", "other"])
    before.assert_same(peft)
    peft.set_adapter("other")
    assert peft.active_adapters == ["other"]


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "../x", "keys", "training", "__base__", "x" * 65, "é", "a\n", 3]
)
def test_bad_names_are_refused(name):
    model = tiny()
    before = Snapshot(model)
    with pytest.raises(AdapterNameError, match="adapter name"):
        get_peft_model(model, config(), name)
    before.assert_same(model)


def test_taken_and_unknown_names_are_refused():
    peft = with_adapter(tiny())
    before = Snapshot(peft)
    with pytest.raises(AdapterNameError, match="'default' exists already"):
        peft.add_adapter("default", config())
    for call in (
        peft.set_adapter,
        peft.delete_adapter,
        lambda name: peft.set_adapter(["default", name]),
        lambda name: peft.merge_adapter([name]),
        lambda name: peft.merge_and_unload(adapter_names=[name]),
        peft.base_model.set_adapter,
    ):
        with pytest.raises(AdapterNameError, match=r"'nope'.*'default'"):
            call("nope")
    before.assert_same(peft)


def test_wrapping_twice_is_refused():
    model = tiny()
    peft = with_adapter(model)
    before = Snapshot(peft)
    for victim in (peft, model, peft.base_model):
        with pytest.raises(AdapterStateError):
            get_peft_model(victim, config(), "other")
    before.assert_same(peft)


# ---- merging the whole model --------------------------------------------------------------------------


def test_a_merge_is_all_layers_or_none():
    peft = with_adapter(tiny())
    list(peft.base_model.registry.layers.values())[-1].lora_B["default"].weight.data[0, 0] = float("nan")
    before = Snapshot(peft)
    last = list(peft.base_model.registry.layers)[-1]
    for call in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(NonFiniteError, match=f"^{last}: "):
            call()
        before.assert_same(peft)


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"bias": "lora_only", "lora_bias": True}], ids=str)
def test_merge_and_unload(changes):
    model = tiny()
    model.layers[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    peft = with_adapter(model, **changes)
    wanted = logits(peft)
    merged = peft.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == flags
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert find_registry(model) is None


def test_merge_and_unload_of_a_tied_head():
    model = tiny_llama(tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embeddings = bits(model.model.embed_tokens.weight)
    with pytest.warns(UserWarning, match=r"lm_head.*tied modules.*ensure_weight_tying"):
        peft = with_adapter(model, target_modules=["lm_head", "q_proj"])
    wanted = logits(peft)
    with pytest.warns(UserWarning, match=r"shared a weight.*tie_word_embeddings"):
        merged = peft.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert bits(merged.model.embed_tokens.weight) == embeddings


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_merge_and_unload_interrupted_and_repeated(monkeypatch, after):
    peft = with_adapter(tiny(), bias="lora_only")
    wanted = logits(peft)
    real, calls = LoraLayer.commit_merge_for_good, []

    def interrupted(self, prepared):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        real(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayer, "commit_merge_for_good", interrupted)
        with pytest.raises(KeyboardInterrupt):
            peft.merge_and_unload()
    torch.testing.assert_close(logits(peft), wanted, rtol=1e-4, atol=1e-5)
    if after:
        with pytest.raises(AdapterStateError, match="merge_and_unload"):
            peft.unload()
    torch.testing.assert_close(logits(peft.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


def test_set_adapter_unmerges_and_says_so():
    peft = with_adapter(tiny())
    another(peft, "other")
    output = logits(peft)
    peft.merge_adapter()
    with pytest.warns(UserWarning, match="unmerging"):
        peft.set_adapter("default")
    assert torch.equal(logits(peft), output)


def test_a_classifier_is_trained_whole_by_its_task():
    model = tiny_bert()
    peft = get_peft_model(model, config(target_modules=["query"], task_type="SEQ_CLS"))
    assert list(peft.base_model.registry.saved) == ["classifier"]
    assert peft(input_ids=ids()).logits.shape == (2, 3)
