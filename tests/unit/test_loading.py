"""Loading is all or nothing, reads only its own, and runs no initialiser."""

from __future__ import annotations

import cProfile
import json
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    fitting,
)
from lorakit.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    KeyMismatchError,
    NonFiniteError,
    UnsupportedError,
)
from models import (
    Snapshot,
    another,
    bits,
    config,
    ids,
    logits,
    randomise,
    tiny,
    tiny_bert,
    tiny_llama,
    with_adapter,
)

P = "base_model.model."
Q = P + "layers.0.q_proj."


@pytest.fixture
def saved(tmp_path):
    """An adapter on disk, without the digest that only an untouched file has."""
    with_adapter(tiny(), seed=8).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: None)
    return tmp_path


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(key, *shape):
    return lambda tensors: tensors.update({key: torch.ones(*shape)})


def nan(tensors):
    tensors[Q + "lora_A.weight"][0, 0] = float("nan")


def other_prefix(tensors):
    for key in list(tensors):
        tensors["model." + key.removeprefix(P)] = tensors.pop(key)


FAULTS = {
    "missing": (lambda t: t.pop(Q + "lora_B.weight"), {}, KeyMismatchError, "missing: .*q_proj.lora_B"),
    "all missing": (lambda t: [t.pop(k) for k in list(t)[1:]], {}, KeyMismatchError, "missing"),
    "unexpected": (
        put(P + "layers.7.q_proj.lora_A.weight", 4, 8),
        {},
        KeyMismatchError,
        "unexpected: .*layers.7",
    ),
    "base norm": (put(P + "layers.0.norm.weight", 8), {}, KeyMismatchError, "unexpected: .*norm.weight"),
    "base weight": (put(Q + "base_layer.weight", 8, 8), {}, KeyMismatchError, "unexpected: .*base_layer"),
    "head": (put(P + "head.weight", 11, 8), {}, KeyMismatchError, "unexpected: .*head.weight"),
    "another adapter": (
        put(Q + "lora_B.default.weight", 8, 4),
        {},
        KeyMismatchError,
        "unexpected: .*B.default",
    ),
    "shape": (put(Q + "lora_A.weight", 4, 9), {}, KeyMismatchError, r"\(4, 9\), expected \(4, 8\)"),
    "rank": (lambda t: None, {"r": 3}, KeyMismatchError, r"found \(4, 8\), expected \(3, 8\)"),
    "huge rank": (lambda t: None, {"r": 10**6}, KeyMismatchError, "expected"),
    "NaN": (nan, {}, NonFiniteError, "q_proj.lora_A"),
    "prefix": (other_prefix, {}, AdapterFormatError, "base_model.model."),
    "alpha": (lambda t: None, {"lora_alpha": "16"}, ConfigError, "lora_alpha"),
    "targets": (lambda t: None, {"target_modules": ["nope"]}, AdapterError, "nope|matches no module"),
    "dora": (lambda t: None, {"use_dora": True}, KeyMismatchError, "missing: .*lora_magnitude_vector"),
    "type": (lambda t: None, {"peft_type": "IA3"}, AdapterError, "IA3"),
    "fewer targets": (lambda t: None, {"target_modules": ["q_proj"]}, KeyMismatchError, "unexpected: .*c_fc"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_refused_load_changes_nothing(saved, fault):
    edit, changes, error, words = FAULTS[fault]
    rewrite(saved, edit)
    reconfigure(saved, **changes)
    bare = tiny()
    before = Snapshot(bare)
    with pytest.raises(error, match=f"(?s){words}"):
        PeftModel.from_pretrained(bare, saved)
    before.assert_same(bare)
    peft = with_adapter(tiny(), modules_to_save=["head"], bias="all")
    before, output = Snapshot(peft), logits(peft)
    with pytest.raises(error, match=f"(?s){words}"):
        peft.load_adapter(saved, "evil")
    before.assert_same(peft)
    with pytest.raises(error):
        peft.load_adapter(saved, "default", replace=True)
    before.assert_same(peft)
    assert torch.equal(logits(peft), output)


def test_layers_that_are_not_there(saved):
    bare = tiny(layers=1)
    before = Snapshot(bare)
    with pytest.raises(KeyMismatchError, match=r"unexpected: .*layers\.1"):
        PeftModel.from_pretrained(bare, saved)
    before.assert_same(bare)


@pytest.mark.parametrize("name", ["default", "a.b", "keys"])
def test_names_are_checked_first(saved, name):
    peft = with_adapter(tiny())
    before = Snapshot(peft)
    with pytest.raises(AdapterNameError):
        peft.load_adapter(saved, name)
    before.assert_same(peft)


def test_nothing_there(tmp_path):
    bare = tiny()
    before = Snapshot(bare)
    with pytest.raises(AdapterNotFoundError):
        PeftModel.from_pretrained(bare, tmp_path)
    before.assert_same(bare)


def test_round_trip(tmp_path):
    first = with_adapter(tiny(), modules_to_save=["head"], bias="all", rank_pattern={"c_fc": 2})
    first.save_pretrained(tmp_path / "one")
    second = PeftModel.from_pretrained(tiny(), tmp_path / "one")
    assert torch.equal(logits(second), logits(first))
    second.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_merged_saves_the_same(tmp_path):
    peft = with_adapter(tiny())
    peft.save_pretrained(tmp_path / "one")
    peft.merge_adapter()
    peft.save_pretrained(tmp_path / "two")
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_not_strict_lists_what_it_passed_over(saved):
    rewrite(saved, lambda t: t.pop(Q + "lora_B.weight"))
    rewrite(saved, put(P + "layers.0.norm.weight", 8))
    peft = with_adapter(tiny())
    norm = bits(peft.get_base_model().layers[0].norm.weight)
    report = peft.load_adapter(saved, "other", strict=False)
    assert report.missing_keys == (Q + "lora_B.weight",)
    assert report.unexpected_keys == (P + "layers.0.norm.weight",)
    assert bits(peft.get_base_model().layers[0].norm.weight) == norm
    layer = peft.base_model.registry.layers["layers.0.q_proj"]
    assert layer.factors("other").delta().abs().max() == 0
    rewrite(saved, put(Q + "lora_A.weight", 4, 9))
    before = Snapshot(peft)
    with pytest.raises(KeyMismatchError, match="wrong shape"):
        peft.load_adapter(saved, "third", strict=False)
    before.assert_same(peft)


def test_replace_swaps_weights_and_config(saved):
    peft = with_adapter(tiny(), r=2, lora_alpha=3, target_modules=["down"])
    peft.load_adapter(saved, "default", replace=True)
    assert torch.equal(logits(peft), logits(PeftModel.from_pretrained(tiny(), saved)))
    assert (peft.peft_config["default"].r, peft.peft_config["default"].lora_alpha) == (4, 8)
    assert set(peft.base_model.registry.layers) == {
        f"layers.{n}.{m}" for n in (0, 1) for m in ("q_proj", "c_fc")
    }
    assert not any(p.requires_grad for p in peft.parameters())
    peft.merge_adapter()
    before = Snapshot(peft)
    with pytest.raises(AdapterStateError, match="merged"):
        peft.load_adapter(saved, "default", replace=True)
    before.assert_same(peft)


def test_replace_that_fails_late_brings_the_former_back(saved, monkeypatch):
    peft = with_adapter(tiny(), r=2, target_modules=["down", "q_proj"])
    another(peft, "other", seed=9)
    peft.base_model.registry.layers["layers.0.q_proj"].set_scale("default", 3.0)
    output, kept = logits(peft), {name: bits(t) for name, t in peft.state_dict().items()}
    former, parameters = peft.peft_config["default"], dict(peft.named_parameters())
    from lorakit.layers import LoraLayer

    real, calls = LoraLayer.add_stored, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "add_stored", failing)
    with pytest.raises(MemoryError):
        peft.load_adapter(saved, "default", replace=True)
    assert torch.equal(logits(peft), output)
    assert {name: bits(t) for name, t in peft.state_dict().items()} == kept
    assert peft.peft_config["default"] == former
    assert all(parameter is parameters[name] for name, parameter in peft.named_parameters())
    assert peft.active_adapters == ["default"]
    assert {n for n, p in peft.named_parameters() if p.requires_grad} == {
        n for n, _ in peft.named_parameters() if ".default." in n
    }


def test_embeddings_that_came_with_the_adapter(tmp_path):
    first = with_adapter(tiny_llama(), target_modules=["q_proj"])
    with torch.no_grad():
        first.get_base_model().model.embed_tokens.weight.add_(0.5)
    first.save_pretrained(tmp_path, save_embedding_layers=True)
    bare = tiny_llama()
    before, output = Snapshot(bare), logits(bare)
    with pytest.raises(KeyMismatchError, match="allow_base_weights=True"):
        PeftModel.from_pretrained(bare, tmp_path)
    before.assert_same(bare)
    peft = PeftModel.from_pretrained(bare, tmp_path, allow_base_weights=True)
    assert torch.equal(logits(peft), logits(first))
    with peft.disable_adapter():
        assert torch.equal(logits(peft), output)
    peft.load_adapter(tmp_path, "more", allow_base_weights=True)
    peft.delete_adapter("more")
    assert torch.equal(logits(peft), logits(first))
    peft.unload()
    before.assert_same(bare)


def test_no_initialiser_runs_and_no_other_adapter_is_visited(saved, monkeypatch):
    peft = with_adapter(tiny())
    monkeypatch.setattr("lorakit.surgery.registry.AdapterRegistry.set_active", None)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a load must neither draw numbers nor change the other adapters")

    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    peft.load_adapter(saved, "other")
    assert peft.active_adapters == ["default"]


@pytest.mark.parametrize("trainable", [False, True])
def test_flags_and_mode_after_a_load(saved, trainable):
    peft = PeftModel.from_pretrained(tiny().train(), saved, is_trainable=trainable)
    assert peft.training == trainable
    assert {name for name, p in peft.named_parameters() if p.requires_grad} == (
        {name for name, _ in peft.named_parameters() if "lora_" in name} if trainable else set()
    )


def test_unknown_options_are_refused(saved):
    bare = tiny()
    before = Snapshot(bare)
    with pytest.raises(TypeError, match="unknwon"):
        PeftModel.from_pretrained(bare, saved, unknwon=1)
    before.assert_same(bare)


# ---- AutoPeftModel ------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def stored(tmp_path, model, **changes):
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    peft = with_adapter(model, **changes)
    peft.save_pretrained(tmp_path / "adapter")
    return peft


AUTO = (
    (AutoPeftModelForCausalLM, tiny_llama, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}),
    (
        AutoPeftModelForSequenceClassification,
        tiny_bert,
        {"task_type": "SEQ_CLS", "target_modules": ["query"]},
    ),
    (AutoPeftModel, tiny_llama, {"target_modules": ["q_proj"]}),
)


