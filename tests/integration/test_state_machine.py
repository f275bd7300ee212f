"""Any order of operations on a model with adapters leaves it what a plain description says, or as it was.

Each step is one public call. A call that should work is done to the model and to the description; one that should be
refused must raise an `AdapterError` and change nothing: no bit, no object, no flag, no hook, no config. After every
step the model's output, its base weights and its state are those of the description (`oracle.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file

from integration.oracle import KINDS, Believed, Mixture, expected, ids, zoo
from lorakit import LoraConfig, get_peft_model
from lorakit.errors import AdapterError
from models import Snapshot, bits, randomise

PREFIX = "base_model.model."
MOST = 5  # adapters at a time
kinds = st.sampled_from(list(KINDS))
ranks = st.sampled_from([2, 4])
alphas = st.sampled_from([1.0, 3.0, 8.0])
which = st.integers(0, 59)
several = st.lists(which, max_size=3)
steps: Counter[str] = Counter()
"""What all runs together did: a machine that never merges two adapters proves nothing of it."""


def quietly(call, *args, **kwargs):
    """Warnings say what the call did beside; here that is checked by what it left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


class Adapters(RuleBasedStateMachine):
    """The model, and beside it what it should be."""

    @initialize(
        first=st.tuples(kinds, ranks, alphas), more=st.lists(st.tuples(kinds, ranks, alphas), max_size=3)
    )
    def begin(self, first, more):
        self.folder = Path(tempfile.mkdtemp())
        self.base = zoo()
        self.base_bits = {name: bits(tensor) for name, tensor in self.base.state_dict().items()}
        self.peft = quietly(get_peft_model, zoo(), config_of(*first), "adapter0").eval()
        self.believed: dict[str, Believed] = {}
        self.saved: dict[str, Believed] = {}
        self.active, self.merged, self.enabled = ["adapter0"], [], True
        self.made = self.named = 0
        self.learn("adapter0", *first)
        for one in more:
            self.add(one)

    def learn(self, name, kind, r, alpha):
        """Give a new adapter numbers, and write down what it is."""
        self.made += 1
        randomise(self.peft, name, seed=self.made, scale=0.3)
        self.believed[name] = Believed(kind, r, alpha, self.tensors(name))

    def new_name(self):
        self.named += 1
        return f"adapter{self.named}"

    def tensors(self, name):
        found = self.peft.base_model.registry.tensors(name)
        return {item.file_name: item.tensor.detach().clone() for item in found}

    def name(self, number):
        """One of the adapters that are there."""
        return list(self.believed)[number % len(self.believed)]

    def refused(self, why, call, *args, **kwargs):
        steps[f"refused: {why}"] += 1
        before = Snapshot(self.peft)
        with pytest.raises(AdapterError):
            quietly(call, *args, **kwargs)
        before.assert_same(self.peft)

    def can_act(self, chosen, *, for_merging=False):
        """Whether these adapters can be active together: no two own one module, bias or token."""
        owned: list[object] = []
        for name in chosen:
            fields = self.believed[name].fields
            for path, tokens in fields.get("trainable_token_indices", {}).items():
                owned += [(path, token) for token in tokens]
            if not for_merging:
                owned += fields.get("modules_to_save") or []
                owned += ["biases"] if fields.get("bias") else []
        return len(owned) == len(set(owned))

    # ---- what works, where it may -------------------------------------------------------------------

    @rule(one=st.tuples(kinds, ranks, alphas))
    def add(self, one):
        if len(self.believed) == MOST:
            return
        steps["add"] += 1
        name = self.new_name()
        quietly(self.peft.add_adapter, name, config_of(*one))
        self.learn(name, *one)
        self.active = [name] if len(self.believed) == 1 else self.active

    @precondition(lambda self: self.believed)
    @rule(numbers=several)
    def choose(self, numbers):
        chosen = list(dict.fromkeys(map(self.name, numbers)))
        if not self.can_act(chosen):
            self.refused("two owners act", self.peft.set_adapter, chosen)
            return
        steps[f"choose {len(chosen)}"] += 1
        quietly(self.peft.set_adapter, chosen)
        self.active, self.merged = chosen, []

    @precondition(lambda self: self.believed)
    @rule(number=which)
    def delete(self, number):
        name = self.name(number)
        if name in self.merged:
            self.refused("delete merged", self.peft.delete_adapter, name)
            return
        if len(self.believed) == 1 and number % 3:
            return  # a model without adapters is worth a visit, not a stay
        steps["delete"] += 1
        quietly(self.peft.delete_adapter, name)
        del self.believed[name]
        if name in self.active:
            self.active = [other for other in self.active if other != name] or list(self.believed)[:1]
            self.merged = []

    @precondition(lambda self: self.believed)
    @rule(numbers=st.none() | several)
    def merge(self, numbers):
        chosen = None if numbers is None else list(dict.fromkeys(map(self.name, numbers)))
        wanted = self.active if chosen is None else chosen
        new = [name for name in wanted if name not in self.merged]
        together = [*self.merged, *new]
        if new and not self.can_act(together, for_merging=True):
            self.refused("two owners merge", self.peft.merge_adapter, chosen)
            return
        steps[f"merged {len(together)}"] += 1
        quietly(self.peft.merge_adapter, chosen)
        self.merged = together

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        steps["unmerge"] += 1
        quietly(self.peft.unmerge_adapter)
        self.merged = []

    @rule(enabled=st.booleans())
    def switch(self, enabled):
        steps["switch"] += 1
        model = self.peft.base_model
        (model.enable_adapter_layers if enabled else model.disable_adapter_layers)()
        self.enabled = enabled

    @precondition(lambda self: self.believed)
    @rule(number=which, factor=st.sampled_from([0.5, 2.0]))
    def train(self, number, factor):
        """Change an adapter's numbers."""
        name = self.name(number)
        if name in self.merged or self.believed[name].kind == "mixture":
            return
        steps["train"] += 1
        with torch.no_grad():
            for item in self.peft.base_model.registry.tensors(name):
                item.tensor.mul_(factor)
        self.believed[name].tensors = self.tensors(name)

    @precondition(lambda self: self.believed)
    @rule(number=which)
    def save(self, number):
        steps["save"] += 1
        name = self.name(number)
        self.peft.save_pretrained(self.folder, selected_adapters=[name])
        self.saved[name] = self.believed[name].copy()

    def source(self, number):
        return list(self.saved)[number % len(self.saved)]

    @precondition(lambda self: self.believed)
    @rule(
        numbers=st.lists(which, min_size=1, max_size=2),
        weights=st.tuples(*[st.sampled_from([-1.0, 0.5, 2.0])] * 2),
    )
    def combine(self, numbers, weights):
        chosen = list(dict.fromkeys(map(self.name, numbers)))
        parts = [(self.believed[name], weight) for name, weight in zip(chosen, weights, strict=False)]
        sites = {site for part, _ in parts for site in part.sites()}
        biased = any(part.biased_factors("q.weight") is not None for part, _ in parts)
        odd = biased and any(
            site == "embed.weight" or site.startswith(("experts", "attention.in")) for site in sites
        )
        odd = odd and any(
            part.delta(site, self.base) is not None for part, _ in parts for site in sites - {"q.weight"}
        )
        if len(self.believed) == MOST or any(part.kind == "mixture" for part, _ in parts) or odd:
            return
        steps[f"combine {len(chosen)}"] += 1
        name = self.new_name()
        quietly(self.peft.add_weighted_adapter, chosen, weights[: len(chosen)], name, "sum")
        self.believed[name] = Mixture(self.base, parts, self.tensors(name))

    @precondition(lambda self: self.saved)
    @rule(number=which)
    def load(self, number):
        if len(self.believed) == MOST:
            return
        steps["load"] += 1
        name, kept = self.new_name(), self.saved[self.source(number)]
        quietly(self.peft.load_adapter, self.folder / self.source(number), name)
        self.believed[name] = kept.copy()
        self.active = [name] if len(self.believed) == 1 else self.active

    @precondition(lambda self: self.saved and self.believed)
    @rule(number=which, place=which)
    def replace(self, number, place):
        name, kept = self.name(place), self.saved[self.source(number)]
        call = (self.peft.load_adapter, self.folder / self.source(number), name)
        if self.merged:
            self.refused("replace while merged", *call, replace=True)
            return
        former = self.believed[name]
        self.believed[name] = kept.copy()
        if name in self.active and not self.can_act(self.active):
            self.believed[name] = former
            self.refused("replaced by a second owner", *call, replace=True)
            return
        steps["replace"] += 1
        quietly(*call, replace=True)

    @precondition(lambda self: self.believed)
    @rule(numbers=several, base=st.booleans())
    def choose_for_a_call(self, numbers, base):
        """One adapter for each of the two samples; experts and attention do not see samples."""
        chosen = ["__base__" if base else self.name(0), *map(self.name, numbers)][-2:]
        chosen = chosen if len(chosen) == 2 else [*chosen, "__base__"]
        used = [self.believed[name] for name in chosen if name != "__base__"]
        biased = [self.believed[name].fields.get("bias") for name in self.active]
        sites = {site for item in used for site in item.sites()}
        hidden = any(site.startswith(("attention", "experts")) for site in sites) and self.enabled
        if self.merged or any(biased) or hidden or any(item.fields.get("bias") for item in used):
            self.refused("mixed batch", self.peft, ids(), adapter_names=chosen)
            return
        steps["mixed batch"] += 1
        with torch.no_grad():
            found = self.peft(ids(), adapter_names=chosen)
        for row, name in enumerate(chosen):
            one = [] if name == "__base__" else [name]
            wanted = expected(self.base, self.believed, one, [], enabled=self.enabled)
            torch.testing.assert_close(found[row], wanted[row], rtol=1e-9, atol=1e-9)

    # ---- what never works -----------------------------------------------------------------------------

    @precondition(lambda self: self.saved)
    @rule(number=which, place=which, damage=st.sampled_from(["missing", "unexpected", "shape", "nan", "cut"]))
    def load_damaged(self, number, place, damage):
        broken = self.folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(self.folder / self.source(number), broken) if self.source(
            number
        ) != "default" else None
        file = broken / "adapter_model.safetensors"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-3])
        else:
            tensors = load_file(file)
            key = sorted(tensors)[place % len(tensors)]
            changes = {
                "missing": lambda: tensors.pop(key),
                "unexpected": lambda: tensors.update({PREFIX + "norm.running_mean": torch.zeros(8)}),
                "shape": lambda: tensors.update({key: torch.zeros(1, *tensors[key].shape)}),
                "nan": lambda: tensors[key].fill_(float("nan")),
            }
            changes[damage]()
            save_file(tensors, file)
        name = self.name(place) if self.believed and place % 2 else "new"
        self.refused(f"damaged: {damage}", self.peft.load_adapter, broken, name, replace=True)

    @precondition(lambda self: self.believed)
    @rule(number=which)
    def merge_not_finite(self, number):
        name = self.name(number)
        if name in self.merged:
            return
        factors = [t for t in self.peft.base_model.registry.tensors(name) if "lora_" in t.file_name]
        place = factors[-1].tensor.data.view(-1)[:1]
        before = place.clone()
        place.fill_(float("inf"))
        self.refused("merge infinity", self.peft.merge_adapter, [name])
        place.copy_(before)

    @rule()
    def nonsense(self):
        taken = [*self.believed, "keys"][0]
        self.refused("unknown", self.peft.set_adapter, "nope")
        self.refused("unknown", self.peft.merge_adapter, ["nope"])
        self.refused("unknown", self.peft.delete_adapter, "nope")
        self.refused("unknown", self.peft.save_pretrained, self.folder, selected_adapters=["nope"])
        self.refused("unknown", self.peft, ids(), adapter_names=["nope", "__base__"])
        self.refused("taken", self.peft.add_adapter, taken, config_of("matrices", 2, 1.0))
        self.refused("does not fit", self.peft.add_adapter, "new", LoraConfig(target_modules=["q", "nope"]))

    # ---- what holds after every step ------------------------------------------------------------------

    @invariant()
    def computes_what_it_should(self):
        if not hasattr(self, "peft"):
            return
        with torch.no_grad():
            found = self.peft(ids())
        wanted = expected(self.base, self.believed, self.active, self.merged, enabled=self.enabled)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)

    @invariant()
    def is_in_the_state_it_should_be_in(self):
        if not hasattr(self, "peft"):
            return
        registry = self.peft.base_model.registry
        assert set(registry.configs) == set(self.believed)
        assert list(registry.active) == self.active
        assert set(registry.merged) == set(self.merged)
        assert registry.enabled == self.enabled
        for name, kept in self.believed.items():
            found = self.tensors(name)
            assert found.keys() == kept.tensors.keys()
            assert all(torch.equal(found[key], kept.tensors[key]) for key in found)

    @invariant()
    def keeps_the_bits_of_the_base(self):
        if not hasattr(self, "peft"):
            return
        biased = any(item.fields.get("bias") for item in self.believed.values())
        for name, tensor in self.peft.state_dict().items():
            plain = name.removeprefix(PREFIX)
            if any(part in plain for part in ("lora_", "modules_to_save", "token_adapter")):
                continue
            plain = plain.replace("base_layer.", "").replace("original_module.", "")
            if plain.endswith("bias") and biased:
                continue  # the state dict shows the copy that acts
            assert bits(tensor) == self.base_bits[plain], plain

    def teardown(self):
        if not hasattr(self, "peft"):
            return
        quietly(self.peft.unmerge_adapter)
        model = self.peft.unload()
        assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == self.base_bits
        shutil.rmtree(self.folder)


