"""Rows to train on: JSONL files, what kind of rows they hold, and a part held out."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.config import TaskType, strict_json
from lorakit.errors import AdapterError, AdapterFormatError, AdapterNotFoundError, ConfigError, bullet_list
from lorakit.training.tables import names_data_set, read_data_set

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Row = dict[str, Any]
_MAX_LINE = 16 << 20
_SHOWN = 10


class Kind(NamedTuple):
    """A kind of rows.

    Attributes:
        name: for messages.
        task: what such rows train.
        fields: those that a row must have, with a check of each.
    """

    name: str
    task: TaskType
    fields: Mapping[str, Callable[[object], bool]]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_label(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or _is_text(value)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and _is_text(turn.get("role")) and isinstance(turn.get("content"), str)
            for turn in value
        )
        and any(turn["role"] == "assistant" for turn in value)
    )


CLASSES = Kind("text and label", TaskType.SEQ_CLS, {"text": _is_text, "label": _is_label})
CHAT = Kind("messages", TaskType.CAUSAL_LM, {"messages": _is_conversation})
PAIRS = Kind(
    "prompt and completion",
    TaskType.CAUSAL_LM,
    {"prompt": lambda value: isinstance(value, str), "completion": _is_text},
)
TEXTS = Kind("text", TaskType.CAUSAL_LM, {"text": _is_text})
KINDS = (CLASSES, CHAT, PAIRS, TEXTS)  # the first whose fields a row has


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSONL file: one JSON object a line; empty lines are passed over. Or of a data set (`tables`).

    Raises:
        AdapterNotFoundError: there is no such file or data set.
        AdapterFormatError: a line is no JSON object, or there is none; names the lines.
        UnsupportedError: a data set is named, and datasets is not installed.
    """
    file = Path(path).expanduser()
    if not file.is_file() and names_data_set(os.fspath(path)):
        rows = read_data_set(os.fspath(path))
        return _some(rows, path)
    if not file.is_file():
        raise AdapterNotFoundError(f"{file}: no such file; wanted JSONL, one JSON object a line")
    rows = []
    wrong: list[str] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = strict_json.loads(line.rstrip(b"\r\n"), where=f"line {number}", max_bytes=_MAX_LINE)
            except AdapterError as error:
                wrong.append(str(error))
            else:
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    wrong.append(f"line {number}: a {type(row).__name__}, wanted an object of fields")
            if len(wrong) == _SHOWN:
                break
    if wrong:
        raise AdapterFormatError(bullet_list(f"{file}: not JSONL", wrong))
    return _some(rows, file)


def _some(rows: list[Row], path: str | os.PathLike[str]) -> list[Row]:
    if not rows:
        raise AdapterFormatError(f"{path}: no rows in it")
    return rows


def kind_of_rows(rows: Sequence[Row], where: str, task: str | None = None) -> Kind:
    """What kind of rows these are: the first kind whose fields the first row has, and all have.

    Args:
        rows: at least one.
        where: what they are from, for messages.
        task: only kinds that train this task.

    Raises:
        ConfigError: they are of no kind, or not all of the same; names the rows.
    """
    fitting = [kind for kind in KINDS if task is None or kind.task == task]
    kind = next((kind for kind in fitting if kind.fields.keys() <= rows[0].keys()), None)
    if kind is None:
        names = "; ".join(kind.name for kind in fitting)
        raise ConfigError(
            f"{where}: its first row has the fields {sorted(rows[0])}, wanted one of these kinds: {names}"
        )
    wrong = [
        f"row {number}: {name}: {_shown(row, name)}"
        for number, row in enumerate(rows, 1)
        for name, is_good in kind.fields.items()
        if not (name in row and is_good(row[name]))
    ]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
        raise ConfigError(
            bullet_list(
                f"{where}: rows of {kind.name}, but for these", [*wrong[:_SHOWN], *more], _WANTED[kind.name]
            )
        )
    return kind


_WANTED = {
    CLASSES.name: "Wanted a non-empty text, and a label that is a text or an int.",
    CHAT.name: 'Wanted a list of {"role", "content"}, both texts, with an "assistant" among the roles.',
    PAIRS.name: "Wanted two texts, the completion not empty.",
    TEXTS.name: "Wanted a non-empty text.",
}


def _shown(row: Row, name: str) -> str:
    return f"got {str(row[name])[:80]!r}" if name in row else "missing"


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to judge by, drawn by a seed; at least one of each where a share is asked for.

    Raises:
        ConfigError: there are fewer than two rows.
    """
    if not share:
        return list(rows), []
    if len(rows) < 2:
        raise ConfigError("eval_share: there is one row, wanted two or more to hold some out")
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))  # noqa: S311 - no secret
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [rows[index] for index in sorted(chosen)]


def labels_of(rows: Sequence[Row], others: Sequence[Row]) -> tuple[str | int, ...]:
    """The labels of the training rows in their order; ints before texts.

    Raises:
        ConfigError: there is one alone, or the other rows have labels that these do not.
    """
    found = sorted({row["label"] for row in rows}, key=lambda label: (isinstance(label, str), label))
    if len(found) < 2:
        raise ConfigError(f"label: every row has {found[0]!r}, wanted two labels or more")
    unknown = sorted({str(row["label"]) for row in others if row["label"] not in set(found)})
    if unknown:
        raise ConfigError(f"label: the rows to judge by have {unknown[:_SHOWN]}, which no training row has")
    return tuple(found)
