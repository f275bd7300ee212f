"""The limits of docs/design.md, read off the source: floors, rings, sizes, complexity, docstrings, light import."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "lorakit"
FILES = sorted(SOURCE.rglob("*.py"))

# A module may import from floors below its own; within a floor only as DESIGN's table says (see `may_import`).
FLOORS = {
    "errors": 0, "later": 0, "types": 0, "layouts": 0, "specs": 0, "report": 0, "config": 0,
    "ops": 1,
    "weights": 2,
    "init": 3, "combiners": 3, "variants": 3,
    "layers": 4,
    "checkpoint": 4,
    "surgery": 5,
    "loftq": 6,
    "configs": 6, "putting": 6, "kbit": 6, "tuner": 6, "state_dict": 6, "status": 6, "fitting": 6, "weighted": 6, "tools": 6, "loading": 6, "saving": 6, "exporting": 6, "penalties": 6, "peft_model": 6, "tasks": 6,
    "arrow": 6, "auto": 6, "api": 6, "padding": 6, "helpers": 6, "hotswap": 6, "optimizers": 6, "intruders": 6, "kappa": 6, "calibration": 6,
    "skeleton": 6, "estimating": 6, "diagnosis": 6, "training": 6, "inspection": 6, "extracting": 6,
    "demo": 7, "cli": 7, "__main__": 7,
}  # fmt: skip
FILE_SIDE, MODULE_SIDE = {"checkpoint"}, {"layers", "surgery"}


def room(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_run_time: bool) -> set[str]:
    """Modules of lorakit that a file imports, also `Later`; `at_run_time` leaves out those for type checking only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "lorakit")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "lorakit":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update((names & MODULES) or {node.module})
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Later":
            found.add(ast.literal_eval(node.args[0]))
        checked_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.orelse if at_run_time and checked_only else ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] == "lorakit"}


MODULES = {module_name(path) for path in FILES}


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    here = room(path)
    for name in imports(path, at_run_time=False):
        parts = name.split(".")
        there = parts[1] if len(parts) > 1 else ""
        assert there, f"{path}: imports the public door"
        if there != here:
            same_floor_allowed = FLOORS[here] in {0, 6, 7}
            assert FLOORS[there] < FLOORS[here] or (same_floor_allowed and FLOORS[there] == FLOORS[here]), (
                f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
            )
        assert not (here in MODULE_SIDE and there in FILE_SIDE), "the module side imports the file side"
        assert not (here in FILE_SIDE and there in MODULE_SIDE), "the file side imports the module side"


def test_no_ring_of_imports() -> None:
    graph = {module_name(path): imports(path, at_run_time=True) for path in FILES}
    graph.pop("lorakit")
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"ring: {' -> '.join((*trail, name))}"
        if name not in done and name in graph:
            for target in graph[name]:
                # importing a package runs its __init__, except for a module of that very package
                if not (name.startswith(target + ".") or name == target):
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - doc_lines
            assert length <= 60, f"{node.name}: {length} lines without its docstring"


def test_every_public_name_is_documented() -> None:
    import lorakit

    for name in lorakit.__all__:
        if name != "__version__":
            assert (getattr(lorakit, name).__doc__ or "").strip(), f"lorakit.{name} has no docstring"


def test_the_library_never_imports_peft() -> None:
    for path in FILES:
        assert not re.search(r"^\s*(import peft|from peft)\b", path.read_text(), re.MULTILINE), path


def measure_import(statement: str) -> dict[str, object]:
    code = (
        "import json, sys, time; start = time.process_time(); "
        f"{statement}; print(json.dumps([time.process_time() - start, sorted(sys.modules)]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, modules = json.loads(output.splitlines()[-1])
    return {"seconds": seconds, "modules": set(modules)}


HEAVY = {
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "accelerate",
    "typer",
    "rich",
    "matplotlib",
    "hqq",
}


def test_import_is_light() -> None:
    modules = measure_import("import lorakit")["modules"]
    assert not HEAVY & modules, f"import lorakit loads {sorted(HEAVY & modules)}"


def test_import_costs_little_over_torch() -> None:
    """At most 20 % over `import torch`, counted in modules loaded: a number that no busy machine can move."""
    torch_only = measure_import("import torch")["modules"]
    with_all = measure_import("from lorakit import PeftModel, get_peft_model")["modules"]
    ours = measure_import("import lorakit")["modules"]
    assert len(ours) <= 1.2 * len(torch_only)
    assert len(with_all - torch_only) < 1000
    assert "transformers" not in with_all


NAMES = "from lorakit import LoraConfig, PeftModel, get_peft_model"
ATTACH = (
    f"{NAMES}; from torch import nn; "
    "get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=['0']))"
)


def test_names_alone_load_what_they_are_and_no_more() -> None:
    """What attaching, loading and merging need comes when one of these is asked for; nor is anything else loaded."""
    more = measure_import(NAMES)["modules"] - measure_import("import torch, tqdm.auto")["modules"]
    rooms = {name.split(".")[1] for name in more if name.startswith("lorakit.")}
    assert rooms == {
        "api",
        "config",
        "configs",
        "errors",
        "later",
        "peft_model",
        "penalties",
        "putting",
        "tasks",
        "tuner",
    }
    assert {name.split(".")[0] for name in more} == {"lorakit"}


def test_attaching_loads_no_more_than_it_needs() -> None:
    modules = measure_import(ATTACH)["modules"]
    unneeded = {"checkpoint", "combiners", "hotswap", "loading", "saving", "status", "weighted"}
    assert not {f"lorakit.{room}" for room in unneeded} & modules
    assert {name for name in modules if name.startswith("lorakit.variants.")} == ATTACHING_VARIANTS
    assert "regex" not in modules
    assert not HEAVY & modules


ATTACHING_VARIANTS = {f"lorakit.variants.{name}" for name in ("registry", "variant", "alora", "nothing")}