def config_of(kind, r, alpha):
    return LoraConfig(**{"r": r, "lora_alpha": alpha, **KINDS[kind][0]})


NIGHTLY = os.environ.get("LORAKIT_NIGHTLY") == "1"
TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    max_examples=600 if NIGHTLY else 100,
    stateful_step_count=50 if NIGHTLY else 30,
    deadline=None,
    derandomize=True,
    database=None,
    # a failing run is short enough to read, and making it shorter takes minutes
    phases=[Phase.generate, Phase.shrink] if NIGHTLY else [Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def test_the_machine_went_everywhere():
    """Runs after the machine: each kind of step must have been taken, or the runs prove nothing of it."""
    if not steps:
        pytest.skip("the state machine did not run before this test")
    rare = [
        *(
            "add",
            "choose 0",
            "choose 1",
            "choose 2",
            "delete",
            "merged 1",
            "merged 2",
            "unmerge",
            "switch",
            "train",
        ),
        *("save", "load", "replace", "mixed batch", "combine 1", "combine 2"),
        *(
            "refused: two owners act",
            "refused: two owners merge",
            "refused: delete merged",
            "refused: mixed batch",
        ),
        *("refused: merge infinity", "refused: unknown", "refused: taken", "refused: replace while merged"),
        *(f"refused: damaged: {what}" for what in ("missing", "unexpected", "shape", "nan", "cut")),
    ]
    assert not [what for what in rare if not steps[what]], steps
