"""Combining files gives what combining on a model gives, and reads nothing but the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration.oracle import KINDS, ids, zoo
from lorakit import LoraConfig, PeftModel, get_peft_model, tools
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    NonFiniteError,
    UnsupportedError,
)
from models import another, logits, randomise, tiny_llama, with_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.* targeted convolutions are grouped:UserWarning")


def combine(paths, weights, **options):
    """The folder that the combination was written to."""
    return Path(tools.combine(paths, weights, **options).output)


def saved(folder, first, second, ranks=(2, 4)):
    """A model with adapters a and b, and both of them in folders."""
    peft = get_peft_model(zoo(), LoraConfig(**{"r": ranks[0], "lora_alpha": 3.0, **first}), "a")
    peft.add_adapter("b", LoraConfig(**{"r": ranks[1], "lora_alpha": 5.0, "use_rslora": True, **second}))
    for seed, name in enumerate("ab"):
        randomise(peft, name, seed=seed, scale=0.3)
    peft.eval().save_pretrained(folder)
    return peft, [folder / "a", folder / "b"]


SAME = [
    *(
        (kind, kind, method)
        for kind in ("matrices", "lookup", "groups", "attention")
        for method in ("sum", "cat", "svd")
    ),
    ("matrices", "lookup", "sum"),
    ("matrices", "groups", "svd"),
    ("biased factors", "matrices", "sum"),
    *(
        ("matrices", "matrices", method)
        for method in ("ties_svd", "dare_linear_svd", "magnitude_prune_svd", "sce")
    ),
    ("lookup", "lookup", "slerp"),
]


@pytest.mark.parametrize(("first", "second", "method"), SAME)
def test_the_same_as_on_a_model(tmp_path, first, second, method):
    fields = [
        {key: v for key, v in KINDS[kind][0].items() if key != "use_rslora"} for kind in (first, second)
    ]
    fields = [{**one, "target_parameters": None} for one in fields]
    peft, folders = saved(tmp_path, *fields)
    more = {"density": 0.7} if method.split("_")[0] in {"ties", "dare", "magnitude", "sce"} else {}
    more |= {"seed": 3} if "dare" in method else {}
    peft.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", method, **more)
    peft.save_pretrained(tmp_path, selected_adapters=["both"])
    made = combine(folders, [0.7, -0.4], output=tmp_path / "made", method=method, **more)
    wanted, found = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "both", made))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    peft.set_adapter("both")
    fresh = PeftModel.from_pretrained(zoo(), made).eval()
    with torch.no_grad():
        assert torch.equal(fresh(ids()), peft(ids()))


def test_experts(tmp_path):
    fields = {"target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]}
    peft, folders = saved(tmp_path, fields, fields)
    made = combine(folders, [1.0, 0.5], output=tmp_path / "made", method="sum")
    peft.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both", "sum")
    peft.set_adapter("both")
    fresh = PeftModel.from_pretrained(zoo(), made).eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids()), peft(ids()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["whole", "tokens", "biases"])
def test_what_is_whole_needs_weights_that_sum_to_one(tmp_path, kind):
    peft, folders = saved(tmp_path, KINDS[kind][0], KINDS[kind][0])
    with pytest.raises(UnsupportedError, match=r"whose weights sum to 1\.5.*add_weighted_adapter"):
        combine(folders, [1.0, 0.5], output=tmp_path / "made", method="sum")
    assert not (tmp_path / "made").exists()
    made = combine(folders, [0.75, 0.25], output=tmp_path / "made", method="sum")
    peft.add_weighted_adapter(["a", "b"], [0.75, 0.25], "both", "sum")
    peft.set_adapter("both")
    fresh = PeftModel.from_pretrained(zoo(), made).eval()
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids()), peft(ids()), rtol=1e-9, atol=1e-9)


def test_tied_factors_stay_tied(tmp_path):
    fields = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    peft = with_adapter(tiny_llama(tie=True), "a", **fields)
    another(peft, "b", r=6, **fields)
    peft.save_pretrained(tmp_path)
    made = combine(
        [tmp_path / "a", tmp_path / "b"], [0.5, 0.5], output=tmp_path / "made", method="svd", rank=3
    )
    fresh = PeftModel.from_pretrained(tiny_llama(tie=True), made)
    peft.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "svd", svd_rank=3)
    peft.set_adapter("both")
    torch.testing.assert_close(logits(fresh), logits(peft), rtol=1e-4, atol=1e-4)


def test_names_that_both_select_by_are_kept(tmp_path):
    _, folders = saved(tmp_path, KINDS["matrices"][0], KINDS["matrices"][0])
    made = combine(folders, [1, 1], output=tmp_path / "made", method="cat")
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (["c", "q"], 6, 6)
    assert config["use_rslora"] is False


# ---- refusals -----------------------------------------------------------------------------------------


def test_an_adapter_that_is_there_is_not_overwritten(tmp_path):
    _, folders = saved(tmp_path, KINDS["matrices"][0], KINDS["matrices"][0])
    before = (folders[0] / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"there already.*overwrite=True"):
        combine(folders, [1, 1], output=folders[0])
    assert (folders[0] / "adapter_model.safetensors").read_bytes() == before
    combine(folders, [1, 1], output=folders[0], overwrite=True)
    PeftModel.from_pretrained(zoo(), folders[0])


REFUSED = {
    "no such folder": (lambda f: [f[0], f[0].parent / "nope"], {}, AdapterNotFoundError, "nope"),
    "weights": (lambda f: f, {"weights": [1.0]}, ConfigError, "1 weight"),
    "method": (lambda f: f, {"method": "svdd"}, ConfigError, "did you mean"),
    "ranks": (lambda f: f, {"method": "linear"}, ConfigError, "c: .*equal ranks|q: .*equal ranks"),
    "overflow": (lambda f: f, {"weights": [1e308, 1e308]}, NonFiniteError, "does not fit|holds NaN"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_sound_writes_nothing(tmp_path, case):
    pick, changes, error, words = REFUSED[case]
    _, folders = saved(tmp_path, KINDS["matrices"][0], KINDS["matrices"][0])
    arguments = {"weights": [1.0, 1.0], "method": "sum", **changes}
    with pytest.raises(error, match=f"(?s){words}"):
        combine(pick(folders), arguments["weights"], output=tmp_path / "made", method=arguments["method"])
    assert not (tmp_path / "made").exists()


def test_a_config_that_does_not_fit_its_tensors_is_refused(tmp_path):
    _, folders = saved(tmp_path, KINDS["matrices"][0], KINDS["matrices"][0])
    path = folders[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
    with (
        pytest.warns(UserWarning, match="changed after the adapter was saved"),
        pytest.raises(AdapterFormatError, match="A has 2 rows, the config says rank 3"),
    ):
        combine(folders, [1, 1], output=tmp_path / "made")


def test_adapters_of_other_shapes_are_refused(tmp_path):
    _, folders = saved(tmp_path, KINDS["matrices"][0], KINDS["matrices"][0])
    other = with_adapter(tiny_llama(), target_modules=["q_proj"])
    other.save_pretrained(tmp_path / "other")
    made = combine([folders[0], tmp_path / "other"], [1, 1], output=tmp_path / "made", method="sum")
    assert len(load_file(made / "adapter_model.safetensors")) == 8, "weights of other names lie side by side"
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    key = "base_model.model.q.lora_A.weight"
    from safetensors.torch import save_file

    save_file(
        {**tensors, key: torch.zeros(4, 9, dtype=torch.float64)}, folders[1] / "adapter_model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"q: .*different shapes"):
        combine(folders, [1, 1], output=tmp_path / "more", method="sum")


def test_parameters_that_a_file_cannot_tell_apart(tmp_path):
    one = {"target_modules": [], "target_parameters": ["experts.up"]}
    two = {"target_modules": [], "target_parameters": ["experts.down"]}
    _, folders = saved(tmp_path, one, two)
    with pytest.raises((UnsupportedError, ConfigError), match=r"target_parameters|different shapes"):
        combine(folders, [1, 1], output=tmp_path / "made", method="sum")


def test_no_model_library_is_loaded():
    assert "transformers" in sys.modules, "the tests load it, so only a fresh process can tell"
    import subprocess

    code = "import sys; from lorakit.tools import combine; print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_what_is_told(tmp_path):
    peft, folders = saved(tmp_path, {"target_modules": ["q", "c"]}, {"target_modules": ["q", "head"]})
    steps = []
    told = tools.combine(
        folders,
        [1, -0.5],
        output=tmp_path / "made",
        method="svd",
        rank=3,
        progress=lambda *step: steps.append(step),
    )
    made = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert (told.output, told.method, told.weights) == (str(tmp_path / "made"), "svd", (1.0, -0.5))
    assert told.parameters == sum(tensor.numel() for tensor in made.values())
    report = peft.add_weighted_adapter(["a", "b"], [1, -0.5], "both", "svd", rank=3)
    assert {layer.path: (layer.rank, layer.kept) for layer in told.layers} == {
        path: (3, report.kept[path]) for path in ("c", "head", "q")
    }
    assert 0.5 < next(layer.kept for layer in told.layers if layer.path == "q") < 1.0
    assert (steps[0], steps[-1]) == (("combining", 0, 3), ("combining", 3, 3))
