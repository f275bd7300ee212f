"""LoRA+ (Hayou et al., 2024, arXiv:2402.12354): B learns faster than A, with any optimizer."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lorakit.config import NearNames
from lorakit.errors import ConfigError, bullet_list
from lorakit.layers import Embedding
from lorakit.layers.varied import parts_of
from lorakit.optimizers.arguments import check_number, trained_of
from lorakit.state_dict import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from lorakit.surgery import AdapterRegistry


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of the trainable parameters of a model, in which B learns `loraplus_lr_ratio` times as fast as A.

    Its four groups, some of which may be empty, in this order:

    1. every A, and what belongs to no other group (modules trained whole, token rows): `lr`, with decay;
    2. both factors of embeddings: `loraplus_lr_embedding`, with decay;
    3. every B, and one-dimensional parts of variants (DoRA's magnitudes): `lr * loraplus_lr_ratio`, with decay;
    4. biases and other one-dimensional parameters (norms): `lr * loraplus_lr_ratio`, without decay.

    What a parameter is, the model's registry of adapters says, not its name.

    Args:
        model: a `PeftModel`, a model that adapters were injected into, or either compiled.
        optimizer_cls: the class of any torch optimizer, or a callable that makes one. Whole embeddings under an 8-bit
            one of bitsandbytes keep 32-bit states.
        lr: the learning rate of A.
        loraplus_lr_ratio: above 0; the paper advises 2 to 32, 16 for hard tasks.
        loraplus_weight_decay: of all groups but the last.
        loraplus_lr_embedding: the learning rate of embeddings' factors.
        **kwargs: go to `optimizer_cls`.

    Raises:
        TypeError: a number is none, or `optimizer_cls` cannot be called.
        ConfigError: a number is out of range, or `optimizer_cls` takes no such keyword.
        AdapterNameError: the model carries no adapter.
        AdapterStateError: none of its adapters is trainable.
    """
    check_number("lr", lr)
    check_number("loraplus_lr_ratio", loraplus_lr_ratio, above=True)
    check_number("loraplus_weight_decay", loraplus_weight_decay)
    check_number("loraplus_lr_embedding", loraplus_lr_embedding)
    _check_keywords(optimizer_cls, kwargs)
    registry, _ = registry_of(model)
    trained_of(registry)
    roles = _Roles.of(registry)
    groups: dict[str, list[nn.Parameter]] = {role: [] for role in ("A", "embedding", "B", "without decay")}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[roles.of_parameter(parameter)].append(parameter)
    rates = {"A": lr, "embedding": loraplus_lr_embedding}
    optimizer = optimizer_cls(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if role == "without decay" else loraplus_weight_decay,
                "lr": rates.get(role, lr * loraplus_lr_ratio),
            }
            for role, parameters in groups.items()
        ],
        lr=lr,
        **kwargs,
    )
    _keep_embeddings_wide(optimizer, registry)
    return optimizer


class _Roles(NamedTuple):
    """The ids of the parameters that adapters hold on layers, by what they are."""

    embedding: frozenset[int]
    B: frozenset[int]
    parts: frozenset[int]

    @classmethod
    def of(cls, registry: AdapterRegistry) -> _Roles:
        embedding, B, parts = set(), set(), set()
        for layer in registry.layers.values():
            for name in layer.r:
                if name in layer.tied:
                    continue
                stored = layer.stored(name)
                if isinstance(layer, Embedding):
                    embedding |= {id(stored.A), id(stored.B)}
                else:
                    B.add(id(stored.B))
                parts |= {id(part) for part in parts_of(layer, name).values()}
        return cls(frozenset(embedding), frozenset(B), frozenset(parts))

    def of_parameter(self, parameter: nn.Parameter) -> str:
        """The group of a trainable parameter."""
        key = id(parameter)
        if key in self.embedding:
            return "embedding"
        if key in self.B or (key in self.parts and parameter.ndim == 1):
            return "B"
        return "without decay" if parameter.ndim == 1 else "A"


def _check_keywords(optimizer_cls: Callable[..., Optimizer], given: dict[str, Any]) -> None:
    if not callable(optimizer_cls):
        raise TypeError(f"optimizer_cls: got a {type(optimizer_cls).__name__}, wanted an optimizer class")
    known = inspect.signature(optimizer_cls).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    own = ("loraplus_weight_decay", "loraplus_lr_embedding", "loraplus_lr_ratio")
    near = NearNames([name for name in (*known, *own) if name not in {"params", "weight_decay"}])
    problems = []
    for name in given:
        if name == "weight_decay":  # every group has its own, so the optimizer's would have no effect
            problems.append("weight_decay: pass loraplus_weight_decay, which goes to the groups that decay")
        elif name == "params" or not (name in known or takes_any):
            problems.append(f"{name}: no keyword of {_name(optimizer_cls)}" + near(name))
    if problems:
        raise ConfigError(bullet_list("create_loraplus_optimizer", problems))


def _name(optimizer_cls: Callable[..., Optimizer]) -> str:
    return getattr(optimizer_cls, "__name__", repr(optimizer_cls))


def _keep_embeddings_wide(optimizer: Optimizer, registry: AdapterRegistry) -> None:
    """Whole embeddings that are trained keep 32-bit states, as bitsandbytes advises: their gradients are uneven."""
    if type(optimizer).__module__.partition(".")[0] != "bitsandbytes":
        return
    manager = sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance()
    for wrapper in registry.saved.values():
        for module in wrapper.modules_to_save.modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                manager.override_config(module.weight, "optim_bits", 32)
