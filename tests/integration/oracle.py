"""What a model with adapters should be, written down without the library: a base, and tensors as files name them."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTH, INNER, WORDS, EXPERTS = 8, 12, 11, 3


class Experts(nn.Module):
    """Bare parameters: (experts, out, in) each; every token goes through all of them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.3)

    def forward(self, x):
        return torch.einsum("eoi,bti,edo->btd", self.up, x, self.down) / EXPERTS


class Zoo(nn.Module):
    """One layer of every kind: ids (batch, tokens) -> (batch, tokens, words)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.grouped = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = Experts()
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.c = Conv1D(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.tanh(self.grouped(self.conv(x.mT))).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x + self.experts(x))
        return self.head(x + torch.tanh(self.c(self.q(x))))


def zoo():
    torch.manual_seed(1)
    model = Zoo().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def ids():
    return torch.arange(10).view(2, 5)


# The fields of each config, and what of the base it changes: the base parameter for each factor's path in a file.
KINDS = {
    "matrices": ({"target_modules": ["q", "c"]}, {"q": "q.weight", "c": "c.weight"}),
    "lookup": (
        {"target_modules": ["embed", "conv", "q"], "use_rslora": True},
        {"embed": "embed.weight", "conv": "conv.weight", "q": "q.weight"},
    ),
    "attention": (
        {"target_modules": ["attention"], "target_parameters": ["experts.up"]},
        {
            "attention": "attention.in_proj_weight",
            "attention.base_layer.out_proj": "attention.out_proj.weight",
            "experts": "experts.up",
        },
    ),
    "experts": (
        {
            "target_modules": ["head"],
            "target_parameters": ["experts.up", "experts.down"],
            "rank_pattern": {"head": 3},
            "alpha_pattern": {"experts.up": 5.0},
        },
        {"experts": "experts.down", "experts.base_layer": "experts.up", "head": "head.weight"},
    ),
    "whole": ({"target_modules": ["q"], "modules_to_save": ["norm"]}, {"q": "q.weight"}),
    "tokens": (
        {"target_modules": ["embed"], "trainable_token_indices": {"embed": [1, 3]}},
        {"embed": "embed.weight"},
    ),
    "more tokens": (
        {"target_modules": ["c"], "trainable_token_indices": {"embed": [4, 7], "head": [2]}},
        {"c": "c.weight"},
    ),
    "same token": ({"target_modules": ["c"], "trainable_token_indices": {"embed": [3]}}, {"c": "c.weight"}),
    "biases": (
        {"target_modules": ["q", "conv"], "bias": "lora_only"},
        {"q": "q.weight", "conv": "conv.weight"},
    ),
    "biased factors": ({"target_modules": ["q"], "lora_bias": True}, {"q": "q.weight"}),
    "groups": ({"target_modules": ["grouped", "head"]}, {"grouped": "grouped.weight", "head": "head.weight"}),
}


class Believed:
    """One adapter as it should be: its kind, its config's numbers, and its tensors by their name in a file."""

    def __init__(self, kind, r, alpha, tensors):
        self.kind, self.r, self.alpha, self.tensors = kind, r, alpha, tensors
        fields, self.places = KINDS[kind]
        self.fields = {"r": r, "lora_alpha": alpha, **fields}

    def sites(self):
        """The base parameters that it changes."""
        rows = {f"{path}.weight" for path in self.fields.get("trainable_token_indices", ())}
        return {*self.places.values(), *rows}

    def copy(self):
        """The same, for another adapter."""
        return Believed(self.kind, self.r, self.alpha, dict(self.tensors))

    def biased_factors(self, site):
        """What it adds to the bias of `q`, or None."""
        own = self.tensors.get("q.lora_B.bias") if site == "q.weight" else None
        return None if own is None else self.scaling(site) * own

    def scaling(self, site):
        path = site.removesuffix(".weight")
        r = self.fields.get("rank_pattern", {}).get(path, self.r)
        alpha = self.fields.get("alpha_pattern", {}).get(path, self.alpha)
        return alpha / math.sqrt(r) if self.fields.get("use_rslora") else alpha / r

    def rows(self, site):
        """(tokens, their rows) where it replaces rows of a weight."""
        path = site.removesuffix(".weight")
        tokens = self.fields.get("trainable_token_indices", {}).get(path)
        return (
            None if tokens is None else (tokens, self.tensors[f"{path}.token_adapter.trainable_tokens_delta"])
        )

    def delta(self, site, base):
        """The dense change of a base parameter; None where it has no factors there."""
        path = next((path for path, name in self.places.items() if name == site), None)
        if path is None:
            return None
        s = self.scaling(site)
        if f"{path}.lora_embedding_A" in self.tensors:
            return s * (self.tensors[f"{path}.lora_embedding_B"] @ self.tensors[f"{path}.lora_embedding_A"]).T
        A, B = self.tensors[f"{path}.lora_A.weight"], self.tensors[f"{path}.lora_B.weight"]
        if site.startswith("experts"):
            A, B = A.view(EXPERTS, -1, A.shape[1]), B.view(B.shape[0], -1, EXPERTS)
            return s * torch.einsum("ore,eri->eoi", B, A)
        if site == "grouped.weight":
            A, B = A.view(2, -1, *A.shape[1:]), B.view(2, -1, B.shape[1])
            return s * torch.einsum("gor,grik->goik", B, A).flatten(0, 1)  # sees all channels
        if A.ndim == 3:
            return s * torch.einsum("or,rik->oik", B.squeeze(-1), A)
        return s * (B @ A).T if site == "c.weight" else s * B @ A


