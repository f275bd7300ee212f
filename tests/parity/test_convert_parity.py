"""What a conversion writes loads in PEFT, and does there what the original did."""

from __future__ import annotations

import peft
import pytest
import torch

from conversions import save_config, save_llama
from lorakit import convert
from models import ids, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES = {
    "plain": ("gguf", {}),
    "patterns": ("gguf", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"0.mlp.down_proj": 12}}),
    "rslora": ("mlx", {"use_rslora": True}),
    "dora": ("torchtune", {"use_dora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it(tmp_path, case):
    to, fields = CASES[case]
    base = save_config(tmp_path / "base")
    mine = save_llama(tmp_path / "a", **fields)
    between = tmp_path / ("b.gguf" if to == "gguf" else "b")
    convert(tmp_path / "a", between, to=to, base=base)
    convert(between, tmp_path / "c", to="peft", base=base)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "c").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, mine(ids()).logits, rtol=1e-5, atol=1e-6)
