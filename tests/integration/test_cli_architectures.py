"""All verbs on one checkpoint after another, as transformers writes them: a llama, a tied GPT-2, a mixture, MiniLM."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest
import torch
import transformers as t

from cli import as_json, refused, succeed
from lorakit import LoraConfig, PeftModel
from lorakit.demo.model import model_folder
from merging import differences, loaded, quiet, save_adapter, save_base
from models import tiny_llama

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def gpt2():
    torch.manual_seed(0)
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).eval()


def mixtral():
    torch.manual_seed(0)
    config = t.MixtralConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=3)
    return t.MixtralForCausalLM(config).eval()


def minilm():
    return t.AutoModel.from_pretrained(model_folder(), local_files_only=True).eval()


class Case(NamedTuple):
    make: object
    targets: list[str]
    task: str | None
    parameters: list[str] | None = None
    tied: bool = False


CASES = {
    "llama": Case(tiny_llama, ["q_proj", "down_proj"], "CAUSAL_LM"),
    "gpt2": Case(gpt2, ["c_attn", "c_fc"], "CAUSAL_LM", tied=True),
    "mixtral": Case(mixtral, ["q_proj"], "CAUSAL_LM", ["experts.gate_up_proj", "experts.down_proj"]),
    "minilm": Case(minilm, ["query", "dense"], "FEATURE_EXTRACTION"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, and a folder with its base and two adapters."""
    case, root = CASES[request.param], tmp_path_factory.mktemp(request.param)
    with quiet():
        if request.param == "minilm":
            shutil.copytree(model_folder(), root / "base")  # as its authors wrote it
        else:
            save_base(case.make(), root / "base", max_shard_size="20KB")
        for seed, name in enumerate("ab"):
            config = LoraConfig(
                r=4, target_modules=case.targets, target_parameters=case.parameters, task_type=case.task
            )
            save_adapter(case.make(), config, root / name, seed=seed, scale=0.05)
    return case, root


def output(model):
    ids = torch.tensor([[5, 9, 7, 3], [2, 8, 1, 6]])
    with torch.no_grad():
        found = model(ids % min(model.config.vocab_size, 1000))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_doctor_and_estimate_and_inspect_agree(case):
    """Of one adapter: that it fits, how many parameters it will have, and how many are in the file."""
    kind, root = case
    told = as_json("doctor", root / "a", "--base", root / "base")
    assert "fits" in {finding["check"] for finding in told["findings"]}
    assert not [finding for finding in told["findings"] if finding["level"] == "error"]
    report = as_json("inspect", root / "a", "--html", root / "a.html")
    assert (report["digest"], report["dead"], report["non_finite"]) == ("fits", [], [])
    assert (root / "a.html").stat().st_size > 10_000
    targets = [word for name in kind.targets for word in ("-t", name)]
    targets += [word for name in kind.parameters or () for word in ("--target-parameter", name)]
    options = ["--r", 4, "--task", kind.task, "--seq", 8, "--dtype", "float32"]
    told = as_json("estimate", root / "base", *targets, *options)
    assert told["trainable_parameters"] == report["parameters"]
    assert told["adapter_bytes"] == report["bytes"]


def test_a_merge_and_the_way_back(case):
    """The bits of a merge in memory; and taken out again, the same adapter."""
    kind, root = case
    told = as_json("merge", root / "base", root / "a", "-o", root / "merged", "--verify")
    assert told["relative_error"] < 1e-6
    with quiet():
        wanted = PeftModel.from_pretrained(kind.make(), root / "a").merge_and_unload()
        assert not differences(loaded(kind.make(), root / "merged"), wanted.state_dict())
        made = type(wanted).from_pretrained(root / "merged").eval()
    assert torch.equal(output(made), output(wanted.eval()))
    assert float((output(made) - output(kind.make())).abs().max()) > 1e-3
    assert made.config.tie_word_embeddings == kind.tied or kind.make is minilm
    back = ["extract", root / "base", root / "merged", "-o", root / "back", "--energy", "0.999999", "--tolerance", "1e-6"]  # fmt: skip
    if kind.parameters:
        assert "mlp.experts.gate_up_proj" in refused(*back)
        back += ["--ignore", "gate_up_proj", "--ignore", "experts.down_proj"]
    told = as_json(*back)
    assert {layer["rank"] for layer in told["layers"]} == {4}
    told = as_json("diff", root / "a", root / "back")
    own = [
        layer["difference"] for layer in told["layers"] if "experts" not in layer["path"] and layer["norm_b"]
    ]
    assert own
    assert max(own) < 5e-3


def test_verbs_on_adapters(case):
    """Larger and small again, combined, compared."""
    kind, root = case
    as_json("resize", root / "a", "-o", root / "larger", "--rank", 6)
    assert as_json("diff", root / "a", root / "larger")["largest"] < 1e-6
    told = as_json("resize", root / "larger", "-o", root / "smaller", "--energy", "0.9")
    assert all(layer["kept"] >= 0.9 for layer in told["layers"])
    weights = ["-w", "0.5", "-w", "2"]
    as_json("combine", root / "a", root / "b", "-o", root / "both", "--method", "sum", *weights)
    with quiet():
        peft = PeftModel.from_pretrained(kind.make(), root / "a", "a")
        peft.load_adapter(root / "b", "b")
        peft.base_model.set_adapter(["a", "b"])
        for layer in peft.base_model.registry.layers.values():
            layer.set_scale("a", 0.5)
            layer.set_scale("b", 2.0)
        found = output(PeftModel.from_pretrained(kind.make(), root / "both").eval())
    torch.testing.assert_close(found, output(peft.eval()), rtol=1e-4, atol=1e-5)
    assert as_json("diff", root / "a", root / "b")["difference"] > 0.5


def test_converting_there_and_back(case):
    """By the names of the checkpoint; experts have no place in another format."""
    kind, root = case
    names = ("--component", "text_encoder", "--base", root / "base")
    there = ["convert", root / "a", "-o", root / "a.safetensors", "--to", "kohya", *names]
    if kind.parameters:
        assert "target_parameters" in refused(*there)
        return
    succeed(*there)
    as_json("convert", root / "a.safetensors", "-o", root / "again", "--to", "peft", *names)
    assert as_json("diff", root / "a", root / "again")["largest"] == 0.0
