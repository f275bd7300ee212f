"""Token ids, and of which of them the loss is taken."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.training.encoding import IGNORED, Collator, encode_rows
from lorakit.training.rows import CHAT, CLASSES, PAIRS, TEXTS
from words import CHAT as GROWING
from words import MARKED, OPAQUE, WORDS, tokenizer

TALK = [
    {"role": "system", "content": "a b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"}, {"role": "assistant", "content": "yes"},
]  # fmt: skip


def encoded(kind, rows, words=None, most=64, labels=()):
    told = []
    found = encode_rows(rows, kind, words or tokenizer(), most, labels, lambda *report: told.append(report))
    assert told[-1] == ("encode the rows", len(rows), len(rows))
    return found


def text_of(ids):
    return " ".join(WORDS[index] for index in ids)


def learnt(row):
    return text_of(index for index in row["labels"] if index != IGNORED)


def test_of_a_text_all_is_learnt_and_the_end_too():
    (row,), notes = encoded(TEXTS, [{"text": "a b"}])
    assert text_of(row["input_ids"]) == "<s> a b </s>"
    assert row["labels"] == row["input_ids"]
    assert notes == ()
    (row,), _ = encoded(TEXTS, [{"text": "a </s>"}])
    assert text_of(row["input_ids"]) == "<s> a </s>"


def test_of_a_pair_the_completion_alone_is_learnt():
    (row,), _ = encoded(PAIRS, [{"prompt": "a b", "completion": "c"}])
    assert text_of(row["input_ids"]) == "<s> a b c </s>"
    assert learnt(row) == "c </s>"
    assert row["labels"][:3] == [IGNORED] * 3


@pytest.mark.parametrize(
    ("template", "answers"), [(GROWING, "d e </s> yes </s>"), (MARKED, "d e </s> yes </s>")]
)
def test_of_a_conversation_the_answers_alone_are_learnt(template, answers):
    (row,), notes = encoded(CHAT, [{"messages": TALK}], tokenizer(template, begins=False))
    shown = "system : a b </s> user : c </s> assistant : d e </s> user : f </s> assistant : yes </s>"
    assert text_of(row["input_ids"]) == shown
    assert learnt(row) == answers
    assert len(row["labels"]) == len(row["input_ids"])
    assert notes == ()


def test_a_template_that_does_not_tell_is_learnt_whole_and_said_once():
    (first, _), notes = encoded(CHAT, [{"messages": TALK}] * 2, tokenizer(OPAQUE, begins=False))
    assert first["labels"] == first["input_ids"]
    assert len(notes) == 1
    assert "does not tell" in notes[0]


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        encoded(CHAT, [{"messages": TALK}], tokenizer(None))


def test_labels_become_their_places():
    rows, _ = encoded(
        CLASSES, [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}], labels=("no", "yes")
    )
    assert [row["labels"] for row in rows] == [0, 1]


def test_long_rows_are_cut_and_empty_ones_left_out_and_said():
    rows = [
        {"prompt": "a", "completion": "b c d e"},
        {"prompt": "a b c d e f", "completion": "a"},
        {"prompt": "a", "completion": "b"},
    ]
    found, notes = encoded(PAIRS, rows, most=4)
    assert [text_of(row["input_ids"]) for row in found] == ["<s> a b c", "<s> a b </s>"]
    assert any("2 of 3 rows are longer than 4 tokens" in note for note in notes)
    assert any("1 rows were left out" in note for note in notes)
    with pytest.raises(ConfigError, match="within 2 tokens no row"):
        encoded(PAIRS, rows, most=2)


def test_batches_are_padded_to_the_right():
    rows, _ = encoded(
        PAIRS, [{"prompt": "a", "completion": "b"}, {"prompt": "a b c d e f a b", "completion": "c"}]
    )
    batch = Collator(7, PAIRS, 64)(rows)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 16)
    )
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 11]
    assert (batch["input_ids"][0, 4:] == 7).all()
    assert (batch["labels"][0, 4:] == IGNORED).all()
    assert Collator(7, PAIRS, 12)(rows)["input_ids"].shape == (2, 12)  # no more than the model takes
    batch = Collator(0, CLASSES, 64)([{"input_ids": [1, 2], "labels": 1}])
    assert torch.equal(batch["labels"], torch.tensor([1]))
