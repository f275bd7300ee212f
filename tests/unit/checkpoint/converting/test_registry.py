"""The table in docs/convert.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from lorakit.checkpoint.converting.registry import FEATURES, FORMATS

PAGE = Path(__file__).parents[4] / "docs" / "convert.md"


def test_the_table_of_features():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    head = next(row for row in rows if row[0] == "PEFT")
    assert head == [form.title for form in FORMATS.values()]
    told = {row[0]: row[1:] for row in rows if row[0] in FEATURES.values()}
    assert told.keys() == set(FEATURES.values())
    for feature, title in FEATURES.items():
        wanted = ["yes" if feature in form.features else "no" for form in FORMATS.values()]
        assert told[title] == wanted, title


def test_the_page_names_every_format():
    page = PAGE.read_text()
    assert all(f"| `{name}` |" in page for name in FORMATS)
