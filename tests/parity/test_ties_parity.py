"""Tied and untied embeddings under every row of docs/tied-weights.md: the same files, outputs and gradients as PEFT's.

Where PEFT does otherwise, and a test here says so:
- It finds the tied modules by the names "embed_tokens" and "lm_head" alone, so `ensure_weight_tying` has no effect on
  `wte`, `word_embeddings`, `decoder` or `shared`: it leaves modules out (`LACKS`) or trains them apart (`PARTS`). Files
  of either still mean the same in both.
- Of an encoder-decoder it makes the encoder's embedding a linear layer (`BREAKS`), or gives it factors of its own.
- Tied factors are two parameters over one memory: counted twice, each with half of the gradient, and an optimiser
  steps twice. Here they are one.
- Rows of a head leave out its bias.
- It writes the base's own embeddings beside factors on them.
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from parity.models import NAMED_WARNINGS, peft, randomize
from tied import ROWS, Row, batch, build, logits_of

pytestmark = [
    *NAMED_WARNINGS,
    *(
        pytest.mark.filterwarnings(f"ignore:{line}")
        for line in (
            "Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning",
            "You have requested `ensure_weight_tying`, but no tied modules:UserWarning",
            "ensure_weight_tying=True but the model does not have tied weights:UserWarning",
            "Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning",
            "fan_in_fan_out is set to (True|False) but the target module is:UserWarning",
            "Could not find a config file in:UserWarning",
        )
    ),
]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TIED_KINDS = ("llama", "gpt2", "bert", "t5")
CASES = [
    (kind, tie, row)
    for kind in TIED_KINDS
    for tie in (True, False)
    for row in ROWS
    if row.which != "one" or row.field != "trainable_token_indices"
]
CASES = [
    (kind, tie, row)
    for kind, tie, row in CASES
    if (tie and not (row.ensure and row.which == "different"))
    or (not tie and (kind in {"llama", "bert"} or row.which in {"both", "same"}))
]


def rows(text, kinds):
    return {(kind, row) for kind in kinds.split() for row in ROWS if re.fullmatch(text, str(row))}


BREAKS = rows("modules_to_save-(head|both)-ensure", "t5")
UNREADABLE = rows("modules_to_save-one-ensure", "t5")
LACKS = (
    rows("(modules_to_save|target_modules)-one-ensure", "gpt2 bert t5")
    | rows("(modules_to_save|target_modules)-head-ensure", "bert")
    | rows("trainable_token_indices-head-ensure", "llama gpt2 bert t5")
    | rows("trainable_token_indices-same-.*", "bert")
)
PARTS = (
    rows("(modules_to_save|target_modules)-both-ensure", "bert")
    | rows("trainable_token_indices-same-.*", "bert")
    | rows("target_modules-(head|both)-ensure", "t5")
)


def base(kind, tie):
    model = build(kind, tie)
    if kind == "bert":  # PEFT's rows of a head have no bias
        nn.init.zeros_(model.cls.predictions.decoder.bias)
    return model


def quiet(library, kind, tie, row, **more):
    """An adapter of either library; what lorakit says of ties is in tests/unit/surgery/test_ties.py."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|fan_in_fan_out)")
        config = library.LoraConfig(**row.config(kind, **more))
        return library.get_peft_model(base(kind, tie), config).eval()


def names(cases):
    return [f"{kind}-{'tied' if tie else 'untied'}-{row}" for kind, tie, row in cases]


