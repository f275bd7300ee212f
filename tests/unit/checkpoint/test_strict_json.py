"""What strict_json takes and refuses, one row each."""

from __future__ import annotations

import tracemalloc

import pytest

from lorakit.config import strict_json
from lorakit.errors import AdapterFormatError, ConfigError


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"r": 8}', {"r": 8}),
        (b'\xef\xbb\xbf{"r": 8}', {"r": 8}),
        ('{"name": "\u00e9"}', {"name": "\u00e9"}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'{"a": "[[[[{{{{ \\" ]"}', {"a": '[[[[{{{{ " ]'}),
        (b'["\\\\", "\\\\\\""]', ["\\", '\\"']),
        (b"-9223372036854775808", -(2**63)),
        (b"1e-3", 1e-3),
        (b"[" * 32 + b"]" * 32, eval("[" * 32 + "]" * 32)),
    ],
)
def test_accepted(data, value):
    assert strict_json.loads(data, where="x") == value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON at line 1"),
        (b'{"r": 8', "not valid JSON at line 1"),
        (b'{"r": 8}x', "Extra data"),
        (b'{"r": 1, "r": 2}', "'r' occurs more than once"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' occurs more than once"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b"1" * 5000, "longer than 64 bits"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        ('"\ud800"', "not UTF-8"),
        (b'{"a": "\xff"}', "byte 7 is 0xff"),
        ('{"r": 8}'.encode("utf-16"), "UTF-16"),
        ('{"r": 8}'.encode("utf-16-le"), "UTF-16"),
        ('{"r": 8}'.encode("utf-32"), "UTF-16 or UTF-32"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 32 deep"),
        (b'{"a":' * 66 + b"1" + b"}" * 66, "nested more than 32 deep"),
        (b"[{" * 300_000, "nested more than 32 deep"),
        (b'"' + b'\\"' * 500_000, "not valid JSON"),
        (b" " * ((1 << 20) + 1), "at most 1,048,576"),
    ],
)
def test_refused(data, says):
    with pytest.raises(AdapterFormatError, match=says) as caught:
        strict_json.loads(data, where="folder/adapter_config.json")
    assert str(caught.value).startswith("folder/adapter_config.json")
    assert len(str(caught.value)) < 500


def test_a_long_input_is_refused_without_being_looked_at():
    data = b"[" * 50_000_000
    tracemalloc.start()
    with pytest.raises(AdapterFormatError):
        strict_json.loads(data, where="x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_dumps_is_canonical():
    assert strict_json.dumps({"b": {"z", "a"}, "a": "\u00e9", "c": ()}) == (
        '{\n  "a": "\u00e9",\n  "b": [\n    "a",\n    "z"\n  ],\n  "c": []\n}\n'.encode()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, "a"}, {1: 2, "a": 3}, "\ud800"])
def test_dumps_refuses(value):
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        strict_json.dumps({"field": value} if not isinstance(value, dict) else value)


def test_dumps_refuses_a_ring():
    ring: list = []
    ring.append(ring)
    with pytest.raises(ConfigError):
        strict_json.dumps(ring)
