"""Names and file keys are inverses; renaming is exact and refuses collisions."""

from __future__ import annotations

import pytest

from lorakit.checkpoint.keys import apply_key_mapping, from_file_key, to_file_key
from lorakit.errors import AdapterFormatError, ConfigError


@pytest.mark.parametrize(
    "name", ["layers.0.q.lora_A.weight", "classifier.weight", "h.0.base_layer.bias", "base_model.model.x"]
)
def test_round_trip(name):
    assert from_file_key(to_file_key(name)) == name
    assert to_file_key(name) == "base_model.model." + name


@pytest.mark.parametrize(
    "key", ["", "base_model.model.", "lora_A.weight", "base_model.x", "xbase_model.model.a"]
)
def test_foreign_keys_are_refused(key):
    with pytest.raises(AdapterFormatError, match=r"base_model\.model\."):
        from_file_key(key)


@pytest.mark.parametrize(
    ("mapping", "renamed"),
    [
        ({}, ["model.a.x", "model.b.x"]),
        ({r"^model\.": ""}, ["a.x", "b.x"]),
        ({r"^model": "^model.language_model"}, ["model.language_model.a.x", "model.language_model.b.x"]),
        ({r"^model(?!\.b)": r"m(?!\.b)"}, ["m.a.x", "model.b.x"]),
        ({r"\.a": ".c", r"model": "never"}, ["model.c.x", "never.b.x"]),
        ({r"model\.(.)": r"\1.model"}, None),
    ],
)
def test_mapping(mapping, renamed):
    keys = ["model.a.x", "model.b.x"]
    if renamed is None:  # groups in a replacement are kept as \1 is no parenthesis
        renamed = ["a.model.x", "b.model.x"]
    assert apply_key_mapping(keys, mapping) == dict(zip(keys, renamed, strict=True))


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"[ab]": "c"}, "from a.x and b.x"),
        ({"(": "c"}, "not a valid rule"),
        ({"a": r"\3"}, "replacement"),
        ({"a": 3}, "not a valid rule"),
    ],
)
def test_bad_mappings(mapping, says):
    with pytest.raises(ConfigError, match=says):
        apply_key_mapping(["a.x", "b.x"], mapping)
