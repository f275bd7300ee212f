"""Adapter configs: their fields, their file, and which modules they mean."""

from __future__ import annotations

from lorakit.config.base import CONFIG_NAME, REQUIRED_KEYS, PeftConfig, Resolver, set_resolver
from lorakit.config.combined import combined_config
from lorakit.config.known_targets import SEQ_CLS_HEADS, TARGET_MODULES
from lorakit.config.lora import LoraConfig
from lorakit.config.matching import Matcher, ends_in
from lorakit.config.names import PeftType, TaskType, check_adapter_name
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
from lorakit.config.suggest import NearNames
from lorakit.config.support import NOT_YET, check_supported

__all__ = [
    "CONFIG_NAME",
    "NOT_YET",
    "REQUIRED_KEYS",
    "SEQ_CLS_HEADS",
    "TARGET_MODULES",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "Matcher",
    "MontecloraConfig",
    "NearNames",
    "PeftConfig",
    "PeftType",
    "Resolver",
    "TaskType",
    "VeloraConfig",
    "check_adapter_name",
    "check_supported",
    "combined_config",
    "ends_in",
    "set_resolver",
]
