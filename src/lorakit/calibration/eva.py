"""EVA: an adapter's A from the directions in which its layers' inputs vary, and ranks where they explain most.

Source: Paischer et al., 2024, arXiv:2410.07170. The data are run once, batch by batch, until no component that counts
turns any more. Kept are one scatter for each distinct input (`lorakit.init.eva`), whatever the number of batches, and
one input at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from tqdm.auto import tqdm

from lorakit.calibration.running import (
    SharedRows,
    device_of,
    left_alone,
    moved,
    plainly_begun,
    rows_of,
    watched,
)
from lorakit.config import EvaConfig, Matcher
from lorakit.errors import ConfigError, NonFiniteError, bullet_list
from lorakit.init.eva import Components, Scatter, have_settled, new_scatter, spread_ranks
from lorakit.layers import Linear
from lorakit.layers.hooks import outside_autocast
from lorakit.putting import prepare_config
from lorakit.state_dict import registry_of
from lorakit.surgery import describe, find_registry, make_plan
from lorakit.tuner import LoraModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.surgery import AdapterRegistry

    PrepareLayer = Callable[[Any, Any, str], Tensor]
    Key = frozenset[str]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with a batch of keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """(n, 2), the batch and token indices that count: not masked and, with `use_label_mask`, not without a label.

    Raises:
        ConfigError: the batch is no mapping with "input_ids" or "attention_mask".
    """
    names = model_input.keys() if isinstance(model_input, Mapping) else ()
    if not {"attention_mask", "input_ids"} & set(names):
        found = sorted(names) if names else type(model_input).__name__
        raise ConfigError(
            f"the batch is {found}, wanted a mapping with 'input_ids' or 'attention_mask'; for other inputs pass "
            "prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None, or functions of your own"
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    options = peft_config.eva_config or EvaConfig()
    labels = model_input.get("labels")
    if options.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != options.label_mask_value)
    indices: Tensor = mask.nonzero()
    return indices


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """(n, in), the rows of a layer's input at the indices of `prepare_model_inputs_fn_language_modeling`.

    All rows of an input that is not (batch, tokens, in), such as that of a pooler or of an expert.
    """
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if isinstance(found, torch.Tensor) and found.ndim == 3:
        batch, token = model_input.to(found.device).T
        rows: Tensor = found[batch, token]
        return rows
    return rows_of(layer_input, layer_name)


def prepare_layer_inputs_fn_default(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:  # noqa: ARG001
    """(n, in), all rows of a layer's input."""
    return rows_of(layer_input, layer_name)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer
    | Mapping[str, PrepareLayer]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The A (rank, in) that EVA gives each linear layer; ranks of 0 leave a layer out.

    The model acts as its base, in evaluation mode; afterwards it is as it was.

    Args:
        model: a `PeftModel`, or any module together with `peft_config`.
        dataloader: batches. They are run until all components that count have settled (`EvaConfig.tau`), and at the
            most once.
        peft_config: which layers, ranks and `eva_config`; of a `PeftModel` the adapter's own is the default.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: makes of a batch and the config what `prepare_layer_inputs_fn` is told of the batch.
        prepare_layer_inputs_fn: makes of a layer's positional inputs, the former and the layer's name the rows (n, in)
            that count; or one such function for each of some layers, by name; None takes all rows.
        adapter_name: the adapter of a `PeftModel`.
        gather_distributed_inputs: in a distributed run, count the inputs of all ranks; all must have as many batches.
        show_progress_bar: show how many layers have settled.

    Returns:
        By module name as the given model has it. Layers that were never called are not in it.

    Raises:
        ConfigError: there is no config, no batch, or a function gives what it should not.
        AdapterNameError, AdapterStateError: no such adapter; or adapters are merged.
        NonFiniteError: the inputs of layers hold NaN or infinity.
    """
    prefix, layers, config, base = _targets(model, peft_config, adapter_name)
    names = {prefix + path: module for path, module in layers.items()}
    config = config if config.eva_config is not None else replace(config, eva_config=EvaConfig())
    prepare = _prepared_by(prepare_layer_inputs_fn, names, prefix)
    shared = gather_distributed_inputs and distributed.is_available() and distributed.is_initialized()
    search = _Search(config, _wanted(config, layers, prefix), prepare, across_ranks=shared)
    speaks = not shared or distributed.get_rank() == 0
    with ExitStack() as during:
        during.enter_context(base)
        during.enter_context(left_alone(model, training=False))
        during.enter_context(watched(names, search.see))
        bar = during.enter_context(tqdm(dataloader, disable=not (show_progress_bar and speaks), desc="EVA"))
        device = device_of(model)
        for batch in bar:
            inputs = batch if device is None else moved(batch, device)
            search.about = (
                copy.copy(inputs)
                if prepare_model_inputs_fn is None
                else prepare_model_inputs_fn(inputs, config)
            )
            forward_fn(model, inputs)
            search.end_batch()
            bar.set_description(f"EVA: {search.settled} of {len(names)} layers have settled")
            if search.settled == len(names):
                break
    if not search.batches:
        raise ConfigError("dataloader: it gave no batch")
    return search.result()


def _targets(
    model: nn.Module, config: LoraConfig | None, name: str
) -> tuple[str, dict[str, nn.Module], LoraConfig, AbstractContextManager[None]]:
    """The prefix of names, the linear layers by path, the config, and a context in which the base acts alone."""
    if isinstance(model, LoraModel) or "base_model" in model._modules or find_registry(model) is not None:
        registry, prefix = registry_of(model)
        registry.check_known([name])
        registry.check_unmerged("EVA looks at the layers' inputs")
        return prefix, eva_layers(registry, name), config or registry.configs[name], base_alone(registry)
    if config is None:
        raise ConfigError("peft_config: needed, since the model carries no adapter that could tell")
    plan = make_plan(model, plainly_begun(prepare_config(model, config)))
    paths = [spec.path for spec in plan.specs if spec.kind in {"linear", "conv1d"} and spec.tied_to is None]
    return "", {path: plan.description.nodes[path].module for path in paths}, config, nullcontext()


def eva_layers(registry: AdapterRegistry, name: str) -> dict[str, nn.Module]:
    """The layers of an adapter that EVA can begin: linear ones with factors of their own, in the model's order."""
    found = {
        path: layer
        for path, layer in registry.layers.items()
        if isinstance(layer, Linear) and name in layer.r and name not in layer.tied
    }
    return {path: found[path] for path in describe(registry.model).nodes if path in found}


