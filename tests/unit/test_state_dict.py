"""An adapter's tensors as a dictionary: taken out, put in, refused."""

from __future__ import annotations

import pytest
import torch

from lorakit import (
    AdapterNameError,
    AdapterStateError,
    KeyMismatchError,
    NonFiniteError,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from models import Snapshot, config, logits, tiny, with_adapter


@pytest.fixture
def peft():
    return with_adapter(tiny(0), seed=1, target_modules="all-linear")


def test_out_and_in(peft):
    values = get_peft_model_state_dict(peft)
    other = with_adapter(tiny(0), seed=2, target_modules="all-linear")
    assert not torch.equal(logits(peft), logits(other))
    report = set_peft_model_state_dict(other, values)
    assert report == ([], [])
    assert torch.equal(logits(peft), logits(other))


def test_out_of_a_gathered_state_dict(peft):
    gathered = {key: value.clone() for key, value in peft.state_dict().items()}
    found = get_peft_model_state_dict(peft, state_dict=gathered)
    direct = get_peft_model_state_dict(peft)
    assert found.keys() == direct.keys()
    assert all(torch.equal(found[key], direct[key]) for key in direct)
    lost = next(key for key in gathered if "lora_A" in key)
    del gathered[lost]
    with pytest.raises(KeyMismatchError, match=r"missing: .*lora_A"):
        get_peft_model_state_dict(peft, state_dict=gathered)


def test_a_compiled_model_is_looked_into(peft):
    compiled = torch.compile(peft, backend="eager")
    assert get_peft_model_state_dict(compiled).keys() == get_peft_model_state_dict(peft).keys()


def test_an_unknown_name_and_a_bare_model(peft):
    with pytest.raises(AdapterNameError, match="nope"):
        get_peft_model_state_dict(peft, adapter_name="nope")
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        get_peft_model_state_dict(tiny(0))


def without_first(values):
    return dict(list(values.items())[1:])


def reshaped(values):
    first = next(iter(values))
    return {**values, first: values[first][:-1]}


def poisoned(values):
    first = next(iter(values))
    return {**values, first: torch.full_like(values[first], float("nan"))}


@pytest.mark.parametrize(
    ("spoil", "strict", "error", "message"),
    [
        (without_first, True, KeyMismatchError, "missing"),
        (lambda values: {**values, "more": torch.ones(1)}, True, KeyMismatchError, "unexpected: more"),
        (reshaped, False, KeyMismatchError, "wrong shape"),
        (poisoned, False, NonFiniteError, "NaN"),
    ],
)
def test_refusals_change_nothing(peft, spoil, strict, error, message):
    other = with_adapter(tiny(0), seed=2, target_modules="all-linear")
    values = spoil(get_peft_model_state_dict(other))
    before = Snapshot(peft)
    with pytest.raises(error, match=message):
        set_peft_model_state_dict(peft, values, strict=strict)
    before.assert_same(peft)


def test_not_strict_lists_what_it_passed_over(peft):
    values = get_peft_model_state_dict(with_adapter(tiny(0), seed=2, target_modules="all-linear"))
    first = next(iter(values))
    given = {**without_first(values), "more": torch.ones(1)}
    report = set_peft_model_state_dict(peft, given, strict=False)
    assert report.missing_keys == [first]
    assert report.unexpected_keys == ["more"]


def test_a_merged_adapter_is_not_changed(peft):
    values = get_peft_model_state_dict(peft)
    peft.merge_adapter()
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        set_peft_model_state_dict(peft, values)


def test_injection_with_tensors_at_hand():
    first = inject_adapter_in_model(config(target_modules="all-linear", init_lora_weights=False), tiny(0))
    values = get_peft_model_state_dict(first)
    assert not any(key.startswith("base_model.") for key in values)
    second = inject_adapter_in_model(config(target_modules="all-linear"), tiny(0), state_dict=values)
    assert torch.equal(logits(first), logits(second))
    bare = tiny(0)
    before = Snapshot(bare)
    with pytest.raises(KeyMismatchError, match="missing"):
        inject_adapter_in_model(config(target_modules="all-linear"), bare, state_dict=without_first(values))
    before.assert_same(bare)
