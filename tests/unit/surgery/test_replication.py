"""Replicated layers: one set of weights, adapters of their own, and nothing left behind."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from lorakit.errors import ConfigError, PlanError, UnsupportedError
from models import Snapshot, bits, randomise, registry_of

WORDS = 31
IDS = torch.arange(3, 11).reshape(2, 4)


def _causal(kind, **config):
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=WORDS, hidden_size=16, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **config,
        )
    )  # fmt: skip


def llama():
    return _causal("Llama", intermediate_size=24, num_hidden_layers=2, num_key_value_heads=2)


def qwen():
    """Layers of two types, which the config lists."""
    return _causal(
        "Qwen2", intermediate_size=24, num_hidden_layers=3, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=2, max_window_layers=1,
    )  # fmt: skip


def falcon():
    return _causal("Falcon", num_hidden_layers=2, new_decoder_architecture=False)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


class Plain(nn.Module):
    """No config, and a buffer in each layer."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.drop = nn.Dropout(0.5)
            self.register_buffer("shift", torch.randn(8))

        def forward(self, x):
            return x + self.drop(torch.tanh(self.lin(x))) + self.shift

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList(Plain.Layer() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


# the model, the path of its layers, a linear in each, the ranges and the order of layers that they mean
KINDS = {
    "llama": (llama, "model.layers", "q_proj", [[0, 2], [1, 2], [0, 1]], [0, 1, 1, 0]),
    "qwen": (qwen, "model.layers", "v_proj", [[0, 2], [0, 3]], [0, 1, 0, 1, 2]),
    "falcon": (falcon, "transformer.h", "query_key_value", [[0, 2], [0, 2]], [0, 1, 0, 1]),
    "gpt2": (gpt2, "transformer.h", "c_attn", [[1, 2], [0, 2]], [1, 0, 1]),
    "bert": (bert, "bert.encoder.layer", "query", [[0, 1], [0, 2]], [0, 0, 1]),
    "plain": (Plain, "layers", "lin", [[0, 2], [1, 2]], [0, 1, 1]),
    "shallower": (llama, "model.layers", "q_proj", [[1, 2]], [1]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind):
    torch.manual_seed(1)
    return KINDS[kind][0]().eval()


def config(kind, **changes):
    _, _, linear, ranges, _ = KINDS[kind]
    return LoraConfig(**{"r": 2, "target_modules": [linear], "layer_replication": ranges, **changes})


def make(kind, name="default", **changes):
    peft = get_peft_model(build(kind), config(kind, **changes), name)
    randomise(peft, name)
    return peft


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def layers_of(model, kind):
    return model.get_submodule(KINDS[kind][1])


def by_hand(kind):
    """The deeper model with real copies, and a config that says so."""
    model = build(kind)
    _, path, _, _, order = KINDS[kind]
    before = layers_of(model, kind)
    after = nn.ModuleList(copy.deepcopy(before[index]) for index in order)
    for number, layer in enumerate(after):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, after)
    if hasattr(model, "config"):
        model.config.num_hidden_layers = len(order)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[index] for index in order]
    return model


@kinds
def test_as_a_model_with_real_copies(kind):
    peft = make(kind)
    order = KINDS[kind][4]
    other = get_peft_model(by_hand(kind), config(kind, layer_replication=None))
    randomise(other)
    assert torch.equal(logits(peft), logits(other))
    with peft.disable_adapter():
        assert torch.equal(logits(peft), logits(by_hand(kind)))
    base = peft.get_base_model()
    assert len(layers_of(base, kind)) == len(order) == len(registry_of(peft).layers)
    if hasattr(base, "config"):
        assert base.config.num_hidden_layers == len(order)
        assert getattr(base.config, "layer_types", None) == getattr(other.config, "layer_types", None)
    for number, layer in enumerate(layers_of(base, kind)):
        assert {m.layer_idx for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)} <= {
            number
        }


@kinds
def test_weights_are_shared_and_gradients_are_not(kind):
    bare = build(kind)
    weights = {id(p) for p in bare.parameters()}
    peft = make(kind)
    base = [p for n, p in peft.named_parameters() if "lora_" not in n]
    assert len(base) <= len(weights)
    order = KINDS[kind][4]
    owners = {}
    for index, layer in zip(order, layers_of(peft.get_base_model(), kind), strict=True):
        parameters = [p for n, p in layer.named_parameters() if "lora_" not in n]
        buffers = list(layer.buffers())
        assert owners.setdefault(index, list(map(id, parameters + buffers))) == list(
            map(id, parameters + buffers)
        )
    peft.train()(IDS)[0].sum().backward()
    gradients = [layer.lora_B["default"].weight.grad for layer in registry_of(peft).layers.values()]
    assert len(gradients) == len(order)
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    assert len({bits(g) for g in gradients}) == len(order)
    assert not any(p.grad is not None for p in base)


