"""Rows: reading, kinds, holding out, labels."""

from __future__ import annotations

import json

import pytest

from lorakit.errors import AdapterFormatError, AdapterNotFoundError, ConfigError
from lorakit.training.rows import CHAT, CLASSES, PAIRS, TEXTS, hold_out, kind_of_rows, labels_of, read_rows

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [
    (CLASSES, {"text": "a", "label": "yes"}),
    (CHAT, {"messages": TALK}),
    (PAIRS, {"prompt": "", "completion": "b"}),
    (TEXTS, {"text": "a", "other": 1}),
]


def test_lines_become_rows(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\n{"text": "\xc3\xa4"}')
    assert read_rows(path) == [{"text": "a"}, {"text": "ä"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "a"}\n{"text": \n[1]\n',
            r"line 2: not valid JSON(?s:.*)line 3: a list, wanted an object",
        ),
        (b'{"a": 1, "a": 2}', "line 1: the key 'a' occurs more than once"),
        (b"\xff", "line 1: not UTF-8"),
        (b"\n\n", "no rows in it"),
    ],
)
def test_what_is_no_jsonl_is_refused_with_its_lines(tmp_path, content, message):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(AdapterFormatError, match=message):
        read_rows(tmp_path / "r.jsonl")


def test_ten_bad_lines_are_enough(tmp_path):
    (tmp_path / "r.jsonl").write_text("x\n" * 100)
    with pytest.raises(AdapterFormatError) as caught:
        read_rows(tmp_path / "r.jsonl")
    assert str(caught.value).count("\n  - ") == 10
    with pytest.raises(AdapterNotFoundError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize(("kind", "row"), ROWS, ids=[kind.name for kind, _ in ROWS])
def test_kinds_are_told_by_their_fields(kind, row):
    assert kind_of_rows([row] * 2, "here") is kind


def test_a_task_chooses_among_kinds():
    both = {"text": "a", "label": 1}
    assert kind_of_rows([both], "here") is CLASSES
    assert kind_of_rows([both], "here", "CAUSAL_LM") is TEXTS
    with pytest.raises(ConfigError, match=r"fields \['text'\], wanted one of these kinds: text and label"):
        kind_of_rows([{"text": "a"}], "here", "SEQ_CLS")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], r"fields \['question'\]"),
        ([{"text": "a"}, {"text": ""}, {"prompt": "b"}], "row 2: text: got ''(?s:.*)row 3: text: missing"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1.5}, {"text": "c", "label": True}], "row 2: label: got '1.5'(?s:.*)row 3"),
        ([{"messages": TALK}, {"messages": TALK[:1]}, {"messages": "a"}, {"messages": [{"role": "user"}]}], "row 2(?s:.*)row 3(?s:.*)row 4"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": 3, "completion": ""}], "row 2: prompt(?s:.*)row 2: completion"),
    ],
)  # fmt: skip
def test_rows_of_no_kind_are_named(rows, message):
    with pytest.raises(ConfigError, match=message):
        kind_of_rows(rows, "here")


def test_holding_out_is_a_partition_that_a_seed_fixes():
    rows = [{"text": str(number)} for number in range(20)]
    train, judged = hold_out(rows, 0.25, seed=3)
    assert len(judged) == 5
    assert sorted(json.dumps(row) for row in train + judged) == sorted(map(json.dumps, rows))
    assert hold_out(rows, 0.25, seed=3) == (train, judged)
    assert hold_out(rows, 0.25, seed=4) != (train, judged)
    assert hold_out(rows, 0.0, seed=3) == (rows, [])
    assert [len(part) for part in hold_out(rows[:2], 0.01, seed=0)] == [1, 1]
    with pytest.raises(ConfigError, match="there is one row"):
        hold_out(rows[:1], 0.5, seed=0)


def test_labels_are_those_of_the_training_rows():
    rows = [{"label": "b"}, {"label": "a"}, {"label": "b"}]
    assert labels_of(rows, [{"label": "a"}]) == ("a", "b")
    assert labels_of([{"label": 10}, {"label": 2}], []) == (2, 10)
    with pytest.raises(ConfigError, match="every row has 'a'"):
        labels_of([{"label": "a"}], [])
    with pytest.raises(ConfigError, match="which no training row has"):
        labels_of(rows, [{"label": "c"}])
