"""`lorakit inspect`: the terminal, the page and the image, of sound, damaged and hostile adapters."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from xml.etree import ElementTree as ET

import pytest
from safetensors.torch import load_file, save_file

from cli import as_json, fill_disk, refused, run, succeed
from lorakit.inspection import make_grid, picture
from models import tiny_llama, with_adapter

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FOREIGN = "<script>alert('x')</script> & $\\alpha$ [red]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound adapter, and one with a dead layer, a NaN, a trained norm and a base of a hostile name."""
    root = tmp_path_factory.mktemp("adapters")
    with_adapter(tiny_llama(), r=4, target_modules=["q_proj", "v_proj", "down_proj"]).save_pretrained(
        root / "good"
    )
    odd = with_adapter(
        tiny_llama(),
        r=4,
        target_modules="all-linear",
        modules_to_save=["model.norm"],
        base_model_name_or_path=FOREIGN,
    )
    odd.save_pretrained(root / "odd")
    tensors = load_file(root / "odd" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].zero_()
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, root / "odd" / "adapter_model.safetensors", {"made_by": FOREIGN})
    return root


def test_the_terminal(folders):
    text = succeed("inspect", folders / "good")
    for wanted in (
        "LoRA, r=4, lora_alpha=8",
        "digest: fits",
        "config: as saved",
        "self_attn.q_proj",
        "factors",
    ):
        assert wanted in text, wanted
    text = succeed("inspect", folders / "odd")
    for wanted in (
        "digest: none",
        FOREIGN,
        "NaN or infinity in model.layers.1.mlp.up_proj",
        "dead, the change is zero: model.layers.0.self_attn.q_proj",
        "modules saved whole",
    ):
        assert wanted in text, wanted
    rows = succeed("inspect", folders / "odd", "--layers", "--rows", "0").splitlines()
    assert sum(row.startswith("model.layers.") for row in rows) == 14
    assert any(row.startswith("model.layers.1.mlp.up_proj") and "1 NaN" in row for row in rows)


def test_json(folders):
    told = as_json("inspect", folders / "odd")
    assert told["base"] == FOREIGN
    assert told["non_finite"] == ["model.layers.1.mlp.up_proj"]
    assert told["dead"] == ["model.layers.0.self_attn.q_proj"]
    assert len(told["layers"]) == 14
    assert len(told["layers"][0]["spectrum"]) == 4


def parsed(path):
    """The page as a tree: it is well formed as XML too."""
    text = path.read_text()
    assert text.startswith("<!doctype html>")
    return text, ET.fromstring(text.partition("\n")[2])


