"""An adapter written by either loads in the other: the same tensors, bytes for bytes, and the same logits.

Known differences: the `peft_version` field; for "all-linear" lorakit records the paths that it adapted, PEFT the last
parts of the names (that the files load in each other shows that both mean the same modules). Under bias="all" with modules_to_save, PEFT also writes
`original_module.bias` and `modules_to_save.bias`; no case here has both.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from parity.models import CASES, NAMED_WARNINGS, build, output_of, pair, peft

pytestmark = NAMED_WARNINGS


def fields_of(folder):
    found = json.loads((folder / "adapter_config.json").read_text())
    del found["peft_version"]
    for name in ("target_modules", "exclude_modules"):  # sets: they are written in any order
        if isinstance(found[name], list):
            found[name].sort()
    return found


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_loads_the_other(case, name, tmp_path):
    ours, theirs = pair(*case, name=name)
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for model, folder in zip((ours, theirs), folders, strict=True):
        model.save_pretrained(folder)
    folders = [folder if name == "default" else folder / name for folder in folders]
    mine, wanted = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert mine.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(mine[key], tensor), key
    read = [fields_of(folder) for folder in folders]
    if case.fields.get("target_modules") == "all-linear":
        assert all(fields.pop("target_modules") for fields in read)
    assert read[0] == read[1]
    expected = output_of(theirs, case.kind)
    for library, folder in ((lorakit, folders[1]), (peft, folders[0])):
        loaded = library.PeftModel.from_pretrained(build(case.kind), folder)
        torch.testing.assert_close(output_of(loaded, case.kind), expected, rtol=1e-6, atol=1e-6)


def test_loads_what_peft_saved_for_an_entry_that_ends_other_names(tmp_path):
    """In PEFT `modules_to_save=["norm"]` also takes input_layernorm: its file holds them."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = lorakit.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(output_of(loaded, "llama"), output_of(theirs, "llama"), rtol=1e-6, atol=1e-6)