@pytest.mark.parametrize(("auto", "build", "changes"), AUTO, ids=["causal", "classifier", "by class name"])
def test_auto_on_local_folders(tmp_path, offline, auto, build, changes):
    wanted = stored(tmp_path, build(), **changes)
    found = auto.from_pretrained(tmp_path / "adapter")
    assert type(found) is type(wanted)
    assert type(found.get_base_model()) is type(wanted.get_base_model())
    assert torch.equal(logits(found, ids()), logits(wanted, ids()))


def test_auto_runs_no_code_that_the_adapter_chose(tmp_path, offline):
    stored(tmp_path, tiny_llama(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match="allow_base"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    with pytest.raises(ConfigError, match="task_type"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    for name in ("os", "AutoModel", "nope", "pipeline"):
        reconfigure(
            tmp_path / "adapter",
            task_type=None,
            auto_mapping={"base_model_class": name, "parent_library": "os"},
        )
        with (
            pytest.warns(UserWarning, match="auto_mapping|task_type"),
            pytest.raises(ConfigError, match="no model class of transformers"),
        ):
            AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_auto_has_no_instances():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoPeftModel()


def test_the_config_given_is_never_changed(saved):
    mine = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "c_fc"])
    before = mine.to_dict()
    peft = PeftModel.from_pretrained(tiny(), saved, config=mine)
    peft.add_adapter("other", mine)
    assert mine.to_dict() == before
    randomise(peft, "other")
    assert config().r == 4


def calls_of(work):
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(row.callcount for row in profile.getstats())


def test_the_cost_does_not_grow_with_the_adapters_already_there(saved):
    """Counted in calls, which no busy machine can move."""
    peft = with_adapter(tiny())
    peft.eval()
    counts = [calls_of(lambda i=i: peft.load_adapter(saved, f"number{i}")) for i in range(12)]
    assert counts[-1] <= 1.02 * counts[1]


def test_what_a_file_should_hold_is_listed_once(saved, monkeypatch):
    model, listed, real = PeftModel.from_pretrained(tiny(), saved), [], fitting.expected_tensors
    monkeypatch.setattr(fitting, "expected_tensors", lambda plan: listed.append(plan) or real(plan))
    model.load_adapter(saved, "second")
    assert len(listed) == 1


def test_only_the_first_adapter_is_activated(tmp_path):
    with_adapter(tiny(), "a").save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(tiny(), tmp_path / "a")
    assert peft.active_adapters == ["default"]
    peft.set_adapter([])
    peft.load_adapter(tmp_path / "a", "other")
    assert peft.active_adapters == []
