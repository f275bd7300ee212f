"""What the verbs on adapter files print, to the letter: two small adapters of round numbers."""

from __future__ import annotations

import pytest
import torch

from cli import run
from lorakit.checkpoint.writing import write_adapter

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": {"q", "v"},
    "task_type": "CAUSAL_LM",
}

INSPECT = """\
a: LoRA, r=2, lora_alpha=4
base: –   task: CAUSAL_LM   PEFT: –
digest: fits   config: as saved
28 parameters (28 float32), 0.00 MB
tensors     parameters  bytes
─────────────────────────────
factors  4          28    112
                  the change of the weights
module  layers  rank     norm  eff. rank  for 99 %  dead  NaN
─────────────────────────────────────────────────────────────
q            2     2  0 … 6.4   0 … 1.99     0 … 2     1    0
dead, the change is zero: layers.1.q
"""

RESIZE = """\
                          out
layer       was rank  rank   norm     error  energy kept
────────────────────────────────────────────────────────
layers.0.q         2     1  6.403  6.25e-01     60.976 %
layers.1.q         2     1      0  0.00e+00    100.000 %
2 weights; factors of 28 parameters became 14; 60.976 % of the energy kept
"""

DIFF = """\
layer       difference   cosine  norm a  norm b  columns   rows
───────────────────────────────────────────────────────────────
layers.0.q           2  -1.0000   6.403   6.403    1.000  1.000
layers.1.q           0        –       0       0        –      –
in all: difference 2, cosine -1.0000, norms 6.403 and 6.403
"""

COMBINE = """\
             out
layer       rank  energy kept
─────────────────────────────
layers.0.q     2    100.000 %
layers.1.q     2    100.000 %
1 · a + 0.5 · b by svd: 2 weights, 28 parameters
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, sign in (("a", 1.0), ("b", -1.0)):
        A = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        B = sign * torch.tensor([[2.5, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
        tensors = {}
        for layer, factor in enumerate((B, 0.0 * B)):
            tensors[f"base_model.model.layers.{layer}.q.lora_A.weight"] = A
            tensors[f"base_model.model.layers.{layer}.q.lora_B.weight"] = factor
        write_adapter(tmp_path / name, CONFIG, tensors)


def printed(*arguments):
    """Lines without the spaces at their ends."""
    outcome = run(*arguments, columns=100)
    assert outcome.exit_code == 0, outcome.output
    return "".join(f"{line.rstrip()}\n" for line in outcome.stdout.splitlines())


@pytest.mark.parametrize(
    ("call", "screen"),
    [
        (("inspect", "a"), INSPECT),
        (("resize", "a", "-o", "out", "-r", "1"), RESIZE),
        (("combine", "a", "b", "-o", "out", "-w", "1", "-w", "0.5"), COMBINE),
    ],
    ids=["inspect", "resize", "combine"],
)
def test_screen(folders, call, screen):
    assert printed(*call) == screen


def test_screen_of_diff(folders):
    assert printed("diff", "a", "b") == DIFF
