"""One row for each kind of layer and each of its variations, and what every test of layers starts from.

The reference is torch itself: the row's own base module, run in fp64 by `functional_call` with the weight that the
adapter should amount to. That weight is built here element by element, without asking the library how factors lie.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import embedding, pad
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lorakit.layers import LAYER_KINDS, PARAMETER
from lorakit.weights import find_codec
from models import bits, random_factors, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

OUT, IN, WORDS, EXPERTS = 10, 12, 9, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = {kind.name: kind for kind in (*LAYER_KINDS, PARAMETER)}


# ---- base modules -------------------------------------------------------------------------------------


def linear(bias):
    return nn.Linear(IN, OUT, bias=bias)


def conv1d(bias):
    made = Conv1D(OUT, IN)
    nn.init.normal_(made.weight, std=0.3)
    nn.init.normal_(made.bias) if bias else nn.init.zeros_(made.bias)
    return made


def conv(kind, channels=(4, 6), kernel=3, **options):
    return lambda bias: kind(*channels, kernel, bias=bias, **options)


class Mixture(nn.Module):
    """A module whose own forward multiplies a bare parameter, as experts do; linear in it and in x."""

    def __init__(self, *shape, is_transposed=None):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(shape) * 0.4)
        if is_transposed is not None:
            self.is_transposed = is_transposed

    def forward(self, x):
        """x (..., in), or (experts, tokens, in) -> the same with out in the place of in."""
        return x @ (self.weights if getattr(self, "is_transposed", False) else self.weights.mT)


class Shifted(nn.Embedding):
    """As learned positions are: what it looks up is not what it is given."""

    def forward(self, x):
        return super().forward(x + 2)


class Causal(nn.Conv2d):
    """A convolution that pads by itself, before."""

    def forward(self, x):
        return super().forward(pad(x, (2, 0, 1, 0)))


# ---- inputs, in fp64 ------------------------------------------------------------------------------------


def normal(*shape):
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def tokens():
    """Every token, some of them several times, so that frequencies and the padding matter."""
    return torch.tensor([[0, 3, 3, 8, 1], [2, 0, 0, 7, 3], [4, 5, 6, 3, 1]])


class Row(NamedTuple):
    """One kind of base module.

    Attributes:
        name: of the row.
        kind: of the layer, as its registry names it.
        base: makes the module in fp32, with a bias or not.
        data: makes an input of three samples, fp64 or ids.
        stored: how the weight lies: (out, in) as "matrix", else "transposed", "conv", "experts", "experts_transposed".
        attribute: the weight's name.
        unit: what ranks must be divisible by.
        whole: the module has a forward of its own.
    """

    name: str
    kind: str
    base: Callable[[bool], nn.Module]
    data: Callable[[], torch.Tensor]
    stored: str = "matrix"
    attribute: str = "weight"
    unit: int = 1
    whole: bool = False

    @property
    def has_bias(self):
        return KINDS[self.kind].has_bias

    @property
    def drops(self):
        """Whether dropout acts."""
        return self.kind != "embedding" and not self.runs_whole

    @property
    def runs_whole(self):
        """Whether the module's own forward computes with the changed weight; else the layer adds to its output."""
        return self.whole or self.kind == "parameter"

    @property
    def has_modules(self):
        """Whether the factors are modules that the layer calls."""
        return self.drops

    def __str__(self):
        return self.name


LINE, IMAGE, VOLUME = normal(3, 4, 9), normal(3, 4, 6, 7), normal(3, 4, 5, 4, 6)