@pytest.mark.parametrize("name", ["good", "odd"])
def test_the_page_is_whole_and_needs_nothing(folders, tmp_path, name):
    told = succeed("inspect", folders / name, "--html", tmp_path / "report.html")
    assert f"written: {tmp_path / 'report.html'}" in told
    text, page = parsed(tmp_path / "report.html")
    assert "http://" not in text
    assert "https://" not in text
    for element in page.iter():
        assert element.tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "action", "onclick", "onload"} & set(element.attrib), element.attrib
    assert "url(" not in text
    assert "@import" not in text
    policy = [meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert len(list(page.iter("script"))) == 1
    headings = ["".join(head.itertext()) for head in page.iter("h2")]
    assert headings[:4] == [
        "What stands out",
        "Norm of the change of each layer",
        "Singular values of the change",
        "Layers",
    ]
    report = as_json("inspect", folders / name)
    body = next(page.iter("tbody"))
    assert [row[0].text for row in body] == [layer["path"] for layer in report["layers"]]
    norms = [float(row[5].get("data-value")) for row in body]
    assert norms == pytest.approx(
        [-1.0 if layer["norm"] is None else layer["norm"] for layer in report["layers"]]
    )
    maps = [svg for svg in page.iter("svg") if svg.get("aria-label", "").startswith("Norm")]
    cells = [group for group in maps[0].iter("g") if group.find("rect") is not None]
    assert len(cells) == len(report["layers"])


def test_what_is_odd_and_foreign_stands_in_the_page(folders, tmp_path):
    succeed("inspect", folders / "odd", "--html", tmp_path / "report.html")
    text, page = parsed(tmp_path / "report.html")
    assert "<script>alert" not in text
    assert (
        sum(FOREIGN in (cell.text or "") for cell in page.iter("td")) == 2
    )  # base and metadata; the config has it as JSON
    faults = ["".join(item.itertext()) for item in page.iter("li") if item.get("class") == "bad"]
    assert faults == [
        "NaN or infinity in model.layers.1.mlp.up_proj.",
        "The change is zero in model.layers.0.self_attn.q_proj.",
    ]
    labels = [element.text for element in page.iter("text")]
    assert labels.count("NaN") == labels.count("dead") == 1
    marked = {row.get("class"): row[0].text for row in page.iter("tr") if row.get("class")}
    assert marked == {"bad": "model.layers.1.mlp.up_proj", "dead": "model.layers.0.self_attn.q_proj"}


def test_the_image(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    succeed("inspect", folders / "odd", "--png", tmp_path / "report.png", "--html", tmp_path / "report.html")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "report.html").is_file()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "needs matplotlib" in refused("inspect", folders / "odd", "--png", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
    assert picture.make_picture.__doc__


def test_files_that_are_there_and_bad_names(folders, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("mine")
    assert "is there already" in refused("inspect", folders / "good", "--html", page)
    assert "ends in .html or .png" in refused("inspect", folders / "good", "--html", tmp_path / "report.pdf")
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert "No space left" in refused("inspect", folders / "good", "--html", page, "--overwrite")
    assert page.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    succeed("inspect", folders / "good", "--html", page, "--overwrite")
    assert page.read_text().startswith("<!doctype html>")


def test_what_is_refused(folders, tmp_path):
    assert "no such folder" in refused("inspect", tmp_path / "none")
    broken = shutil.copytree(folders / "good", tmp_path / "broken")
    raw = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(raw[:-5])
    assert "cut off" in refused("inspect", broken)
    (broken / "adapter_model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    told = as_json("inspect", broken)
    assert told["digest"] == "does not fit"
    assert run("inspect").exit_code == 2


class Layer:
    def __init__(self, path):
        self.path = path


GRIDS = [
    (
        ["m.layers.10.q", "m.layers.9.q", "m.layers.9.v"],
        ("m.layers.9", "m.layers.10"),
        ("q", "v"),
    ),
    (["lm_head", "embed"], ("(top)",), ("lm_head", "embed")),
    # of two grids as large the one with fewer columns
    (
        [f"down.{one}.blocks.{other}.to_q" for one in range(2) for other in range(2)],
        ("down.0.blocks.0", "down.0.blocks.1", "down.1.blocks.0", "down.1.blocks.1"),
        ("to_q",),
    ),
    (
        ["down.0.blocks.0.to_q", "down.0.blocks.0.to_k", "down.0.norm"],
        ("down.0",),
        ("blocks.0.to_q", "blocks.0.to_k", "norm"),
    ),
    (["net.0", "net.2"], ("(top)",), ("net.0", "net.2")),
]


@pytest.mark.parametrize(("paths", "rows", "columns"), GRIDS)
def test_the_grid(paths, rows, columns):
    grid = make_grid([Layer(path) for path in paths])
    assert grid.rows == rows
    assert grid.columns == columns
    assert len(grid.cells) == len(paths)


def test_in_a_browser(folders, tmp_path):
    """Sorting and filtering, in headless Chromium where there is one; no error and no request is made."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip(
            f"needs headless Chromium (apt-get install {CHROMIUM[0]}); none of {', '.join(CHROMIUM)} is here"
        )
    succeed("inspect", folders / "odd", "--html", tmp_path / "report.html")
    driver = """
    const table = document.querySelector("table.sortable"), told = {};
    const column = place => [...table.tBodies[0].rows].map(row => row.cells[place].dataset.value);
    const press = place => table.tHead.rows[0].cells[place].querySelector("button").click();
    press(5); told.up = column(5).map(Number);
    press(5); told.down = column(5).map(Number);
    press(0); told.names = column(0);
    const filter = document.getElementById("filter-layers");
    filter.value = "UP_PROJ"; filter.dispatchEvent(new Event("input"));
    told.shown = [...table.tBodies[0].rows].filter(row => !row.hidden).length;
    told.loaded = performance.getEntriesByType("resource").length;
    document.title = JSON.stringify(told);
    """
    page = tmp_path / "driven.html"
    page.write_text(
        (tmp_path / "report.html").read_text().replace("</body>", f"<script>{driver}</script></body>")
    )
    call = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    found = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
    told = json.loads(found.partition("<title>")[2].partition("</title>")[0])
    assert told["up"] == sorted(told["up"])
    assert told["down"] == sorted(told["down"], reverse=True)
    assert told["names"] == sorted(told["names"])
    assert (told["shown"], told["loaded"]) == (2, 0)