@kinds
@pytest.mark.parametrize("end", ["unload", "delete", "failure"])
def test_everything_comes_back(kind, end, monkeypatch):
    bare = build(kind)
    for number, parameter in enumerate(bare.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before, output = Snapshot(bare), logits(bare)
    if end == "failure":
        from lorakit.layers import LoraLayer

        def fail(*_args, **_kwargs):
            raise MemoryError

        monkeypatch.setattr(LoraLayer, "add_stored", fail)
        with pytest.raises(MemoryError):
            get_peft_model(bare, config(kind))
    else:
        peft = get_peft_model(bare, config(kind))
        randomise(peft)
        with peft.disable_adapter():
            pass
        if end == "delete":
            peft.delete_adapter("default")
            assert torch.equal(logits(peft), output)
            assert len(layers_of(bare, kind)) == len(layers_of(build(kind), kind))
            peft.add_adapter("default", config(kind))
        assert peft.unload() is bare
    before.assert_same(bare)
    assert torch.equal(logits(bare), output)


def test_the_mode_and_what_it_was_moved_to_come_back_too():
    for kind in ("plain", "shallower"):
        bare = build(kind).train()
        peft = get_peft_model(bare, config(kind))
        peft.eval()
        if kind == "plain":
            peft.double()
        peft.unload()
        assert not any(module.training for module in bare.modules())
        logits(bare)
        assert {t.dtype for t in (*bare.parameters(), *bare.buffers()) if t.is_floating_point()} == {
            torch.float64 if kind == "plain" else torch.float32
        }


@kinds
def test_files_state_dicts_and_second_adapters(kind, tmp_path):
    peft = make(kind)
    output = logits(peft)
    peft.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(build(kind), tmp_path / "one")
    assert torch.equal(logits(again), output)
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = make(kind, r=3)
    other.load_adapter(tmp_path / "one", "second")
    other.set_adapter("second")
    assert torch.equal(logits(other), output)
    other.load_adapter(tmp_path / "one", "default", replace=True)
    other.set_adapter("default")
    assert torch.equal(logits(other), output)
    other.delete_adapter("second")
    other.load_adapter(tmp_path / "one", "default", replace=True)
    assert torch.equal(logits(other), output)
    fresh = make(kind, layer_replication=KINDS[kind][3])
    with torch.no_grad():
        for item in registry_of(fresh).tensors("default"):
            item.tensor.zero_()
    fresh.load_state_dict(peft.state_dict())
    assert torch.equal(logits(fresh), output)


def test_replacing_that_fails_leaves_the_deeper_model(tmp_path, monkeypatch):
    peft = make("llama")
    peft.save_pretrained(tmp_path)
    output = logits(peft)
    from lorakit.layers import LoraLayer

    real, calls = LoraLayer.add_stored, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "add_stored", failing)
    with pytest.raises(MemoryError):
        peft.load_adapter(tmp_path, "default", replace=True)
    assert torch.equal(logits(peft), output)
    assert peft.get_base_model().config.num_hidden_layers == 4


def test_other_depths_are_refused(tmp_path):
    peft = make("llama")
    before = Snapshot(peft)
    for ranges, words in ((None, "got none"), ([[0, 2], [0, 2]], r"got \[\[0, 2\], \[0, 2\]\]")):
        with pytest.raises(PlanError, match=f"{words}, but the adapters on this model have .*unload"):
            peft.add_adapter("other", config("llama", layer_replication=ranges))
        before.assert_same(peft)
    make("llama", layer_replication=[[0, 2], [0, 2]]).save_pretrained(tmp_path)
    for name, options in (("other", {}), ("default", {"replace": True})):
        with pytest.raises(PlanError, match="layer_replication"):
            peft.load_adapter(tmp_path, name, **options)
        before.assert_same(peft)
    flat = make("llama", layer_replication=None)
    with pytest.raises(PlanError, match="have none"):
        flat.add_adapter("other", config("llama"))
    flat.delete_adapter("default")
    flat.add_adapter("other", config("llama"))
    assert len(layers_of(flat.get_base_model(), "llama")) == 4


def save_with(folder, ranges):
    """An adapter whose config says something else than it was saved with."""
    make("llama").save_pretrained(folder)
    weights, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(weights), weights)
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": ranges}))


