"""What each field of a config may hold, as a table of small checks; every problem found is reported at once.

A check takes where it looks and a value, and yields one line a problem: the place, what was found with its type, and
what was wanted. Checks read plain values, so that a file is judged before any object is built from it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

from lorakit.config import patterns
from lorakit.config.names import PeftType, TaskType
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

Check: TypeAlias = Callable[[str, object], Iterator[str]]
Rule: TypeAlias = Callable[[Mapping[str, Any]], Iterator[str]]

INITS = frozenset(
    {"gaussian", "orthogonal", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "mica"},
)
_PISSA_NITER = re.compile(r"pissa_niter_[1-9][0-9]{0,3}", re.ASCII)
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38  # what float32 can hold
_MAX_DEPTH = 32
_MOST_RANGES = 1000
_MOST_SAMPLES = 2**16  # an adapter holds two numbers for each, on every layer

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def problem(where: str, value: object, wanted: str) -> str:
    """One line: where, what was found and its type, what was wanted."""
    try:
        found = _SHORT.repr(value)
    except ValueError:  # Python prints no int of more than 4,300 digits
        found = "a number too long to print"
    return f"{where}: got {found} ({type(value).__name__}), wanted {wanted}"


def problems(values: Mapping[str, Any], table: Mapping[str, Check], rules: Sequence[Rule]) -> list[str]:
    """Every problem of the given fields; rules across fields are asked only when each field is good by itself."""
    found = [line for name, value in values.items() for line in table[name](name, value)]
    return found or [line for rule in rules for line in rule(values)]


# Checks of one value.


def a(wanted: str, accepts: Callable[[Any], bool]) -> Check:
    """A check for values that `accepts` accepts."""

    def check(where: str, value: object) -> Iterator[str]:
        if not accepts(value):
            yield problem(where, value, wanted)

    return check


def one_of(*allowed: str) -> Check:
    """A check for one of the given strings."""
    return a(
        "one of " + ", ".join(map(repr, allowed)), lambda value: isinstance(value, str) and value in allowed
    )


def optional(inner: Check) -> Check:
    """None, or what `inner` accepts."""
    return lambda where, value: iter(()) if value is None else inner(where, value)


def items(inner: Check, wanted: str) -> Check:
    """A list, tuple or set whose every item `inner` accepts."""

    def check(where: str, value: object) -> Iterator[str]:
        if not isinstance(value, (list, tuple, set, frozenset)):
            yield problem(where, value, wanted)
            return
        for item in value:
            yield from inner(f"{where}, an entry", item)

    return check


def text_or(inner: Check, text: Check) -> Check:
    """What `text` accepts when the value is a string, else what `inner` accepts."""
    return lambda where, value: (text if isinstance(value, str) else inner)(where, value)


def is_int(value: object) -> bool:
    """An int within 32 bits, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST_INT


