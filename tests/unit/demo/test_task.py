"""The demo's task: right labels, balance, no leak between its sides, the same in every process."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from lorakit.demo.task import LABEL_NAMES, MASK, Task, _distinct_lines, _masked_lines, build_task
from lorakit.errors import UnsupportedError


@pytest.fixture(scope="module")
def task() -> Task:
    return build_task()


@pytest.fixture
def library(tmp_path):
    """A standard library of 40 modules, each with one line of each label that names its module."""
    for number in range(40):
        lines = f"m{number} == 1\nm{number} is None\nm{number} in (1, 2)\nm{number} < 3\n"
        (tmp_path / f"m{number}.py").write_text(lines + "raise SystemExit('executed')\n")
    return tmp_path


def count_sides(library):
    """(train, test): how many modules of the 40 are on each side."""
    train = next(n for n in range(40, 0, -1) if _fits(library, train_per_label=n, test_per_label=1))
    return train, 40 - train


def _fits(library, **sizes):
    try:
        build_task(standard_library=library, **sizes)
    except UnsupportedError:
        return False
    return True


def whole_task(library):
    train, test = count_sides(library)
    return build_task(standard_library=library, train_per_label=train, test_per_label=test)


@pytest.mark.parametrize(
    ("line", "text", "label"),
    [
        ("if a == b: pass", "if a [MASK] b: pass", "equality"),
        ("x = y['=='] !=  'é'", "x = y['=='] [MASK] 'é'", "equality"),
        ("assert 'é' is None", "assert 'é' [MASK] None", "identity"),
        ("while this is not (is_): pass", "while this [MASK] (is_): pass", "identity"),
        ("r = [i for i in z if (i) in z]", "r = [i for i in z if (i) [MASK] z]", "membership"),
        ("k   not in  d", "k [MASK] d", "membership"),
        ("i < 1", "i [MASK] 1", "order"),
        ("i <= 1", "i [MASK] 1", "order"),
        ("i > 1", "i [MASK] 1", "order"),
        ("i >= 1", "i [MASK] 1", "order"),
        ("    \nif f('\\d') == 1: pass  # a == b", "if f('\\d') [MASK] 1: pass # a == b", "equality"),
    ],
)
def test_a_comparison_gives_its_line_and_kind(line, text, label):
    assert list(_masked_lines(line.encode())) == [(text, LABEL_NAMES.index(label))]


@pytest.mark.parametrize(
    "line",
    [
        "0 < i < 3",
        "x = a + b",
        "for i in z: pass",
        "'a == b'",
        "(a\n == b)",
        "(a ==\n b)",
        f"{'a' * 101} == 1",
    ],
)
def test_what_is_no_single_short_comparison_gives_nothing(line):
    assert list(_masked_lines(line.encode())) == []


def test_other_encodings_and_line_ends_are_read():
    source = "# -*- coding: latin-1 -*-\r\n'é' == ü\r\n".encode("latin-1")
    assert list(_masked_lines(source)) == [("'é' [MASK] ü", 0)]


def test_the_real_task_is_balanced(task):
    assert task.label_names == LABEL_NAMES
    assert Counter(task.train.labels) == dict.fromkeys(range(4), 900)
    assert Counter(task.test.labels) == dict.fromkeys(range(4), 250)


def test_no_text_is_twice_in_the_real_task(task):
    texts = task.train.texts + task.test.texts
    assert len(set(texts)) == len(texts) == 4600
    assert all(text.count(MASK) == 1 and len(text) <= 100 for text in texts)


def test_labels_are_mixed_in_the_real_task(task):
    assert all(len(set(task.train.labels[start : start + 50])) == 4 for start in range(0, 3600, 50))


def test_a_module_lies_whole_on_one_side(library):
    task = whole_task(library)
    sides = [{text.split()[0] for text in split.texts} for split in (task.train, task.test)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"m{number}" for number in range(40)}
    assert 20 < len(sides[0]) < 38


def test_repeated_and_ambiguous_texts(library):
    for path in library.iterdir():
        path.write_text("same == 1\nboth == 1\n" * 2 + path.read_text())
    (library / "z.py").write_text("both is 1\n")
    found = _distinct_lines(library)
    assert found["same [MASK] 1"] == ("m0", 0)  # once, on the side of its first module
    assert "both [MASK] 1" not in found
    assert len(found) == 4 * 40 + 1


@pytest.mark.parametrize("folder", ["test", "site-packages", "tkinter", "json/tests"])
def test_parts_that_may_be_missing_are_not_read(library, folder):
    before = whole_task(library)
    (library / folder).mkdir(parents=True)
    (library / folder / "bad.py").write_text("not python == at all")
    assert whole_task(library) == before


def test_same_task_in_every_process(library):
    script = (
        "import sys, pathlib, lorakit.demo.task as t;"
        "print(t.build_task(train_per_label=9, test_per_label=3, standard_library=pathlib.Path(sys.argv[1])))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, str(library)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    expected = build_task(train_per_label=9, test_per_label=3, standard_library=library)
    assert outputs == {f"{expected}\n"}


def test_too_few_texts_are_refused_with_every_shortfall(library):
    with pytest.raises(UnsupportedError, match="too few comparisons") as caught:
        build_task(standard_library=library, train_per_label=41, test_per_label=1)
    for name in LABEL_NAMES:
        assert f"{name}: " in str(caught.value)
    assert "test texts found" not in str(caught.value)
    assert "41 wanted" in str(caught.value)
    assert str(library) in str(caught.value)