BAD = {
    "empty": ([[1, 1]], "not ranges"),
    "backwards": ([[2, 1]], "not ranges|layer_replication"),
    "too far": ([[0, 3]], r"\[0, 3\].*2 layers"),
    "negative": ([[-1, 1]], "layer_replication"),
    "too deep": ([[0, 2]] * 5, "10 layers out of 2, at most 4 times"),
    "many": ([[0, 2]] * 900, "1800 layers"),
    "many and bad": ([[0, 9]] * 900, r"\[0, 9\], \.\.\.\]"),
    "hostile": ([[0, 2]] * 50_000, "50000 ranges"),
    "hostile and bad": ([[-1, 0]] * 50_000, "50000 ranges"),
    "huge": ([[0, 10**9]], "1000000000"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_ranges(fault, tmp_path):
    ranges, words = BAD[fault]
    model = build("llama")
    before = Snapshot(model)
    with pytest.raises((ConfigError, PlanError), match=words) as caught:
        get_peft_model(model, config("llama", layer_replication=ranges))
    assert len(str(caught.value)) < 1000
    before.assert_same(model)
    save_with(tmp_path, ranges)
    with pytest.raises((ConfigError, PlanError)):
        PeftModel.from_pretrained(model, tmp_path)
    before.assert_same(model)


def test_a_hostile_file_builds_no_layer(tmp_path, monkeypatch):
    save_with(tmp_path, [[0, 2]] * 1000)
    model = build("llama")

    def forbidden(*_args):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(copy, "deepcopy", forbidden)
    with pytest.raises(PlanError, match="2000 layers"):
        PeftModel.from_pretrained(model, tmp_path)


def test_models_without_one_list_of_layers():
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    for model, target in ((encoder_decoder, "q"), (nn.Sequential(nn.Linear(4, 4)), "0")):
        before = Snapshot(model)
        with pytest.raises(PlanError, match="no list of layers"):
            get_peft_model(model, LoraConfig(target_modules=[target], layer_replication=[[0, 1]]))
        before.assert_same(model)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(call):
    peft = make("llama")
    before = Snapshot(peft)
    with pytest.raises(UnsupportedError, match="layer_replication makes several layers share one weight"):
        getattr(peft, call)()
    before.assert_same(peft)


@pytest.mark.parametrize("kind", ["llama", "qwen", "falcon", "gpt2"])
def test_generation_with_a_cache(kind):
    peft = make(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = peft.generate(input_ids=IDS, use_cache=True, **options)
    plain = peft.generate(input_ids=IDS, use_cache=False, **options)
    assert torch.equal(cached, plain)
    out = peft(IDS, use_cache=True)
    assert len(out.past_key_values) == len(KINDS[kind][4])


def test_layers_of_a_model_that_is_replicated_already():
    """By hand, or by an adapter that left its layers behind: they are layers like any other."""
    model = build("plain")
    model.layers = nn.ModuleList([model.layers[0], model.layers[0], model.layers[1]])
    before = Snapshot(model)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["lin"], layer_replication=[[0, 3], [1, 3]]))
    assert len(model.layers) == 5
    randomise(peft)
    logits(peft)
    peft.unload()
    before.assert_same(model)
    injected = inject_adapter_in_model(config("plain"), build("plain"))
    with pytest.raises(Exception, match="carries the adapters"):
        get_peft_model(injected, config("plain"))


def test_ranks_by_layer_biases_whole_modules_and_tokens_in_replicas(tmp_path):
    fields = {
        "rank_pattern": {"layers.2.self_attn.q_proj": 4},
        "modules_to_save": ["input_layernorm"],
        "trainable_token_indices": [3, 5],
    }
    peft = make("llama", **fields)
    registry = registry_of(peft)
    assert registry.layers["model.layers.2.self_attn.q_proj"].r["default"] == 4
    assert len(registry.saved) == 4
    peft.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "one")
    assert torch.equal(logits(again), logits(peft))
    biased = make("bert", bias="all")
    biased.save_pretrained(tmp_path / "two")
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "two")
    assert torch.equal(logits(again), logits(biased))
    assert again.get_nb_trainable_parameters()[1] == biased.get_nb_trainable_parameters()[1]


def test_a_copy_of_the_model_is_whole():
    peft = make("llama")
    output = logits(peft)
    twin = copy.deepcopy(peft)
    assert torch.equal(logits(twin), output)
    bare = twin.unload()
    assert len(bare.model.layers) == bare.config.num_hidden_layers == 2
    assert torch.equal(logits(bare), logits(build("llama")))
    assert torch.equal(logits(peft), output)


def test_copies_follow_the_models_config():
    """A choice made later, such as of the attention, must reach every copy."""
    peft = make("llama")
    base = peft.get_base_model()
    assert {id(layer.self_attn.config) for layer in base.model.layers} == {id(base.config)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in base.model.layers} == {"eager"}