ROWS = (
    Row("linear", "linear", linear, normal(3, 5, IN)),
    Row("conv1d", "conv1d", conv1d, normal(3, 5, IN), "transposed"),
    Row("embedding", "embedding", lambda _: nn.Embedding(WORDS, OUT), tokens, "transposed"),
    Row(
        "embedding_padded",
        "embedding",
        lambda _: nn.Embedding(WORDS, OUT, padding_idx=3),
        tokens,
        "transposed",
    ),
    Row(
        "embedding_by_freq",
        "embedding",
        lambda _: nn.Embedding(WORDS, OUT, padding_idx=1, scale_grad_by_freq=True),
        tokens,
        "transposed",
    ),
    Row(
        "embedding_scaled",
        "embedding",
        lambda _: Gemma3TextScaledWordEmbedding(WORDS, OUT, padding_idx=0, embed_scale=3.3),
        tokens,
        "transposed",
    ),
    Row("line", "conv", conv(nn.Conv1d, stride=2, padding=2, dilation=2), LINE, "conv"),
    Row("line_circular", "conv", conv(nn.Conv1d, padding=1, padding_mode="circular"), LINE, "conv"),
    Row("image", "conv", conv(nn.Conv2d, kernel=(3, 2), stride=(1, 2), padding=(2, 1)), IMAGE, "conv"),
    Row("image_pointwise", "conv", conv(nn.Conv2d, kernel=1), IMAGE, "conv"),
    Row("image_same", "conv", conv(nn.Conv2d, kernel=(4, 3), padding="same", dilation=(2, 1)), IMAGE, "conv"),
    Row("image_groups", "conv", conv(nn.Conv2d, padding=1, stride=2, groups=2), IMAGE, "conv", unit=2),
    Row(
        "image_groups_reflect",
        "conv",
        conv(nn.Conv2d, kernel=(2, 3), padding="same", padding_mode="reflect", groups=2),
        IMAGE,
        "conv",
        unit=2,
    ),
    Row("image_depthwise", "conv", conv(nn.Conv2d, (4, 4), padding=1, groups=4), IMAGE, "conv", unit=4),
    Row("volume", "conv", conv(nn.Conv3d, kernel=(1, 3, 2), padding=(0, 1, 0)), VOLUME, "conv"),
    Row(
        "volume_groups",
        "conv",
        conv(nn.Conv3d, kernel=2, padding=1, padding_mode="replicate", groups=2),
        VOLUME,
        "conv",
        unit=2,
    ),
    Row(
        "embedding_shifted",
        "embedding",
        lambda _: Shifted(WORDS + 2, OUT, padding_idx=4),
        tokens,
        "transposed",
        whole=True,
    ),
    Row("image_causal", "conv", conv(Causal, kernel=(2, 3)), IMAGE, "conv", whole=True),
    Row("image_causal_groups", "conv", conv(Causal, groups=2), IMAGE, "conv", unit=2, whole=True),
    Row("matrix", "parameter", lambda _: Mixture(OUT, IN), normal(3, 5, IN), attribute="weights"),
    Row(
        "experts",
        "parameter",
        lambda _: Mixture(EXPERTS, OUT, IN),
        normal(EXPERTS, 5, IN),
        "experts",
        attribute="weights",
    ),
    Row(
        "experts_transposed",
        "parameter",
        lambda _: Mixture(EXPERTS, IN, OUT, is_transposed=True),
        normal(EXPERTS, 5, IN),
        "experts_transposed",
        attribute="weights",
    ),
)

