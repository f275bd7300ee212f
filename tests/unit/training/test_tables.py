"""Rows from data sets: folders that `datasets` wrote or reads, and what names one."""

from __future__ import annotations

import json

import datasets
import pytest

from lorakit.errors import AdapterFormatError, AdapterNotFoundError, UnsupportedError
from lorakit.training.rows import CLASSES, kind_of_rows, read_rows
from lorakit.training.tables import names_data_set

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    return datasets.Dataset.from_list(ROWS, features=features)


@pytest.mark.parametrize("split", ["", ":train", ":train[:1]"])
def test_a_folder_of_files(tmp_path, split):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = read_rows(f"{tmp_path / 'rows'}{split}")
    assert found == (ROWS[:1] if "1" in split else ROWS)


def test_a_folder_that_datasets_wrote_has_labels_by_name(tmp_path):
    table().save_to_disk(tmp_path / "one")
    wanted = [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}]
    assert read_rows(tmp_path / "one") == wanted
    assert kind_of_rows(read_rows(tmp_path / "one"), "one") is CLASSES
    datasets.DatasetDict({"train": table(), "test": table().select([1])}).save_to_disk(tmp_path / "two")
    assert read_rows(f"{tmp_path / 'two'}:test") == wanted[1:]
    with pytest.raises(AdapterNotFoundError, match="no data set with a split 'none'"):
        read_rows(f"{tmp_path / 'two'}:none")


def test_a_repository_is_asked_for_by_name_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table()
    )
    assert read_rows("owner/name:test")[0] == {"text": "a", "label": "no"}
    assert asked == [(("owner/name",), {"split": "test"})]

    def offline(*_args, **_options):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        AdapterNotFoundError, match=r"owner/name: no data set with a split 'train' can be read: no network$"
    ):
        read_rows("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: table().select([]))
    with pytest.raises(AdapterFormatError, match="owner/name: no rows in it"):
        read_rows("owner/name")


def test_what_names_a_data_set(tmp_path):
    assert names_data_set("owner/name")
    assert names_data_set("owner/name-2.1:train[:10%]")
    assert names_data_set(str(tmp_path))
    for other in ("rows.jsonl", "data/rows.jsonl", "./owner/name", "/data/rows", "a/b/c", "name", ""):
        assert not names_data_set(other), other


def test_without_datasets_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UnsupportedError, match="pip install datasets; or pass a JSONL file"):
        read_rows(tmp_path)
