"""Rows as the model takes them: token ids, and of which of them the loss is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import ConfigError
from lorakit.training.rows import CHAT, CLASSES, PAIRS, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorakit.training.rows import Row

IGNORED = -100
"""The label of tokens of which no loss is taken."""
_MULTIPLE = 8  # of tokens, that batches are padded to: what matrix products on a GPU like


class Encoded(NamedTuple):
    """Rows as token ids.

    Attributes:
        rows: "input_ids" and "labels", a list as long as the ids, or of a classifier an int.
        notes: what should be known of how it was done.
    """

    rows: list[dict[str, Any]]
    notes: tuple[str, ...]


def encode_rows(
    rows: Sequence[Row],
    kind: Kind,
    tokenizer: Any,
    max_length: int,
    labels: Sequence[str | int],
    progress: Callable[[str, int, int], None],
) -> Encoded:
    """Turn rows into token ids.

    Args:
        rows: of this kind.
        kind: tells of which tokens the loss is taken: of all of a text, of a completion, of an assistant's turns.
        tokenizer: of transformers.
        max_length: longer rows are cut.
        labels: of a classifier.
        progress: is called with (what, done, total).

    Raises:
        ConfigError: the tokenizer has no chat template, or after cutting no row has a token to learn.
    """
    encode, notes = _encoder(kind, tokenizer, labels)
    found, cut, lost = [], 0, 0
    for done, row in enumerate(rows, 1):
        ids, learnt = encode(row)
        cut += len(ids) > max_length
        ids = ids[:max_length]
        learnt = learnt[:max_length] if isinstance(learnt, list) else learnt
        if isinstance(learnt, list) and all(label == IGNORED for label in learnt[1:]):
            lost += 1
        else:
            found.append({"input_ids": ids, "labels": learnt})
        if done % 100 == 0 or done == len(rows):
            progress("encode the rows", done, len(rows))
    if not found:
        raise ConfigError(
            f"max_length: within {max_length} tokens no row has one that the loss is taken of; raise it"
        )
    if cut:
        notes.append(f"{cut} of {len(rows)} rows are longer than {max_length} tokens and were cut")
    if lost:
        notes.append(f"{lost} rows were left out: nothing of what is to be learnt is left after cutting")
    return Encoded(found, tuple(notes))


def _encoder(kind: Kind, tokenizer: Any, labels: Sequence[str | int]) -> tuple[Any, list[str]]:
    if kind is CLASSES:
        places = {label: place for place, label in enumerate(labels)}
        return lambda row: (_ids(tokenizer, row["text"]), places[row["label"]]), []
    if kind is CHAT:
        return _chat_encoder(tokenizer)
    if kind is PAIRS:
        return lambda row: _pair(tokenizer, row), []
    return lambda row: _whole(tokenizer, row["text"]), []


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    return ids


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """The ids with the token that ends a text, so that the model learns to end."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _whole(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    ids = _ended(tokenizer, _ids(tokenizer, text))
    return ids, ids


def _pair(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Prompt and completion are tokenised apart, as they are when the model is asked."""
    prompt = _ids(tokenizer, row["prompt"])
    if tokenizer.eos_token_id is not None and prompt[-1:] == [tokenizer.eos_token_id]:
        prompt = prompt[:-1]  # some tokenizers end every text
    completion = _ended(tokenizer, _ids(tokenizer, row["completion"], special=False))
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _chat_encoder(tokenizer: Any) -> tuple[Any, list[str]]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "messages: the tokenizer has no chat template; use that of an instruct model, or give the rows as prompt and "
            "completion"
        )
    whole: list[int] = []
    notes: list[str] = []

    def encode(row: Row) -> tuple[list[int], list[int]]:
        ids, mask = _conversation(tokenizer, row["messages"])
        if mask is None:
            if not whole:
                notes.append(
                    "the chat template does not tell an assistant's turns from the rest, so the loss is taken of whole "
                    "conversations"
                )
            whole.append(1)
            return ids, ids
        return ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]

    return encode, notes


def _conversation(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool] | None]:
    """The ids of a conversation and which of them are an assistant's; None where the template does not tell.

    A template tells by marking them (`{% generation %}`), or by growing: what it makes of the turns before, with the
    beginning of an answer, is how what it makes of one turn more begins.
    """
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(own) for own in found["assistant_masks"]]
    ids = _rendered(tokenizer, messages)
    mask = [False] * len(ids)
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:place], answer=True) if place else []
        upto = _rendered(tokenizer, messages[: place + 1])
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            return ids, None
        mask[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return ids, mask


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], *, answer: bool = False) -> list[int]:
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=answer, return_dict=True)
    return list(found["input_ids"])


class Collator:
    """Pads rows to one length: ids and mask (batch, tokens), labels the same or of a classifier (batch,)."""

    def __init__(self, pad: int, kind: Kind, max_length: int) -> None:
        self._pad, self._classifies, self._most = pad, kind is CLASSES, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of these rows."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = min(-(-longest // _MULTIPLE) * _MULTIPLE, self._most)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        for place, row in enumerate(rows):
            count = len(row["input_ids"])
            ids[place, :count] = torch.tensor(row["input_ids"])
            mask[place, :count] = 1
            if not self._classifies:
                labels[place, :count] = torch.tensor(row["labels"])
        if self._classifies:
            labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
