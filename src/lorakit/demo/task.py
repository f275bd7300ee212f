"""The demo's text classification task: which kind of comparison was taken out of a line of Python?

The lines come from the standard library of the running Python, so the task is real, needs no download and is the
same for every run of one Python release: no random numbers, no dependence on hash seeds or on optional modules.
Source files are parsed with `ast`, never imported or executed.

    >>> task = build_task()
    >>> task.train.texts[0], task.label_names[task.train.labels[0]]  # doctest: +SKIP
    ('if group [MASK] None and not add_flags:', 'identity')

No text is on both sides of the split: a top-level module or package lies whole in the training or in the test part,
a text that occurs in several modules counts for the first of them, and a text seen with two labels is left out.
Every label has the same number of texts.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterator

MASK = "[MASK]"
"""What stands in a text where the operator was: the mask token of BERT tokenizers."""

LABEL_NAMES = ("equality", "identity", "membership", "order")
"""The kinds of comparison: `== !=`, `is` and `is not`, `in` and `not in`, `< <= > >=`."""

_OPERATORS: dict[type[ast.cmpop], tuple[bytes, int]] = {
    ast.Eq: (b"==", 0),
    ast.NotEq: (b"!=", 0),
    ast.Is: (b"is", 1),
    ast.IsNot: (b"is not", 1),
    ast.In: (b"in", 2),
    ast.NotIn: (b"not in", 2),
    ast.Lt: (b"<", 3),
    ast.LtE: (b"<=", 3),
    ast.Gt: (b">", 3),
    ast.GtE: (b">=", 3),
}

# Python is packaged with some of its parts left out; a task without these parts is the same for every packager.
_SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "_pyrepl",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
        "venv",
    }
)
_MAX_CHARACTERS = 100
_TEST_PERCENT = 25


@dataclass(frozen=True, slots=True)
class Split:
    """One side of a task.

    Attributes:
        texts: lines of code with `MASK` in the place of one comparison operator, all different.
        labels: for each text the index of its label in `Task.label_names`.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A text classification task.

    Attributes:
        label_names: the name of label 0, 1 and so on.
        train: what to learn from.
        test: what to judge by; from other modules than `train`.
    """

    label_names: tuple[str, ...]
    train: Split
    test: Split


def build_task(
    *, train_per_label: int = 900, test_per_label: int = 250, standard_library: Path | None = None
) -> Task:
    """Build the task from the source files of the standard library.

    Args:
        train_per_label: how many training texts each label gets.
        test_per_label: how many test texts each label gets.
        standard_library: the folder to read; None is that of the running Python.

    Returns:
        A balanced task: `len(LABEL_NAMES) * train_per_label` and `len(LABEL_NAMES) * test_per_label` texts.

    Raises:
        UnsupportedError: the folder does not hold enough comparisons, as when Python came without its sources.
    """
    root = standard_library or Path(sysconfig.get_path("stdlib"))
    found = _distinct_lines(root)
    sizes = {"train": train_per_label, "test": test_per_label}
    pools: dict[tuple[str, int], list[str]] = {
        (side, label): [] for side in sizes for label in range(len(LABEL_NAMES))
    }
    for text, (module, label) in found.items():
        side = "test" if _hash(module) % 100 < _TEST_PERCENT else "train"
        pools[side, label].append(text)
    short = [
        f"{LABEL_NAMES[label]}: {len(pool)} {side} texts found, {sizes[side]} wanted"
        for (side, label), pool in pools.items()
        if len(pool) < sizes[side]
    ]
    if short:
        hint = "Ask for fewer texts, or use a Python installed with its .py files."
        raise UnsupportedError(bullet_list(f"{root}: too few comparisons in its source files", short, hint))
    return Task(LABEL_NAMES, *(_split(pools, side, size) for side, size in sizes.items()))


def _split(pools: dict[tuple[str, int], list[str]], side: str, size: int) -> Split:
    rows = [
        (text, label)
        for (of, label), pool in pools.items()
        if of == side
        for text in sorted(pool, key=_hash)[:size]
    ]
    rows.sort(
        key=lambda row: _hash("mix " + row[0])
    )  # the hash that chose the texts would put rare labels last
    return Split(tuple(text for text, _ in rows), tuple(label for _, label in rows))


def _distinct_lines(root: Path) -> dict[str, tuple[str, int]]:
    """Every text with its first module and its label; texts seen with two labels are left out."""
    first: dict[str, tuple[str, int]] = {}
    ambiguous: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts):
            module = parts[0].removesuffix(".py")
            for text, label in _masked_lines(path.read_bytes()):
                if first.setdefault(text, (module, label))[1] != label:
                    ambiguous.add(text)
    return {text: row for text, row in first.items() if text not in ambiguous}


def _masked_lines(source: bytes) -> Iterator[tuple[str, int]]:
    """Yield (text, label) for each comparison of two operands whose operator stands on one line with them."""
    code = decode_source(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not the demo's business
        tree = ast.parse(code)
    lines = code.encode().split(b"\n")  # ast counts columns in UTF-8 bytes
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = node.left, node.comparators[0]
            operator, label = _OPERATORS[type(node.ops[0])]
            assert left.end_lineno is not None
            line = lines[left.end_lineno - 1]
            start = line.find(operator, left.end_col_offset)
            if left.end_lineno == right.lineno and 0 <= start < right.col_offset:
                masked = line[:start] + MASK.encode() + line[start + len(operator) :]
                text = " ".join(masked.decode().split())
                if len(text) <= _MAX_CHARACTERS:
                    yield text, label


def _hash(text: str) -> int:
    """A number that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
