"""What an adapter of a file would be in the place of a loaded one, or why it cannot be there."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, NamedTuple

from lorakit.config import check_supported
from lorakit.errors import PlanError
from lorakit.hotswap.exchange import Setting
from lorakit.layers import ParamWrapper
from lorakit.padding import FACTORS, Entry, Targets, entries, shape_of
from lorakit.specs import scaling_of
from lorakit.surgery import make_plan
from lorakit.variants import variant_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lorakit.config import LoraConfig
    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry, Plan

_TARGETING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "bias",
    "trainable_token_indices",
)
"""The fields that decide where an adapter is."""

_MAY_DIFFER = frozenset(
    {
        *_TARGETING,
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
        *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "extra", "runtime_config", "megatron_core"),
    }
)
"""The fields that a swap can follow, or that have no effect on weights that are there already."""

_CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga")


class Newcomer(NamedTuple):
    """An adapter that is to take the place of another.

    Attributes:
        registry: of the model.
        name: of the adapter.
        config: the new one, resolved as an attached adapter's is.
        layers: every layer of the old adapter, by path.
        settings: what the new one is made with, on those of them that it is on.
        plan: the whole plan, where one had to be made.
    """

    registry: AdapterRegistry
    name: str
    config: LoraConfig
    layers: dict[str, LoraLayer]
    settings: dict[str, Setting]
    plan: Plan | None

    @classmethod
    def of(cls, registry: AdapterRegistry, name: str, config: LoraConfig) -> Newcomer:
        """Find out what the config means here.

        Raises:
            PlanError, UnsupportedError: it is not for a swap.
        """
        config.validate()
        check_supported(config, loading=True)
        former = registry.configs[name]
        problems = _differences(former, config)
        layers = {path: layer for path, layer in registry.layers.items() if name in layer.adapters}
        alike = all(getattr(former, field) == getattr(config, field) for field in _TARGETING)
        if alike and not config.ensure_weight_tying:  # a plan knows what must be equal in the file
            plan = None
            settings = _settings(config, layers, name, problems)
            config = replace(config, fan_in_fan_out=former.fan_in_fan_out)
        else:
            plan = make_plan(registry.model, config, source="file")
            settings = {spec.path: Setting.of(spec, use_rslora=config.use_rslora) for spec in plan.specs}
            config = plan.config
            problems += _misplaced(plan, registry, name)
        problems += _not_to_be_emptied(layers.keys() - settings.keys(), registry, name)
        if problems:
            raise PlanError([*problems, "load it under a name of its own instead (load_adapter)"])
        return cls(registry, name, config, layers, settings, plan)

    def entries(self) -> list[Entry]:
        """The tensors that its file has, each with the one of the model that it will be in."""
        there = {
            path: layer for path, layer in self.layers.items() if path in self.settings or self._rows(layer)
        }
        return list(entries(self.registry, self.name, there))

    def _rows(self, layer: LoraLayer) -> bool:
        return self.name not in layer.r

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape that an entry has in the file."""
        if entry.spot is None:
            return tuple(entry.tensor.shape)
        return shape_of(entry.spot.layout, entry.spot.factor, self.settings[entry.spot.path].r)


def _differences(former: LoraConfig, config: LoraConfig) -> list[str]:
    """The fields in which the configs differ and must not."""
    found = []
    for item in fields(config):
        old, new = getattr(former, item.name), getattr(config, item.name)
        if item.name not in _MAY_DIFFER and (old or None) != (new or None):
            found.append(f"{item.name}: got {new!r}, but the loaded adapter has {old!r}")
    if str(former.init_lora_weights).partition("_niter_")[0] in _CHANGE_BASE:
        found.append(
            f"init_lora_weights: the loaded adapter changed the base when it began ({former.init_lora_weights!r})"
        )
    for which, variant in (("the loaded", variant_of(former)), ("the new", variant_of(config))):
        if variant is not None:
            found.append(
                f"{variant.field}: {which} adapter is {variant.name}, which cannot be exchanged in place"
            )
    return found


def _settings(
    config: LoraConfig, layers: Mapping[str, LoraLayer], name: str, problems: list[str]
) -> dict[str, Setting]:
    """What a config says of the layers that it targets; other layers of the model are not looked at."""
    targets = Targets(config)
    found: dict[str, Setting] = {}
    made: dict[tuple[int, float, bool], Setting] = {}  # hundreds of layers have a few settings
    for path, layer in layers.items():
        meant = targets.match(path, layer) if name in layer.r else None
        if meant is None:
            continue
        r, alpha = targets.matcher.rank(meant), targets.matcher.alpha(meant)
        if r % layer.layout.groups:
            problems.append(
                f"{path}: the rank must be divisible by its {layer.layout.groups} groups, got r={r}"
            )
        drops = meant == path and not isinstance(layer, ParamWrapper)
        if (r, alpha, drops) not in made:
            scaling = scaling_of(r, alpha, rslora=config.use_rslora)
            dropout = config.lora_dropout if drops else 0.0
            made[r, alpha, drops] = Setting(r, alpha, config.use_rslora, scaling, dropout)
        found[path] = made[r, alpha, drops]
    return found


def _misplaced(plan: Plan, registry: AdapterRegistry, name: str) -> list[str]:
    """Where the new adapter is and the old one is not, and what of the old one it would have to leave."""
    layers = registry.layers
    problems = [
        f"{spec.path}: the loaded adapter is not on this layer"
        for spec in plan.specs
        if spec.path not in layers or name not in layers[spec.path].r
    ]
    tokens = {
        path: tuple(layer.token_adapter.token_indices[name])
        for path, layer in layers.items()
        if layer.token_adapter is not None and name in layer.token_adapter.token_indices
    }
    whole = {path for path, wrapper in registry.saved.items() if name in wrapper.adapters}
    biases = {key for key, slot in registry.slots.items() if name in slot._trainable}
    for what, new, old in (
        ("trainable_token_indices", {spec.path: spec.indices for spec in plan.tokens}, tokens),
        ("modules_to_save", set(plan.modules_to_save), whole),
        ("bias", set(plan.biases), biases),
    ):
        if new != old:
            problems.append(
                f"{what}: means {new or 'nothing'} here, but the loaded adapter has {old or 'nothing'}"
            )
    return problems


def _not_to_be_emptied(paths: Collection[str], registry: AdapterRegistry, name: str) -> list[str]:
    """Layers that only the old adapter is on, and that zeros in both factors would not make as if it were not."""
    problems = []
    for path in sorted(paths):
        layer = registry.layers[path]
        suffixes = {item.file_suffix for item in layer.tensors(name)} if name in layer.r else set()
        more = suffixes - FACTORS.keys() - {"lora_B.bias"}
        if more or name in layer.tied:
            problems.append(
                f"{path}: the new adapter is not on this layer, and the old one cannot be taken off it"
            )
    return problems
