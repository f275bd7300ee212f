"""A small model with a layer of every kind that carries adapters, and pictures of it that miss nothing."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import LoraConfig, get_peft_model
from models import WORDS, Snapshot, randomise, registry_of

KINDS = ["embed", "wave", "image", "volume", "line", "turned"]
ATTENTION, EXPERTS = ["attention"], ["experts.weights"]


class Experts(nn.Module):
    """A stack of matrices that the module itself multiplies."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 8) * 0.3)

    def forward(self, x):
        return torch.stack([x @ matrix.T for matrix in self.weights]).mean(dim=0)


class Zoo(nn.Module):
    """(2, 5) of ids -> (2, 5, WORDS)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.wave = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.image = nn.Conv2d(2, 2, 3, padding=1)
        self.volume = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1), groups=2)
        self.line = nn.Linear(8, 8)
        self.turned = Conv1D(8, 8)
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.wave(x.mT).mT
        x = x + self.image(x.view(2, 2, 4, 5)).view(x.shape)
        x = x + self.volume(x.view(2, 2, 1, 4, 5)).view(2, 2, 5, 8).mean(dim=1)
        x = x + torch.tanh(self.turned(self.line(x)))
        x = x + self.experts(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x))


def zoo(seed=1, dtype=torch.float64):
    """In fp64, where sums in another order agree to 1e-12: what is left of a difference is an error."""
    torch.manual_seed(seed)
    return Zoo().to(dtype).eval()


def zoo_config(**changes):
    base = {"r": 4, "lora_alpha": 8, "target_modules": KINDS + ATTENTION, "target_parameters": EXPERTS}
    return LoraConfig(**{**base, **changes})


def adapted_zoo(*, seed=3, **changes):
    """A zoo with one adapter that has an effect."""
    model = get_peft_model(zoo(), zoo_config(**changes))
    randomise(model, seed=seed)
    return model


class Picture(Snapshot):
    """A snapshot that also sees what a scaling held in place, and what adapters were made with."""

    def __init__(self, model):
        super().__init__(model)
        registry = registry_of(model)
        for path, layer in (registry.layers if registry is not None else {}).items():
            for name, scaling in layer.scaling.items():
                if isinstance(scaling, torch.Tensor):
                    self._note(f"scaling {path} {name}", scaling)
                dropout = layer.lora_dropout[name]
                self.facts[f"settings {path} {name}"] = (
                    float(scaling),
                    layer.r[name],
                    layer.lora_alpha[name],
                    layer.use_rslora[name],
                    layer.lora_bias[name],
                    getattr(dropout, "p", None),
                    *(sizes(module) for module in layer.modules_of(name)),
                )
        if registry is not None:
            for name, config in registry.configs.items():
                self._note(f"config {name}", config)
        for name, parameter in model.named_parameters():
            self.facts[f"gradient {name}"] = None if parameter.grad is None else tuple(parameter.grad.shape)

    def assert_same(self, model):
        changed = self.differences(Picture(model))
        assert not changed, f"changed: {changed}"


def sizes(module):
    """What a module that holds a factor says of it; in keeping with its weight."""
    if isinstance(module, nn.Linear):
        assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        return module.out_features, module.in_features
    weight = (module.out_channels, module.in_channels // module.groups)
    assert weight == tuple(module.weight.shape[:2])
    return weight