class Mixture:
    """A weighted sum of adapters: of what each of them changes, kept dense; its tensors are what the library made."""

    kind = "mixture"

    def __init__(self, base, parts, tensors):
        self.base, self.tensors = base, tensors
        self.parts = [(part.copy(), weight) for part, weight in parts]
        tokens: dict[str, set[int]] = {}
        for part, _ in self.parts:
            for path, own in part.fields.get("trainable_token_indices", {}).items():
                tokens.setdefault(path, set()).update(own)
        every = [part.fields for part, _ in self.parts]
        self.fields = {
            "trainable_token_indices": {path: sorted(own) for path, own in tokens.items()},
            "modules_to_save": sorted(
                {name for fields in every for name in fields.get("modules_to_save", ())}
            ),
            "bias": next((fields["bias"] for fields in every if fields.get("bias")), None),
        }

    def copy(self):
        """The same, for another adapter."""
        return Mixture(self.base, self.parts, dict(self.tensors))

    def sites(self):
        """The base parameters that it changes."""
        return {site for part, _ in self.parts for site in part.sites()}

    def delta(self, site, base):
        """The sum of the parts' dense changes; None where none has factors."""
        found = [(part.delta(site, base), weight) for part, weight in self.parts]
        found = [weight * delta for delta, weight in found if delta is not None]
        return sum(found) if found else None

    def rows(self, site):
        """Each token's row: the base's, and what those parts that replace it change of it."""
        tokens = self.fields["trainable_token_indices"].get(site.removesuffix(".weight"))
        if tokens is None:
            return None
        weight = dict(self.base.named_parameters())[site].detach()
        rows = weight[torch.tensor(tokens)].clone()
        for part, share in self.parts:
            own = part.rows(site)
            for token, row in zip(*own, strict=True) if own is not None else ():
                rows[tokens.index(token)] += share * (row - weight[token])
        return tokens, rows

    def biased_factors(self, site):
        """What it adds to the bias of `q`, or None."""
        found = [(part.biased_factors(site), weight) for part, weight in self.parts]
        found = [weight * own for own, weight in found if own is not None]
        return sum(found) if found else None


def dense_groups(weight):
    """The weight of the grouped convolution, as that of an ungrouped one."""
    dense = torch.zeros(WIDTH, WIDTH, 3, dtype=weight.dtype)
    half = WIDTH // 2
    dense[:half, :half], dense[half:, half:] = weight[:half], weight[half:]
    return dense


def expected(base, believed, active, merged, *, enabled):
    """What the model should give: the base, computed with the weights that it should have."""
    parameters = {name: value.detach() for name, value in base.named_parameters()}
    acting = [believed[name] for name in active] if enabled else []
    for item in acting:
        for name, value in parameters.items():  # biases and modules that an adapter owns
            path, _, attribute = name.rpartition(".")
            own = item.tensors.get(f"{path}.base_layer.{attribute}", item.tensors.get(name))
            parameters[name] = value if own is None else own
    groups = 2
    for site in list(parameters):
        here = [name for name in (merged if enabled else ()) if site in believed[name].sites()]
        here = here or [name for name in (active if enabled else ()) if site in believed[name].sites()]
        for name in here:
            rows = believed[name].rows(site)
            if rows is not None:
                parameters[site] = parameters[site].index_copy(0, torch.tensor(rows[0]), rows[1])
        deltas = [believed[name].delta(site, base) for name in here]
        deltas = [delta for delta in deltas if delta is not None]
        if site == "grouped.weight" and deltas:
            parameters[site], groups = dense_groups(parameters[site]), 1
        for delta in deltas:
            parameters[site] = parameters[site] + delta
        for own in (believed[name].biased_factors(site) for name in here):
            parameters["q.bias"] = parameters["q.bias"] if own is None else parameters["q.bias"] + own
    base.grouped.groups = groups
    try:
        with torch.no_grad():
            return torch.func.functional_call(base, parameters, (ids(),))
    finally:
        base.grouped.groups = 2
