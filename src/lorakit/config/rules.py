"""Rules across the fields of a config, asked when each field is good by itself; each yields one line a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.config.checks import Rule, problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def layers_rule(values: Mapping[str, Any]) -> Iterator[str]:
    """Layer indices select within a list of target names, and `layers_pattern` needs them."""
    chosen, layers = values.get("layers_to_transform"), values.get("layers_pattern")
    if isinstance(values.get("target_modules"), str):
        for name, value in (("layers_to_transform", chosen), ("layers_pattern", layers)):
            if value is not None:
                yield problem(
                    name, value, "None, because target_modules is one pattern that selects layers by itself"
                )
    elif layers and chosen is None:
        yield problem("layers_pattern", layers, "layers_to_transform to be set with it")


def bias_rule(values: Mapping[str, Any]) -> Iterator[str]:
    """`lora_bias` has a starting value under the plain initialisation only, and DoRA has no place for it."""
    if not values.get("lora_bias"):
        return
    if not isinstance(values.get("init_lora_weights", True), bool):
        yield problem(
            "init_lora_weights", values["init_lora_weights"], "True or False, because lora_bias is True"
        )
    if values.get("use_dora"):
        yield "lora_bias: got True with use_dora=True, wanted one of the two"


def dora_rule(values: Mapping[str, Any]) -> Iterator[str]:
    """DoRA has no Megatron layer."""
    if values.get("use_dora") and values.get("megatron_config"):
        yield "megatron_config: got a config with use_dora=True, wanted one of the two"


def bdlora_rule(values: Mapping[str, Any]) -> Iterator[str]:
    """One factor of a module is block-diagonal, A or B."""
    given = values.get("use_bdlora") or {}
    options = given if isinstance(given, dict) else vars(given)
    lists = [options.get(f"target_modules_bd_{factor}") or () for factor in "ab"]
    both = sorted(set(lists[0]).intersection(lists[1]))
    if both:
        yield f"use_bdlora: got {both} in target_modules_bd_a and in target_modules_bd_b, wanted one of the two"


LORA_RULES: tuple[Rule, ...] = (layers_rule, bias_rule, dora_rule, bdlora_rule)