@contextmanager
def base_alone(registry: AdapterRegistry) -> Iterator[None]:
    """Within this context no adapter acts."""
    before = registry.enabled
    registry.set_enabled(enabled=False)
    try:
        yield
    finally:
        registry.set_enabled(enabled=before)


def _wanted(config: LoraConfig, layers: Mapping[str, nn.Module], prefix: str) -> dict[str, int]:
    """The rank that each layer has before the ranks are spread."""
    matcher = Matcher(replace(config, target_modules=None))
    return {prefix + path: matcher.rank(path) for path in layers}


def _prepared_by(
    given: PrepareLayer | Mapping[str, PrepareLayer] | None, names: Mapping[str, nn.Module], prefix: str
) -> dict[str, PrepareLayer]:
    """The function for each layer.

    Raises:
        ConfigError: functions for layers that are not there.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given or prepare_layer_inputs_fn_default)
    found = {name if name in names else prefix + name: function for name, function in given.items()}
    unknown = sorted(found.keys() - names.keys())
    if unknown:
        raise ConfigError(bullet_list("prepare_layer_inputs_fn: no layer of the adapter is called", unknown))
    return {name: found.get(name, prepare_layer_inputs_fn_default) for name in names}


@dataclass
class _Group:
    """Layers that were given the same inputs throughout."""

    names: tuple[str, ...]
    keys: tuple[Key, ...]
    wanted: int
    found: Components | None = None
    settled: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    done: bool = False


class _Search:
    """The components of all layers while the batches come."""

    def __init__(
        self,
        config: LoraConfig,
        ranks: Mapping[str, int],
        prepare: Mapping[str, PrepareLayer],
        *,
        across_ranks: bool,
    ) -> None:
        assert config.eva_config is not None
        self.options = config.eva_config
        self.ranks, self._prepare, self._across = ranks, prepare, across_ranks
        self._width = max(map(self._most, ranks), default=1)
        self.batches = 0
        self.about: Any = None
        self._rows = SharedRows(self._take)
        self._scatters: dict[Key, Scatter] = {}
        self._groups: dict[str, _Group] = {}

    @property
    def settled(self) -> int:
        """How many layers have all their components settled."""
        return sum(len(group.names) for group in self._all_groups() if group.done)

    def see(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Take the input of one call of a layer."""
        group = self._groups.get(name)
        if group is not None and group.done:
            return
        rows = self._prepare[name](inputs, self.about, name)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2:
            found = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ConfigError(f"{name}: prepare_layer_inputs_fn gave {found}, wanted a tensor of (n, in)")
        with outside_autocast(rows.device):
            self._rows.add(name, rows.detach().to(torch.float32, copy=True))

    def _take(self, names: Key, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows.sum())):
            raise NonFiniteError(f"{', '.join(sorted(names))}: the input holds NaN or infinity")
        scatter = self._scatters.get(names)
        if scatter is None:
            scatter = self._scatters[names] = new_scatter(rows.shape[1], rows.device, self._width)
        with outside_autocast(rows.device):
            scatter.add(rows)

    def _most(self, name: str) -> int:
        """How many components a layer may get."""
        return round(self.ranks[name] * self.options.rho)

    def end_batch(self) -> None:
        """Find out which components have settled, and which layers need no more data."""
        self._rows.flush()
        self.batches += 1
        self._regroup()
        groups = self._all_groups()
        for group in groups:
            if not group.done:
                self._follow(group)
        ranks = self._spread()
        for group in groups:
            needed = max(ranks[name] for name in group.names)
            group.done = bool(group.settled[:needed].all())

    def _regroup(self) -> None:
        """Layers are of one group when they shared all their inputs."""
        keys: dict[str, list[Key]] = {}
        for key in self._scatters:
            for name in key:
                keys.setdefault(name, []).append(key)
        together: dict[tuple[Key, ...], list[str]] = {}
        for name in self.ranks:  # in the model's order
            if name in keys:
                together.setdefault(tuple(keys[name]), []).append(name)
        for its_keys, names in together.items():
            former = self._groups.get(names[0])
            if former is None or (former.names, former.keys) != (tuple(names), its_keys):
                group = _Group(tuple(names), its_keys, max(map(self._most, names)))
                self._groups.update(dict.fromkeys(names, group))

    def _all_groups(self) -> list[_Group]:
        found = {id(group): group for group in self._groups.values()}
        return list(found.values())

    def _follow(self, group: _Group) -> None:
        before = None if group.found is None else group.found.vectors
        group.found = self._components(group, before)
        group.settled = have_settled(group.found.vectors, before, self.options.tau)

    def _components(self, group: _Group, near: Tensor | None) -> Components:
        scatters = [self._scatters[key] for key in group.keys]
        parts = [part for scatter in scatters for part in self._of_all_ranks(scatter)]
        total = scatters[0]
        if len(parts) > 1:
            dim, device = total.mean.shape[0], total.mean.device
            total = new_scatter(dim, device, self._width)
            for part in parts:
                total.absorb(part)
        with outside_autocast(total.mean.device):
            return total.components(group.wanted, near)

    def _of_all_ranks(self, scatter: Scatter) -> list[tuple[Tensor, ...]]:
        own = scatter.parts()
        if not self._across:
            return [own]
        world = distributed.get_world_size()
        gathered = []
        for tensor in own:
            each = [torch.empty_like(tensor) for _ in range(world)]
            distributed.all_gather(each, tensor.contiguous())
            gathered.append(each)
        return list(zip(*gathered, strict=True))

    def _spread(self) -> dict[str, int]:
        """The ranks as the components are now; of layers with the same input the first gets no less than the others."""
        groups = self._all_groups()
        first = [(group.names[0], group) for group in groups]
        rest = [(name, group) for group in groups for name in group.names[1:]]
        ratios = {}
        for name, group in (*first, *rest):
            assert group.found is not None
            ratios[name] = group.found.ratios[: group.found.significant]
        return spread_ranks(ratios, sum(self.ranks[name] for name in ratios))

    def result(self) -> dict[str, Tensor]:
        """A of each layer that was called."""
        for group in self._all_groups():
            group.found = self._components(group, None)
        ranks = self._spread()
        found = {}
        for name in self.ranks:
            if name in ranks:
                components = self._groups[name].found
                assert components is not None
                found[name] = components.start(ranks[name], whiten=self.options.whiten)
        return found
