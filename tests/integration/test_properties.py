"""Properties that hold for any small model and any config: what cancels, cancels bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, PeftModel, get_peft_model
from models import Snapshot, randomise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("alpha", "beta", "gamma")
properties = settings(deadline=None, max_examples=30, derandomize=True, database=None)


class Tree(nn.Module):
    """Named matrices in a chain, some inside groups; x (batch, first) -> (batch, last)."""

    def __init__(self, widths, kinds, biases, groups):
        super().__init__()
        self.names = []
        for n, (kind, bias, group) in enumerate(zip(kinds, biases, groups, strict=True)):
            rows, columns = widths[n + 1], widths[n]
            made = Conv1D(rows, columns) if kind == "conv1d" else nn.Linear(columns, rows, bias=bias)
            nn.init.normal_(made.weight, std=0.5)
            owner = self
            if group:
                owner = self._modules.setdefault(f"group{n % 2}", nn.Module())
            name = f"{NAMES[n % 3]}_{n}"
            owner.add_module(name, made)
            self.names.append(f"group{n % 2}.{name}" if group else name)

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


class Case:
    """How to build one model, the same each time, with its config and its input."""

    def __init__(self, tree, dtype, changes, seed):
        self.tree, self.dtype, self.changes, self.seed = tree, dtype, changes, seed

    def base(self):
        torch.manual_seed(self.seed)
        return Tree(*self.tree).to(self.dtype).eval()

    def config(self, **more):
        return LoraConfig(**{**self.changes, **more})

    def adapted(self, **more):
        peft = get_peft_model(self.base(), self.config(**more))
        randomise(peft, seed=self.seed + 1)
        return peft

    def run(self, model):
        x = torch.randn(4, self.tree[0][0], generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        with torch.no_grad():
            return model(x)

    def __repr__(self):
        return f"Case({self.tree}, {self.dtype}, {self.changes}, {self.seed})"


@st.composite
def cases(draw):
    depth = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 9), min_size=depth + 1, max_size=depth + 1))
    kinds = draw(st.lists(st.sampled_from(["linear", "conv1d"]), min_size=depth, max_size=depth))
    biases = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    groups = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    tree = (widths, kinds, biases, groups)
    names = Tree(*tree).names
    targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    changes = {
        "target_modules": targets,
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.floats(0.25, 8)),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
    }
    if draw(st.booleans()):
        changes["rank_pattern"] = {targets[0]: draw(st.integers(1, 7))}
    if draw(st.booleans()):
        changes["alpha_pattern"] = {targets[-1]: draw(st.floats(-4, -0.5))}
    rest = [name for name in names if name not in targets]
    if rest and draw(st.booleans()):
        changes["modules_to_save"] = [draw(st.sampled_from(rest))]
    return Case(tree, draw(st.sampled_from(DTYPES)), changes, draw(st.integers(0, 999)))


def close(case, found, wanted, steps=64):
    """Within rounding of numbers of size 1 through a few layers of a few dozen products each."""
    error = (found.double() - wanted.double()).abs().max().item()
    assert error <= steps * torch.finfo(case.dtype).eps, error


def assert_same_bits(found, wanted):
    assert torch.equal(found, wanted), (found.double() - wanted.double()).abs().max()


@given(cases())
@properties
def test_load_of_save_is_the_identity(case):
    first = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        first.save_pretrained(one)
        second = PeftModel.from_pretrained(case.base(), one)
        second.save_pretrained(two)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
    assert_same_bits(case.run(second), case.run(first))


@given(cases())
@properties
def test_unmerge_of_merge_is_the_identity(case):
    peft = case.adapted()
    before, output = Snapshot(peft), case.run(peft)
    peft.merge_adapter()
    peft.unmerge_adapter()
    before.assert_same(peft)
    assert_same_bits(case.run(peft), output)


@given(cases())
@properties
def test_merged_computes_the_same(case):
    peft = case.adapted()
    output = case.run(peft)
    peft.merge_adapter()
    close(case, case.run(peft), output)
    peft.unmerge_adapter()
    close(case, case.run(peft.merge_and_unload()), output)


@given(cases(), st.booleans())
@properties
def test_disabled_is_the_base(case, merged):
    output = case.run(case.base())
    peft = case.adapted()
    acting = case.run(peft)
    if merged:
        peft.merge_adapter()
    with peft.disable_adapter():
        assert_same_bits(case.run(peft), output)
    if merged:
        peft.unmerge_adapter()
    assert_same_bits(case.run(peft), acting)


@given(cases(), cases())
@properties
def test_added_and_deleted_is_never_added(case, other):
    peft = case.adapted()
    before = Snapshot(peft)
    more = {**other.changes, "target_modules": "all-linear", "rank_pattern": {}, "alpha_pattern": {}}
    peft.add_adapter("other", LoraConfig(**{**more, "modules_to_save": None}))
    peft.delete_adapter("other")
    before.assert_same(peft)


@given(cases())
@properties
def test_unloaded_is_as_never_wrapped(case):
    model = case.base()
    before = Snapshot(model)
    get_peft_model(model, case.config()).unload()
    before.assert_same(model)


@given(cases())
@properties
def test_merge_order_does_not_matter(case):
    outputs = []
    for order in (("default", "other"), ("other", "default")):
        peft = case.adapted(bias="none", modules_to_save=None)
        peft.add_adapter("other", case.config(bias="none", modules_to_save=None, r=3))
        randomise(peft, "other", seed=77)
        for name in order:
            peft.merge_adapter([name])
        outputs.append(case.run(peft))
        peft.unmerge_adapter()
        peft.set_adapter(["default", "other"])
        outputs.append(case.run(peft))
    for found in outputs[1:]:
        close(case, found, outputs[0])