def own_tensors(folder):
    """Those of a file that are not the base's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if ".base_layer." not in key}


@pytest.mark.parametrize(("kind", "tie", "row"), CASES, ids=names(CASES))
def test_files_both_ways(kind, tie, row, tmp_path):
    ours = quiet(lorakit, kind, tie, row)
    randomize(ours, 1)
    ours.save_pretrained(tmp_path / "ours")
    theirs = quiet(peft, kind, tie, row)
    if tie and (kind, row) in BREAKS:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            logits_of(theirs)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            logits_of(peft.PeftModel.from_pretrained(base(kind, tie), tmp_path / "ours"))
        return
    randomize_once(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = own_tensors(tmp_path / "ours"), own_tensors(tmp_path / "theirs")
    assert (mine.keys() == other.keys()) == (not tie or (kind, row) not in LACKS)
    parts = tie and (kind, row) in PARTS
    lacks = tie and (kind, row) in LACKS and row.field != "trainable_token_indices"
    said = "was trained apart" if parts else "the file has nothing for it"
    with pytest.warns(UserWarning, match=said) if parts or lacks else nullcontext():
        found = lorakit.PeftModel.from_pretrained(
            base(kind, tie), tmp_path / "theirs", is_trainable=True
        ).eval()
    torch.testing.assert_close(logits_of(found), logits_of(theirs), **CLOSE)
    if not tie or (kind, row) not in UNREADABLE:
        back = peft.PeftModel.from_pretrained(base(kind, tie), tmp_path / "ours")
        torch.testing.assert_close(logits_of(back), logits_of(ours), **CLOSE)
    check_gradients(found, theirs)


def randomize_once(model, seed=0):
    """Every parameter by its memory, since PEFT's tied ones are two in one."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and parameter.data_ptr() not in done:
                done.add(parameter.data_ptr())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def check_gradients(ours, theirs):
    """Those of PEFT's two views of one memory add up to ours."""
    sums, counts = {}, [0, 0]
    for model, place in ((theirs, 1), (ours, 0)):
        model(**batch()).loss.backward()
        counts[place] = model.get_nb_trainable_parameters()[0]
    twice = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            twice += parameter.numel() if parameter.data_ptr() in sums else 0
            gradient = torch.zeros(()) if parameter.grad is None else parameter.grad
            kept, total = sums.get(parameter.data_ptr(), (name, 0))
            flipped = gradient.T if kept != name and gradient.ndim == 2 else gradient
            sums[parameter.data_ptr()] = (kept, total + flipped)
    assert counts[0] == counts[1] - twice
    wanted = dict(sums.values())
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient.ndim:
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_factors_are_one_parameter_here_and_two_there(kind):
    row = Row("target_modules", True, "both")
    ours, theirs = quiet(lorakit, kind, True, row), quiet(peft, kind, True, row)
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad and "lm_head" in name}
    assert {name.rsplit(".", 3)[-3] for name in trained} == {"lora_A", "lora_B"}
    assert not any("lm_head" in name for name, p in ours.named_parameters() if p.requires_grad)
    more = sum(p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "lm_head" in n)
    assert theirs.get_nb_trainable_parameters()[0] - ours.get_nb_trainable_parameters()[0] == more


def test_peft_forgets_the_bias_of_a_head():
    row = Row("trainable_token_indices", False, "head")
    models = []
    for library in (lorakit, peft):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tied")
            models.append(
                library.get_peft_model(build("bert", False), library.LoraConfig(**row.config("bert"))).eval()
            )
    bare = logits_of(build("bert", False))
    bias = models[0].get_base_model().cls.predictions.decoder.bias
    torch.testing.assert_close(logits_of(models[0]), bare, **CLOSE)
    torch.testing.assert_close(logits_of(models[1]), bare - bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bases_own_embeddings_in_peft_files(dtype, tmp_path):
    """They are passed over where they are this model's, also in the precision of the other; else refused."""
    row = Row("target_modules", True, "one")
    theirs = quiet(peft, "llama", True, row)
    randomize_once(theirs)
    theirs.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".base_layer." in key for key in keys)
    model = base("llama", True).to(dtype)
    found = lorakit.PeftModel.from_pretrained(model, tmp_path)
    if dtype is torch.float32:
        torch.testing.assert_close(logits_of(found), logits_of(theirs), **CLOSE)
        found.merge_adapter()
        found.load_adapter(tmp_path, "again")  # the base's own are those before the merge
    other = base("llama", True)
    nn.init.normal_(other.model.embed_tokens.weight)
    with pytest.raises(lorakit.errors.KeyMismatchError, match="allow_base_weights=True"):
        lorakit.PeftModel.from_pretrained(other, tmp_path)
    found = lorakit.PeftModel.from_pretrained(other, tmp_path, allow_base_weights=True)
    torch.testing.assert_close(logits_of(found), logits_of(theirs), **CLOSE)


def test_tied_biases_that_peft_writes_twice(tmp_path):
    config = {"target_modules": ["query"], "bias": "all"}
    theirs = peft.get_peft_model(build("bert", True), peft.LoraConfig(**config)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    found = lorakit.PeftModel.from_pretrained(build("bert", True), tmp_path / "theirs")
    torch.testing.assert_close(logits_of(found), logits_of(theirs), **CLOSE)
    found.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build("bert", True), tmp_path / "ours")
    torch.testing.assert_close(logits_of(again), logits_of(theirs), **CLOSE)
