"""What resizing and extracting write loads in PEFT and does there what it does here; PEFT's files are read alike."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch

from lorakit import PeftModel, combine, diff, doctor, extract, inspect_adapter, resize
from models import ids, logits, tiny_bert, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

FIELDS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora and patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 6},
        "alpha_pattern": {"0.mlp.down_proj": 3},
    },
    "embedding": {"target_modules": ["embed_tokens", "up_proj"], "modules_to_save": ["norm"]},
    "biases": {"target_modules": ["q_proj"], "lora_bias": True},
}


def theirs(folder, fields, seed=0):
    """An adapter that PEFT made and saved, with an effect."""
    model = tiny_llama()
    if fields.get("lora_bias"):
        model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))
        model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(16))
    base = copy.deepcopy(model)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of biases and embeddings
        made.save_pretrained(folder, save_embedding_layers=False)
    return base, made.eval()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("options", [{"rank": 12}, {"energy": 0.9}], ids=["rank", "energy"])
def test_resized(tmp_path, fields, options):
    base, made = theirs(tmp_path / "a", fields)
    told = resize(tmp_path / "a", tmp_path / "b", **options)
    there = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    here = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    with torch.no_grad():
        torch.testing.assert_close(there(ids()).logits, logits(here), rtol=1e-5, atol=1e-6)
        if "rank" in options:
            torch.testing.assert_close(there(ids()).logits, made(ids()).logits, rtol=1e-4, atol=1e-5)
        else:
            assert min(layer.rank for layer in told.layers) < 4
    for layer in told.layers:
        delta = there.get_submodule(f"base_model.model.{layer.path}").get_delta_weight("default").detach()
        assert float(delta.norm()) == pytest.approx(layer.norm * layer.kept**0.5, rel=1e-4)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_norms_are_those_of_their_deltas(tmp_path, fields):
    _, made = theirs(tmp_path / "a", fields)
    _, other = theirs(tmp_path / "b", fields, seed=1)
    report, difference = inspect_adapter(tmp_path / "a"), diff(tmp_path / "a", tmp_path / "b")
    for layer, apart in zip(report.layers, difference.layers, strict=True):
        mine, second = (
            model.get_submodule(f"base_model.model.{layer.path}")
            .get_delta_weight("default")
            .detach()
            .double()
            for model in (made, other)
        )
        assert layer.path == apart.path
        assert layer.norm == pytest.approx(float(mine.norm()), rel=1e-5)
        assert apart.difference == pytest.approx(
            float((mine - second).norm() / max(mine.norm(), second.norm())), rel=1e-5
        )
    assert report.peft_version == peft.__version__


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_llama, {"modules_to_save": ["norm", "embed_tokens", "lm_head"]}),
        (lambda: tiny_llama(tie=True), {"modules_to_save": ["norm", "embed_tokens"]}),
        (tiny_bert, {"modules_to_save": ["embeddings", "LayerNorm", "classifier"], "bias": "all"}),
    ],
    ids=["llama", "tied llama", "bert"],
)
def test_extracted(tmp_path, make, options):
    tuned, generator = make(), torch.Generator().manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1000, **options)
    there = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(there(ids()).logits, tuned(ids()).logits, rtol=1e-4, atol=1e-5)


def test_combined(tmp_path):
    base, made = theirs(tmp_path / "a", FIELDS["plain"])
    theirs(tmp_path / "b", FIELDS["plain"], seed=1)
    combine([tmp_path / "a", tmp_path / "b"], [0.6, -0.3], output=tmp_path / "c", method="cat")
    made.load_adapter(tmp_path / "b", "b")
    made.add_weighted_adapter(["default", "b"], [0.6, -0.3], "c", combination_type="cat")
    made.set_adapter("c")
    there = peft.PeftModel.from_pretrained(base, tmp_path / "c").eval()
    with torch.no_grad():
        torch.testing.assert_close(there(ids()).logits, made.eval()(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["pissa", "olora"])
def test_the_way_that_doctor_names_for_a_file_of_a_changed_base(tmp_path, scheme):
    """A file that PEFT saved without converting it: merged by PEFT, and taken out of that."""
    base = tiny_llama().eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=scheme)
    trained = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        wanted = trained(ids()).logits
    trained.save_pretrained(tmp_path / "raw")
    (found,) = (each for each in doctor(tmp_path / "raw") if each.check == "changed-base")
    rank = int(found.fix.rpartition("--rank ")[2].rstrip("."))
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "raw").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    told = extract(tmp_path / "base", tmp_path / "merged", tmp_path / "plain", rank=rank)
    assert max(layer.error for layer in told.layers) < 1e-4
    mine = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(mine), wanted, rtol=1e-3, atol=1e-4)
    assert float((wanted - logits(base)).abs().max()) > 2e-2
    assert not [each for each in doctor(tmp_path / "plain", tmp_path / "base") if each.level == "error"]
