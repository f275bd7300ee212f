"""Rows from data sets of the `datasets` package: a folder, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from lorakit.training.rows import Row

_NAME = re.compile(r"(?P<place>[^:]+)(:(?P<split>[\w.\[\]:%+-]+))?")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OF_FILES = (".jsonl", ".json", ".csv", ".txt", ".parquet")


def names_data_set(text: str) -> bool:
    """Whether a text names a data set: a folder, or owner/name; with ":split" behind it or not."""
    found = _NAME.fullmatch(text)
    if found is None:
        return False
    place = found["place"]
    return Path(place).expanduser().is_dir() or (
        _HUB.fullmatch(place) is not None and not place.endswith(_OF_FILES)
    )


def read_data_set(text: str) -> list[Row]:
    """The rows of a data set's split, of "train" where the text names none; labels by name where they have names.

    Args:
        text: a folder that `datasets` reads or wrote, or owner/name on the hub; ":split" may follow.

    Raises:
        AdapterNotFoundError: there is no such data set or split, or it cannot be read.
        UnsupportedError: datasets is not installed.
    """
    found = _NAME.fullmatch(text)
    assert found is not None
    place, split = found["place"], found["split"] or "train"
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            f"{text}: a data set needs datasets: pip install datasets; or pass a JSONL file"
        ) from error
    folder = Path(place).expanduser()
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            table = datasets.load_from_disk(str(folder))
            table = table[split] if isinstance(table, dict) else table
        else:
            table = datasets.load_dataset(str(folder) if folder.is_dir() else place, split=split)
        rows = [dict(row) for row in table]
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise AdapterNotFoundError(
            f"{text}: no data set with a split {split!r} can be read: {reason}"
        ) from error
    return _named(rows, table.features)


def _named(rows: list[Row], features: Any) -> list[Row]:
    names = getattr(features.get("label"), "names", None)
    if not names:
        return rows
    return [row | {"label": names[row["label"]]} if 0 <= row["label"] < len(names) else row for row in rows]
