"""`lorakit resize`, `combine` and `diff` on adapters of a real architecture, and what each says when it cannot."""

from __future__ import annotations

import json

import pytest
import torch

from cli import as_json, fill_disk, refused, run, succeed
from lorakit import PeftModel
from models import logits, tiny_llama, with_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one base, one of them damaged in three ways, and DoRA."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        with_adapter(tiny_llama(), seed=seed, r=4, target_modules=TARGETS).save_pretrained(root / name)
    with_adapter(tiny_llama(), use_dora=True, target_modules=TARGETS).save_pretrained(root / "dora")
    for name, cut in (
        ("short", lambda raw: raw[:-7]),
        ("flipped", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
    ):
        (root / name).mkdir()
        raw = (root / "a" / "adapter_model.safetensors").read_bytes()
        (root / name / "adapter_model.safetensors").write_bytes(cut(raw))
    return root


def test_resize(folders, tmp_path):
    text = succeed("resize", folders / "a", "-o", tmp_path / "b", "--rank", "2")
    assert "model.layers.0.self_attn.q_proj" in text
    assert "6 weights" in text
    told = as_json("resize", folders / "a", "-o", tmp_path / "b", "--energy", "0.9", "--overwrite")
    assert len(told["layers"]) == 6
    assert all(layer["kept"] >= 0.9 for layer in told["layers"])
    assert told["parameters"] < told["parameters_before"]
    found, wanted = (
        logits(PeftModel.from_pretrained(tiny_llama(), path).eval())
        for path in (tmp_path / "b", folders / "a")
    )
    assert 1e-4 < float((found - wanted).abs().max()) < 1.0


def test_resize_shows_what_loses_most(folders, tmp_path):
    text = succeed("resize", folders / "a", "-o", tmp_path / "b", "--rank", "2", "--rows", "1")
    assert "the first 1 of 6 rows" in text
    told = as_json("resize", folders / "a", "-o", tmp_path / "c", "--rank", "2")
    worst = max(told["layers"], key=lambda layer: layer["error"])
    assert worst["path"] in text
    assert text.count("model.layers") == 1


def test_combine(folders, tmp_path):
    text = succeed("combine", folders / "a", folders / "b", "-o", tmp_path / "c", "-w", "0.7", "-w", "-0.2")
    assert "0.7 · a + -0.2 · b by svd: 6 weights" in text
    told = as_json("combine", folders / "a", folders / "b", "-o", tmp_path / "d", "--method", "cat")
    assert told["weights"] == [1.0, 1.0]
    assert {(layer["rank"], layer["kept"]) for layer in told["layers"]} == {(8, 1.0)}
    peft = PeftModel.from_pretrained(tiny_llama(), folders / "a", "a")
    peft.load_adapter(folders / "b", "b")
    peft.base_model.set_adapter(["a", "b"])
    found = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "d").eval())
    torch.testing.assert_close(found, logits(peft.eval()), rtol=1e-4, atol=1e-5)


def test_diff(folders, tmp_path):
    text = succeed("diff", folders / "a", folders / "b")
    assert "model.layers.1.mlp.down_proj" in text
    assert "in all: difference 1." in text
    told = as_json("diff", folders / "a", folders / "b")
    assert abs(told["cosine"]) < 0.3
    assert set(told["layers"][0]["columns"]) == {"overlap", "smallest", "largest"}
    succeed("resize", folders / "a", "-o", tmp_path / "same", "--rank", "8")
    assert as_json("diff", folders / "a", tmp_path / "same")["largest"] < 1e-6


def test_diff_judges(folders, tmp_path):
    outcome = run("diff", folders / "a", folders / "b", "--fail-over", "0.5", "--json")
    assert outcome.exit_code == 3
    assert json.loads(outcome.stdout)["largest"] > 0.5
    assert "is more than 0.5" in outcome.stderr
    assert run("diff", folders / "a", folders / "b", "--fail-over", "3").exit_code == 0
    assert run("diff", folders / "a", folders / "a", "--fail-over", "0").exit_code == 0


BAD = [
    (["resize", "a"], 2, None),
    (["resize", "a", "-o", "out"], 1, "say how large"),
    (["resize", "a", "-o", "out", "--rank", "0"], 2, None),
    (["resize", "a", "-o", "out", "--energy", "2"], 1, "energy=2.0"),
    (["resize", "a", "-o", "b", "--rank", "2"], 1, "an adapter is there already"),
    (["resize", "none", "-o", "out", "--rank", "2"], 1, "no such folder"),
    (["resize", "short", "-o", "out", "--rank", "2"], 1, "cut off"),
    (["resize", "flipped", "-o", "out", "--rank", "2"], 1, "damaged or changed"),
    (["resize", "dora", "-o", "out", "--rank", "2"], 1, "DoRA is more than its factors"),
    (["combine", "a", "b", "-o", "out", "-w", "1"], 1, "1 weight(s) for 2 adapter(s)"),
    (["combine", "a", "b", "-o", "out", "--method", "best"], 1, "best"),
    (["combine", "a", "none", "-o", "out"], 1, "no such folder"),
    (["combine", "a", "dora", "-o", "out"], 1, "DoRA is more than its factors"),
    (["combine", "a", "flipped", "-o", "out"], 1, "damaged or changed"),
    (["diff", "a"], 2, None),
    (["diff", "a", "short"], 1, "cut off"),
    (["diff", "a", "dora"], 1, "DoRA is more than its factors"),
    (["diff", "a", "b", "--fail-over", "-1"], 2, None),
]


@pytest.mark.parametrize(
    ("call", "code", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_refused(folders, tmp_path, monkeypatch, call, code, words):
    monkeypatch.chdir(folders)
    if code == 2:
        assert run(*call).exit_code == 2
    else:
        assert words in refused(*call)
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    "call", [["resize", "a", "--rank", "2"], ["combine", "a", "b"]], ids=lambda call: call[0]
)
def test_a_full_disk_leaves_what_was_there(folders, tmp_path, monkeypatch, call):
    monkeypatch.chdir(folders)
    succeed(*call, "-o", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert "No space left" in refused(*call, "-o", tmp_path / "out", "--overwrite")
        assert "No space left" in refused(*call, "-o", tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["resize", "combine", "diff", "inspect"])
def test_help_has_an_example(verb):
    assert f"Example: lorakit {verb}" in " ".join(succeed(verb, "--help").split())