def is_number(value: object) -> bool:
    """An int or a float that float32 can hold, and neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT


def is_json(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether JSON can hold the value as it is."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and is_json(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(is_json(item, depth - 1) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or is_number(value)


def pattern(field: str) -> Check:
    """A regular expression that is good in its field."""

    def check(where: str, value: object) -> Iterator[str]:
        if not isinstance(value, str) or not value:
            yield problem(where, value, "a regular expression, as a non-empty string")
        elif wanted := patterns.flaw(value, patterns.WRAPPERS[field]):
            yield problem(where, value, wanted)

    return check


def pattern_map(field: str, inner: Check) -> Check:
    """A dict from patterns to values that `inner` accepts."""
    key_check = pattern(field)

    def check(where: str, value: object) -> Iterator[str]:
        if not isinstance(value, dict):
            yield problem(where, value, "a dict from module name patterns to numbers")
            return
        for key, item in value.items():
            yield from key_check(f"{where}, a key", key)
            yield from inner(f"{where}[{_SHORT.repr(key)}]", item)
        hard = sum(isinstance(key, str) and not patterns.simple(key) for key in value)
        if hard > patterns.MAX_PATTERNS:
            yield f"{where}: got {hard} regular expressions, wanted at most {patterns.MAX_PATTERNS}; use plain names"

    return check


def group(kind: type, table: Mapping[str, Check]) -> Check:
    """An option group, or a dict of some of its fields."""
    names = [field.name for field in fields(kind)]

    def check(where: str, value: object) -> Iterator[str]:
        if not isinstance(value, (dict, kind)):
            yield problem(where, value, f"a {kind.__name__} or a dict of its fields")
            return
        for name, item in (value if isinstance(value, dict) else vars(value)).items():
            if name in table:
                yield from table[name](f"{where}.{name}", item)
            else:
                yield f"{where}: got the field {_SHORT.repr(name)}, wanted some of {', '.join(names)}"

    return check


def _is_init(value: object) -> bool:
    if isinstance(value, str):
        return value in INITS or _PISSA_NITER.fullmatch(value) is not None
    return isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(is_int(n) and n >= 0 for n in value)


flag = a("True or False", lambda value: isinstance(value, bool))
text = a("a non-empty string", lambda value: isinstance(value, str) and value != "")
path = a("a string", lambda value: isinstance(value, str))
number = a("a finite number", is_number)
rank = a("a positive int", lambda value: is_int(value) and value > 0)
index = a("an int of 0 or more", lambda value: is_int(value) and value >= 0)
alpha = a("a finite number other than 0", lambda value: is_number(value) and value != 0)
rate = a("a number of at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1)
json_dict = a("a dict that JSON can hold", lambda value: isinstance(value, dict) and is_json(value))
names = items(text, "a list of non-empty strings")
name_list = a(
    "a list of non-empty strings",
    lambda value: isinstance(value, list) and all(isinstance(item, str) and item for item in value),
)
indices = items(index, "an int or a list of ints")
unit = a("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
amount = a("a finite number of at least 0", lambda value: is_number(value) and value >= 0)
positive = a("a positive number", lambda value: is_number(value) and value > 0)
growth = a("a number of at least 1", lambda value: is_number(value) and value >= 1)


def _token_indices(where: str, value: object) -> Iterator[str]:
    if not isinstance(value, dict):
        yield from items(index, "a list of ints, or a dict from module names to such lists")(where, value)
        return
    for key, item in value.items():
        yield from text(f"{where}, a key", key)
        yield from items(index, "a list of ints")(f"{where}[{_SHORT.repr(key)}]", item)


def _saved_modules(where: str, value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield problem(where, value, f"a list of names, such as [{value[:80]!r}]")
        return
    yield from items(pattern("modules_to_save"), "a list of non-empty strings")(where, value)


def _ranges(where: str, value: object) -> Iterator[str]:
    if isinstance(value, (list, tuple)) and len(value) > _MOST_RANGES:
        yield f"{where}: got {len(value)} ranges, at most {_MOST_RANGES} are read"
        return
    pair = a("a pair of layer indices [start, end]", _is_pair)
    yield from items(pair, "a list of pairs [start, end]")(where, value)


BASE: Mapping[str, Check] = {
    "task_type": optional(one_of(*TaskType.__members__)),
    "peft_type": optional(one_of(*PeftType.__members__)),
    "auto_mapping": optional(json_dict),
    "peft_version": optional(path),
    "base_model_name_or_path": optional(path),
    "revision": optional(path),
    "inference_mode": flag,
    "extra": json_dict,
}

LORA: Mapping[str, Check] = {
    **BASE,
    "r": rank,
    "target_modules": optional(text_or(names, pattern("target_modules"))),
    "exclude_modules": optional(text_or(names, pattern("exclude_modules"))),
    "lora_alpha": alpha,
    "lora_dropout": rate,
    "fan_in_fan_out": flag,
    "bias": one_of("none", "all", "lora_only"),
    "use_rslora": flag,
    "modules_to_save": optional(_saved_modules),
    "init_lora_weights": a(
        f"True, False, 'pissa_niter_<steps>' or one of {', '.join(map(repr, sorted(INITS)))}", _is_init
    ),
    "layers_to_transform": optional(
        lambda where, value: index(where, value) if is_int(value) else indices(where, value)
    ),
    "layers_pattern": optional(
        text_or(
            items(pattern("layers_pattern"), "a string or a list of non-empty strings"),
            pattern("layers_pattern"),
        )
    ),
    "rank_pattern": pattern_map("rank_pattern", rank),
    "alpha_pattern": pattern_map("alpha_pattern", alpha),
    "megatron_config": optional(json_dict),
    "megatron_core": optional(path),
    "trainable_token_indices": optional(_token_indices),
    "loftq_config": group(
        LoftQConfig,
        {
            "loftq_bits": a("2, 4 or 8", lambda value: is_int(value) and value in (2, 4, 8)),
            "loftq_iter": rank,
        },
    ),
    "eva_config": optional(
        group(
            EvaConfig,
            {
                "rho": growth,
                "tau": unit,
                "use_label_mask": flag,
                "label_mask_value": a("an int", is_int),
                "whiten": flag,
                "adjust_scaling_factors": flag,
            },
        )
    ),
    "corda_config": optional(
        group(
            CordaConfig,
            {
                "cache_file": optional(path),
                "covariance_file": optional(path),
                "corda_method": one_of("ipm", "kpm"),
                "verbose": flag,
                "use_float16_for_covariance": flag,
                "prune_temporary_fields": flag,
            },
        )
    ),
    "lora_ga_config": optional(
        group(
            LoraGAConfig,
            {
                "direction": one_of("ArBr", "A2rBr", "ArB2r", "random"),
                "scale": one_of("stable", "weight_svd", "gd_scale", "unit"),
                "stable_gamma": positive,
            },
        )
    ),
    "use_dora": flag,
    "velora_config": optional(
        group(
            VeloraConfig,
            {
                "num_groups": rank,
                "scale": positive,
                "init_type": one_of("batch_average", "batch_average_once", "random"),
            },
        )
    ),
    "alora_invocation_tokens": optional(items(index, "a list of token ids")),
    "use_qalora": flag,
    "qalora_group_size": rank,
    "monteclora_config": optional(
        group(
            MontecloraConfig,
            {
                "num_samples": a(
                    f"an int from 1 to {_MOST_SAMPLES}",
                    lambda value: is_int(value) and 0 < value <= _MOST_SAMPLES,
                ),
                "use_entropy": flag,
                "dirichlet_prior": positive,
                "sample_scaler": number,
                "kl_loss_weight": number,
                "buffer_size": rank,
            },
        )
    ),
    "layer_replication": optional(_ranges),
    "runtime_config": group(LoraRuntimeConfig, {"ephemeral_gpu_offload": flag}),
    "lora_bias": flag,
    "target_parameters": optional(names),
    "use_bdlora": optional(
        group(
            BdLoraConfig,
            {
                "target_modules_bd_a": optional(name_list),
                "target_modules_bd_b": optional(name_list),
                "nblocks": rank,
                "match_strict": flag,
            },
        )
    ),
    "arrow_config": optional(
        group(
            ArrowConfig,
            {
                "top_k": rank,
                "router_temperature": positive,
                "use_gks": flag,
                "task_adapter_names": optional(name_list),
                "gks_adapter_names": optional(name_list),
                "rng_seed": optional(a("an int", is_int)),
            },
        )
    ),
    "kasa_config": optional(group(KasaConfig, {"beta": amount, "gamma": amount})),
    "ensure_weight_tying": flag,
}
