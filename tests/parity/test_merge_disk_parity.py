"""Adapters written by PEFT, merged on disk: what PEFT's own merge computes."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from lorakit import merge_checkpoint
from lorakit.errors import UnsupportedError
from merging import loaded, save_base
from parity.models import CASES, NAMED_WARNINGS, Case, build, peft, randomize

pytestmark = NAMED_WARNINGS

QV = ["q_proj", "v_proj"]
MORE = [
    Case("llama", {"target_modules": [*QV, "down_proj"], "use_dora": True}),
    Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    Case("llama", {"target_modules": [*QV, "embed_tokens", "lm_head"]}),
    Case("llama", {"target_modules": [*QV, "embed_tokens"], "use_dora": True}),
    Case("llama", {"target_modules": QV, "trainable_token_indices": [3, 9]}),
    Case("llama", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [9, 3]}}),
    Case("llama", {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]}),
    Case("bert", {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["pooler"]}),
    Case("llama", {"target_modules": QV, "kasa_config": {}}),
    Case("t5", {"target_modules": ["q", "shared"]}),
]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_an_adapter_of_peft(tmp_path, case):
    fields = dict(case.fields)
    if "kasa_config" in fields:
        fields["kasa_config"] = peft.KasaConfig()
    save_base(build(case.kind), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, and of what a file holds beside the adapter
        adapted = peft.get_peft_model(build(case.kind), peft.LoraConfig(**fields))
        randomize(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        wanted = adapted.merge_and_unload().state_dict()
    if case.kind == "t5" and "shared" in fields.get("target_modules", ()):
        with pytest.raises(UnsupportedError, match="are tied in an encoder-decoder"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify=True)
    assert report.merged
    mine = loaded(build(case.kind), tmp_path / "out")
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            mine[name], tensor, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