each = pytest.mark.parametrize("row", ROWS, ids=str)
each_with_bias = pytest.mark.parametrize(
    ("row", "bias"),
    [
        pytest.param(row, bias, id=f"{row}-{'bias' if bias else 'plain'}")
        for row in ROWS
        for bias in ((True, False) if row.has_bias else (False,))
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rows_where(test):
    """Parametrise over the rows that a property is about."""
    return pytest.mark.parametrize("row", [row for row in ROWS if test(row)], ids=str)


# ---- layers ---------------------------------------------------------------------------------------------


def codec_of(row, base):
    return find_codec(base, row.attribute if row.kind == "parameter" else None)


def spec_for(row, layout, n=0, dtype=torch.float32, **changes):
    """The n-th adapter's spec: ranks 2, 3, 4 ... times what the row wants, scalings 0.75, 1.25, 1.75 ..."""
    r = row.unit * (2 + n)
    spec = spec_of((1, 1), dtype, r=r, alpha=(0.75 + n / 2) * r)
    return replace(spec, kind=row.kind, layout=layout, **changes)


def blocks_for(spec, seed=0, size=0.4):
    """Random factors of each block of a spec."""
    layout = spec.layout
    return [
        random_factors(
            layout.block_shape,
            spec.dtype,
            r=layout.block_rank(spec.r),
            scaling=spec.scaling,
            bias=spec.lora_bias,
            seed=97 * seed + block,
            size=size,
        )
        for block in range(layout.blocks)
    ]


def make(
    row, dtype=torch.float32, names=("a",), *, bias=True, adapter_dtype=None, dropout=0.0, lora_bias=False
):
    """A layer with active adapters of different ranks, and an effect as large as the base's."""
    torch.manual_seed(1)
    base = row.base(bias).to(dtype)
    layer = KINDS[row.kind].layer(base, codec_of(row, base))
    for n, name in enumerate(names):
        biased = lora_bias and row.has_bias
        spec = spec_for(row, layer.layout, n, adapter_dtype or dtype, dropout=dropout, lora_bias=biased)
        layer.add(name, blocks_for(spec, seed=n), spec, use_rslora=False)
    layer.set_adapter(names)
    return layer.eval()


def data(row, dtype=torch.float32):
    x = row.data()
    return x.to(dtype) if x.is_floating_point() else x


def weight_of(row, layer):
    """The parameter that the base holds now."""
    return getattr(layer.get_base_layer(), row.attribute)


def facts(row, layer):
    """What a call that is refused, or undone, must leave alone."""
    base = layer.get_base_layer()
    weight = weight_of(row, layer)
    return (
        id(weight),
        bits(weight),
        getattr(base, "groups", None),
        list(layer.merged_adapters),
        dict(layer.scaling),
        {name: [bits(tensor) for tensor in layer.stored(name) if tensor is not None] for name in layer.r},
    )


# ---- the reference --------------------------------------------------------------------------------------


def dense_delta(row, A, B):
    """What stored factors amount to, in the shape of the stored weight; of a grouped convolution ungrouped."""
    if row.stored == "matrix":
        return B @ A
    if row.stored == "transposed":
        return (B @ A).T
    if row.stored == "conv":
        return _conv_delta(A, B)
    matrices = []
    for expert in range(EXPERTS):
        r = len(A) // EXPERTS
        matrices.append(B[:, expert::EXPERTS] @ A[expert * r : (expert + 1) * r])
    delta = torch.stack(matrices)
    return delta.mT if row.stored == "experts_transposed" else delta


def _conv_delta(A, B):
    """Output o belongs to group g; it mixes the ranks of that group alone, each of which sees every channel."""
    out, per_group = B.shape[:2]
    groups = len(A) // per_group
    outputs = []
    for o in range(out):
        g = o * groups // out
        ranks = A[g * per_group : (g + 1) * per_group]
        outputs.append(sum(B[o, k].flatten()[0] * ranks[k] for k in range(per_group)))
    return torch.stack(outputs)


def zeros_like_bias(module):
    return None if getattr(module, "bias", None) is None else torch.zeros_like(module.bias)


def of_delta(base):
    """The base as a function of a dense weight alone: not grouped, no bias, and no hooks."""
    plain = copy.deepcopy(base).requires_grad_(False)
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks):
        hooks.clear()
    if isinstance(plain, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        plain.groups = 1
    if getattr(plain, "bias", None) is not None:
        plain.bias.zero_()
    return plain.double()


def run(row, module, x, weight, bias=None):
    """The module's forward with another weight, and another bias if it has one."""
    values = {row.attribute: weight} if bias is None else {row.attribute: weight, "bias": bias}
    return functional_call(module, values, (x,))


def as_channels(row, bias, y):
    """A bias in the shape that adds to y: along dimension 1 of convolutions, along the last of others."""
    return bias.view(-1, *(1,) * (y.ndim - 2)) if row.stored == "conv" else bias


def adapter_output(row, plain, x, A, B):
    """What one adapter adds, before its scaling and bias; `plain` as `of_delta` makes it. Differentiable."""
    if row.kind == "embedding" and not row.whole:  # a product of two steps, each with a gradient of its own
        found = embedding(x, A.T, plain.padding_idx, None, 2.0, plain.scale_grad_by_freq) @ B.T
        return found * getattr(plain, "embed_scale", 1.0)
    return run(row, plain, x, dense_delta(row, A, B))


def expected(row, layer, x, names):
    """The output in fp64 of an unmerged layer, and the size of what it was summed from, which bounds the rounding."""
    base, x = layer.get_base_layer(), x.detach().contiguous()
    x = x.double() if x.is_floating_point() else x
    size_x = x.abs() if x.is_floating_point() else x
    weight = weight_of(row, layer).detach().double()
    bias = getattr(base, "bias", None)
    bias = None if bias is None else bias.detach().double()
    twin = copy.deepcopy(base).double()
    y = run(row, twin, x, weight, bias)
    size = run(row, twin, size_x, weight.abs(), None if bias is None else bias.abs())
    plain = of_delta(base)
    for name in names:
        A, B, own = (None if part is None else part.detach().double() for part in layer.stored(name))
        s = float(layer.scaling[name])
        y = y + s * run(row, plain, x, dense_delta(row, A, B))
        size = size + abs(s) * run(row, plain, size_x, dense_delta(row, A.abs(), B.abs()))
        if own is not None:
            y, size = y + as_channels(row, s * own, y), size + as_channels(row, (s * own).abs(), y)
    return y.detach(), size.detach()


def assert_near(found, wanted, dtype, steps):
    """Off by no more than some roundings of the summands' size."""
    y, size = wanted
    assert found.dtype == dtype
    assert found.shape == y.shape
    steps = (
        2 * steps if dtype == torch.float64 else steps
    )  # there the reference is no wider than what it judges
    worst = ((found.detach().double() - y).abs() / (size * torch.finfo(dtype).eps + 1e-300)).max().item()
    assert worst <= steps, f"{worst:.2f} roundings of the summands' size, {steps} allowed"


def assert_forward(row, layer, x, names, dtype=None, steps=3):
    assert_near(layer(x), expected(row, layer, x, names), dtype or x.dtype, steps)
