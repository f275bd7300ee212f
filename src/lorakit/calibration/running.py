"""Running a model on data to look at it: everything of it is as it was afterwards, whatever happens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import ConfigError, UnsupportedError, bullet_list
from lorakit.putting import prepare_config
from lorakit.state_dict import registry_of
from lorakit.surgery import find_registry, make_plan
from lorakit.tuner import LoraModel
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from lorakit.config import LoraConfig
    from lorakit.specs import AdapterSpec


@contextmanager
def left_alone(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within this context the model is in training or in evaluation mode, and draws what random numbers it likes.

    Afterwards the modes of all its modules, its buffers, and torch's generators are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    devices = {parameter.device for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[device.index for device in devices if device.type == "cuda"]):
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter wants a gradient; afterwards those do that did."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own argument
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def watched(modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within this context `see(name, positional arguments)` is told of every call of these modules."""
    with ExitStack() as hooks:
        for name, module in modules.items():

            def hook(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                see(name, inputs)

            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield


class SharedRows:
    """Finds layers that are given the same input one after another, so that its products are made once.

    Args:
        take: gets the names of the layers, and the rows (n, in) that each of them was given.
    """

    def __init__(self, take: Callable[[frozenset[str], Tensor], None]) -> None:
        self._take = take
        self._names: set[str] = set()
        self._rows: Tensor | None = None

    def add(self, name: str, rows: Tensor) -> None:
        """What a layer was given: a tensor that is nobody else's."""
        if self._rows is not None and name not in self._names and _same(self._rows, rows):
            self._names.add(name)
            return
        self.flush()
        self._names, self._rows = {name}, rows

    def flush(self) -> None:
        """Hand on what is waiting for another layer with the same input."""
        rows, self._rows = self._rows, None
        if rows is not None:
            self._take(frozenset(self._names), rows)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.device, one.dtype) == (other.shape, other.device, other.dtype)
    return alike and torch.equal(one, other)


def rows_of(inputs: Any, name: str) -> Tensor:
    """The input of a layer as rows (n, in).

    Raises:
        ConfigError: it is no tensor.
    """
    found = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
    if not isinstance(found, torch.Tensor):
        raise ConfigError(
            f"{name}: is called with a {type(found).__name__}, wanted a tensor as its first argument"
        )
    return found.reshape(-1, found.shape[-1])


def device_of(model: nn.Module) -> torch.device | None:
    """The one device that a model is on, or None where there are several."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    return next(iter(devices)) if len(devices) == 1 else None


def moved(value: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if hasattr(value, "to"):  # tensors, and transformers' batches
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value


class Target(NamedTuple):
    """A linear layer that an adapter is to begin on from data.

    Attributes:
        spec: its row of the plan.
        base: the module that holds the weight; what was gathered is kept on it.
        called: the module that the model calls: `base`, or the layer that wraps it.
        read: gives the unmerged weight, (out, in), which is not to be written into.
    """

    spec: AdapterSpec
    base: nn.Module
    called: nn.Module
    read: Callable[[torch.dtype], Tensor]


def plainly_begun(config: LoraConfig) -> LoraConfig:
    """The config for planning alone: without the scheme that is yet to be prepared, or its options."""
    return replace(
        config,
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, Target]:
    """The layers that a config targets, by path in the bare model.

    Raises:
        ConfigError, PlanError, UnsupportedError: the config does not fit the model, or targets what is no linear layer
            of plain floating-point numbers.
    """
    inner = model if find_registry(model) is not None else _bare(model)
    plan = make_plan(inner, plainly_begun(prepare_config(inner, config)))
    found: dict[str, Target] = {}
    problems = []
    for spec in plan.specs:
        node = plan.description.nodes.get(spec.path)
        codec = None if node is None else find_codec(node.module)
        if node is None or codec is None or spec.kind not in {"linear", "conv1d"} or spec.tied_to is not None:
            problems.append(f"{spec.path}: is no linear layer of its own; leave it out with exclude_modules")
        elif codec.name != "dense":
            problems.append(
                f"{spec.path}: its weight is kept by {codec.name}; gather from the model in full precision instead"
            )
        else:
            layer = node.layer
            read = partial(codec.peek, node.module) if layer is None else layer.peek_weight
            found[spec.path] = Target(spec, node.module, node.module if layer is None else layer, read)
    if problems:
        raise UnsupportedError(bullet_list(f"init_lora_weights={config.init_lora_weights!r}", problems))
    return found


def _bare(model: nn.Module) -> nn.Module:
    if isinstance(model, LoraModel) or "base_model" in model._modules:
        return registry_of(model)[0].model
    return model
