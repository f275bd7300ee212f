"""`LoraConfig`: the fields, order, defaults and file form of PEFT's, checked when it is built.

Two configs are equal when they describe the same adapter: `runtime_config` belongs to the run and is neither
compared nor written. `from_dict(config.to_dict()) == config` always holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping  # noqa: TC003 - typing.get_type_hints reads them
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from lorakit.config import checks
from lorakit.config.base import PeftConfig, register_config
from lorakit.config.names import PeftType
from lorakit.config.options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorakit.config.rules import LORA_RULES


def _as_set(value: Any) -> Any:
    """A list of names as a set, as PEFT keeps it."""
    collected = isinstance(value, (list, tuple, frozenset)) and all(isinstance(item, str) for item in value)
    return set(value) if collected else value


def _as_list(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, (tuple, range)) else value


def _as_pairs(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    return [tuple(item) if isinstance(item, list) else item for item in value]


def _as_dict(value: Any) -> Any:
    """Files of other writers may say null for an empty pattern."""
    return {} if value is None else value


def _as_loftq(value: Any) -> Any:
    """PEFT keeps this group, alone of all, as a dict."""
    return asdict(value) if isinstance(value, LoftQConfig) else _as_dict(value)


def _as_init(value: Any) -> Any:
    return value.lower() if isinstance(value, str) and value.lower() in checks.INITS else value


def _as_group(kind: type) -> Callable[[Any], Any]:
    """A dict as the option group, unless something in it is for the checks to name."""
    names = {item.name for item in fields(kind)}
    return lambda value: kind(**value) if isinstance(value, dict) and names.issuperset(value) else value


@register_config(PeftType.LORA)
@dataclass
class LoraConfig(PeftConfig):
    """How LoRA is put on a model (Hu et al., 2021, arXiv:2106.09685): `y + scaling * B(A(dropout(x)))`.

    The fields before `r` are those of `PeftConfig`.

    Args:
        r: rank; a positive int.
        target_modules: names that end a module path, or one regular expression that matches whole paths, or
            "all-linear"; None takes the known targets of the model's type.
        exclude_modules: the same, for modules to leave out; it wins over `target_modules`.
        lora_alpha: numerator of the scaling `lora_alpha / r`; finite and not 0.
        lora_dropout: probability of zeroing an element of the adapter's input in training, in [0, 1).
        fan_in_fan_out: the base weight is stored as (in, out).
        bias: which biases of the base are trained: "none", "all" or "lora_only".
        use_rslora: scale by `lora_alpha / sqrt(r)` (Kalajdzievski, 2023, arXiv:2312.03732).
        modules_to_save: names of modules that are trained and saved whole.
        init_lora_weights: True (A uniform, B zero), False (both random), or the name of a scheme.
        layers_to_transform: index or indices of the layers to adapt; None adapts all.
        layers_pattern: name or names of the list of layers that the indices count in.
        rank_pattern: rank by module name or pattern, in place of `r`; the first key that matches decides.
        alpha_pattern: the same for `lora_alpha`.
        megatron_config: arguments of Megatron's transformer config.
        megatron_core: Megatron module to use.
        trainable_token_indices: token ids whose embedding rows are trained.
        loftq_config: options of LoftQ, a `LoftQConfig` or a dict; kept as a dict.
        eva_config: options of EVA.
        corda_config: options of CorDA.
        lora_ga_config: options of LoRA-GA.
        use_dora: train magnitude and direction apart (Liu et al., 2024, arXiv:2402.09353).
        velora_config: options of VeLoRA.
        alora_invocation_tokens: tokens that switch the adapter on.
        use_qalora: pool the input in groups for a quantised base.
        qalora_group_size: size of those groups.
        monteclora_config: options of MonteCLoRA.
        layer_replication: pairs (start, end) of layer ranges that make up a deeper model.
        runtime_config: settings of the run; neither written nor compared.
        lora_bias: give B a bias.
        target_parameters: names of bare parameters to adapt.
        use_bdlora: options of block-diagonal LoRA.
        arrow_config: options of Arrow routing.
        kasa_config: options of KaSA.
        ensure_weight_tying: tie the adapters of tied modules.

    Raises:
        ConfigError: lists every field with a wrong value.
    """

    peft_type: PeftType | str | None = PeftType.LORA
    r: int = 8
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, compare=False)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    _CHECKS: ClassVar[Mapping[str, checks.Check]] = checks.LORA
    _RULES: ClassVar[tuple[checks.Rule, ...]] = LORA_RULES
    _CONVERT: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        **PeftConfig._CONVERT,
        "peft_type": lambda value: PeftType.LORA if value in (None, "LORA") else value,
        "target_modules": _as_set,
        "exclude_modules": _as_set,
        "modules_to_save": _as_list,
        "init_lora_weights": _as_init,
        "layers_to_transform": _as_list,
        "layers_pattern": lambda value: None if value == "" else _as_list(value),
        "rank_pattern": _as_dict,
        "alpha_pattern": _as_dict,
        "trainable_token_indices": _as_list,
        "loftq_config": _as_loftq,
        "eva_config": _as_group(EvaConfig),
        "corda_config": _as_group(CordaConfig),
        "lora_ga_config": _as_group(LoraGAConfig),
        "velora_config": _as_group(VeloraConfig),
        "alora_invocation_tokens": _as_list,
        "monteclora_config": _as_group(MontecloraConfig),
        "layer_replication": _as_pairs,
        "runtime_config": _as_group(LoraRuntimeConfig),
        "target_parameters": _as_list,
        "use_bdlora": _as_group(BdLoraConfig),
        "arrow_config": _as_group(ArrowConfig),
        "kasa_config": _as_group(KasaConfig),
    }
    _NOT_SAVED: ClassVar[frozenset[str]] = frozenset({"extra", "runtime_config"})
