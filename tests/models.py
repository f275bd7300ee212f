"""Small models, adapters with an effect, and pictures of a model's whole state, for all tests."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import BertConfig, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.layouts import matrix_layout
from lorakit.specs import AdapterSpec
from lorakit.surgery import find_registry
from lorakit.types import Factors

WIDTH, INNER, WORDS = 8, 12, 11


class Block(nn.Module):
    """Linear with and without a bias, and Conv1D."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc = Conv1D(INNER, WIDTH)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.tanh(self.c_fc(self.q_proj(h) * self.v_proj(h))))


class Tiny(nn.Module):
    """An embedding, two blocks, a head: (batch, tokens) of ids -> (batch, tokens, WORDS)."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(seed=1, dtype=torch.float32, layers=2):
    torch.manual_seed(seed)
    return Tiny(layers).to(dtype).eval()


def ids(seed=2, words=WORDS):
    return torch.randint(words, (2, 5), generator=torch.Generator().manual_seed(seed))


def tiny_llama(seed=1, *, tie=False):
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_bert(seed=1):
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def logits(model, batch=None):
    with torch.no_grad():
        out = model(ids() if batch is None else batch)
    return out if isinstance(out, torch.Tensor) else out.logits


def config(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "c_fc"], **changes})


def with_adapter(model, name="default", *, seed=3, **changes):
    """`model` with one adapter that has an effect."""
    peft = get_peft_model(model, config(**changes), name)
    randomise(peft, name, seed)
    return peft


def another(peft, name, *, seed=4, **changes):
    """One more adapter that has an effect."""
    peft.add_adapter(name, config(**changes))
    randomise(peft, name, seed)


def registry_of(model):
    return model.base_model.registry if isinstance(model, PeftModel) else find_registry(model)


def randomise(model, name="default", seed=3, scale=0.3):
    """Every tensor of an adapter normal: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in registry_of(model).tensors(name):
            if item.tensor.is_floating_point():
                item.tensor.copy_(torch.randn(item.tensor.shape, generator=generator) * scale)


def spec_of(base_shape, dtype=torch.float32, *, r=4, alpha=6.0, dropout=0.0, lora_bias=False, init="default"):
    return AdapterSpec(
        path="some.path",
        kind="linear",
        layout=matrix_layout(*base_shape),
        r=r,
        lora_alpha=alpha,
        scaling=alpha / r,
        dropout=dropout,
        lora_bias=lora_bias,
        init=init,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def random_factors(shape, dtype=torch.float32, *, r=4, scaling=1.5, bias=False, seed=5, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def draw(*dims):
        return (torch.randn(dims, generator=generator, dtype=torch.float64) * size).to(dtype)

    return Factors(draw(r, columns), draw(rows, r), scaling, draw(rows) if bias else None)


def bits(tensor):
    """A digest of a tensor's bits, dtype and shape; of one of torchao's, of the tensors that it consists of."""
    parts = getattr(type(tensor), "tensor_data_names", ())
    if parts:
        return " ".join(bits(getattr(tensor, name)) for name in parts)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.sha256(raw).hexdigest() + f" {tensor.dtype} {tuple(tensor.shape)}"


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Snapshot:
    """Everything about a model that a refused call must leave alone.

    Bits, identity and flags of all parameters and buffers; identity, mode and hooks of all modules; adapters, their
    configs and state. Two are equal when nothing differs; `assert_same` says what does.
    """

    def __init__(self, model):
        self._alive = []  # an id means nothing once its object is gone
        self.facts = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._note(f"module {path}", module)
            self.facts[f"mode {path}"] = module.training
            self.facts[f"hooks {path}"] = tuple(len(getattr(module, kind)) for kind in _HOOKS)
            if not isinstance(module, PeftModel):
                self.facts[f"attributes {path}"] = tuple(sorted(module.__dict__))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._note(f"parameter {name}", parameter)
            self.facts[f"bits {name}"] = bits(parameter)
            self.facts[f"flag {name}"] = parameter.requires_grad
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self._note(f"buffer {name}", buffer)
            self.facts[f"bits {name}"] = bits(buffer)
        registry = registry_of(model)
        if registry is not None:
            self._note_registry(registry)

    def _note(self, key, thing):
        self._alive.append(thing)
        self.facts[key] = id(thing)

    def _note_registry(self, registry):
        self.facts["active"] = registry.active
        self.facts["enabled"] = registry.enabled
        self.facts["configs"] = {name: kept.to_dict() for name, kept in registry.configs.items()}
        self.facts["flags"] = dict(registry.flags)
        for kind in ("layers", "saved", "slots", "places"):
            self.facts[kind] = tuple(getattr(registry, kind))
        for path, layer in registry.layers.items():
            self.facts[f"layer {path}"] = (
                layer.adapters,
                tuple(layer.active_adapters),
                tuple(layer.merged_adapters),
                dict(layer.scaling),
                layer.disable_adapters,
            )
        for path, wrapper in registry.saved.items():
            self.facts[f"whole {path}"] = (wrapper.adapters, tuple(wrapper.active_adapters))
        for name, slot in registry.slots.items():
            self.facts[f"slot {name}"] = slot.adapters

    def differences(self, other):
        return sorted(
            key for key in {*self.facts, *other.facts} if self.facts.get(key) != other.facts.get(key)
        )

    def assert_same(self, model):
        changed = self.differences(Snapshot(model))
        assert not changed, f"changed: {changed}"
