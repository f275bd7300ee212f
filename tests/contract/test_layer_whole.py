"""Bases with a forward of their own: what they compute with the changed weight is what the merged layer computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding

from contract.rows import ROWS, blocks_for, rows_where, spec_for
from lorakit.layers import kind_of
from lorakit.layers.whole import has_own_forward
from lorakit.weights import find_codec


class Normed(nn.Embedding):
    """Not linear in its weight."""

    def forward(self, ids):
        return torch.nn.functional.normalize(super().forward(ids), dim=-1)


OWN = {
    "positions": (lambda: OPTLearnedPositionalEmbedding(9, 10), (torch.ones(2, 4, dtype=torch.long), 3), {}),
    "positions by name": (
        lambda: OPTLearnedPositionalEmbedding(9, 10),
        (None,),
        {"past_key_values_length": 0, "position_ids": torch.tensor([[1, 5, 2]])},
    ),
    "normed": (lambda: Normed(9, 10), (torch.arange(9),), {}),
    "of limited length": (lambda: nn.Embedding(9, 10, max_norm=1.0), (torch.arange(9),), {}),
    "standardised": (
        lambda: WeightStandardizedConv2d(4, 6, 3, padding=1),
        (torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)),),
        {},
    ),
    "padding": (
        lambda: Conv2dSamePadding(4, 6, 3),
        (torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)),),
        {},
    ),
}
each = pytest.mark.parametrize("name", list(OWN))


def layer_of(base):
    kind = kind_of(base)
    layer = kind.layer(base, find_codec(base))
    row = SimpleNamespace(unit=1, kind=kind.name)
    for n, name in enumerate("ab"):
        spec = spec_for(row, layer.layout, n)
        layer.add(name, blocks_for(spec, seed=n), spec, use_rslora=False)
    layer.set_adapter(["a", "b"])
    return layer


@each
def test_unmerged_is_merged_and_neither_is_the_base(name):
    make, args, kwargs = OWN[name]
    torch.manual_seed(1)
    layer = layer_of(make())
    base = layer.base_layer(*args, **kwargs)
    unmerged = layer(*args, **kwargs)
    layer.merge()
    torch.testing.assert_close(unmerged, layer(*args, **kwargs), rtol=1e-4, atol=1e-5)
    assert (unmerged - base).abs().max() > 0.1
    layer.unmerge()
    layer.enable_adapters(False)
    assert torch.equal(layer(*args, **kwargs), base)


@each
def test_every_factor_gets_a_gradient_and_the_base_is_not_touched(name):
    make, args, kwargs = OWN[name]
    layer = layer_of(make())
    before = dict(layer.base_layer.named_parameters())
    layer(*args, **kwargs).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for n in "ab" for p in layer.parameters_of(n))
    assert all(value is before[key] for key, value in layer.base_layer.named_parameters())


def test_which_forwards_are_their_own():
    own = {name for name, (make, _, _) in OWN.items() if has_own_forward(make())}
    assert own == set(OWN)
    plain = type("Plain", (nn.Embedding,), {"extra_repr": lambda self: ""})
    assert not has_own_forward(plain(3, 3))
    assert not has_own_forward(Gemma3TextScaledWordEmbedding(3, 3, 0, embed_scale=2.0))
    assert has_own_forward(type("Own", (nn.Conv2d,), {"_conv_forward": lambda *_: None})(1, 1, 1))


@rows_where(lambda row: row.kind in {"embedding", "conv"})
def test_rows_say_which_they_are(row):
    assert has_own_forward(row.base(True)) == row.whole
    assert any(other.whole for other in ROWS if other.kind == row.kind)
