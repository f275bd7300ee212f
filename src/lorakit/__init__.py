"""lorakit: LoRA adapters for PyTorch models.

The one public door. What needs torch alone to be described is imported at once; the rest on first use, so that
`import lorakit` costs little more than `import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.api import get_peft_model, inject_adapter_in_model, plan
    from lorakit.arrow import create_arrow_model
    from lorakit.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from lorakit.calibration import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from lorakit.checkpoint.adapter_report import AdapterReport
    from lorakit.checkpoint.combining import Combination
    from lorakit.checkpoint.comparing import AdapterDifference, diff
    from lorakit.checkpoint.converting.convert import Converted, convert
    from lorakit.checkpoint.inspecting import inspect_adapter
    from lorakit.checkpoint.merging.merge import CheckpointMerge, merge_checkpoint
    from lorakit.checkpoint.resizing import Resized, resize
    from lorakit.config import (
        ArrowConfig,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoftQConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        MontecloraConfig,
        PeftType,
        TaskType,
        VeloraConfig,
    )
    from lorakit.configs import LoraConfig, PeftConfig
    from lorakit.diagnosis.doctor import doctor
    from lorakit.diagnosis.finding import Finding
    from lorakit.errors import (
        AdapterError,
        AdapterFormatError,
        AdapterNameError,
        AdapterNotFoundError,
        AdapterStateError,
        ConfigError,
        KeyMismatchError,
        LossyMergeError,
        NonFiniteError,
        PlanError,
        UnsupportedError,
    )
    from lorakit.estimating.estimate import Estimate, estimate
    from lorakit.extracting.extract import Extraction, extract
    from lorakit.helpers import (
        DoraCaching,
        MontecloraTrainerMixin,
        check_if_peft_model,
        rescale_adapter_scale,
    )
    from lorakit.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from lorakit.inspection import write_report
    from lorakit.intruders import IntruderReport, reduce_intruder_dimension
    from lorakit.kappa import find_kappa_target_modules
    from lorakit.kbit import prepare_model_for_kbit_training
    from lorakit.layers import LoraLayer, ModulesToSaveWrapper
    from lorakit.loading import LoadReport
    from lorakit.loftq import replace_lora_weights_loftq
    from lorakit.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from lorakit.report import MergeReport
    from lorakit.specs import AdapterSpec
    from lorakit.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
    from lorakit.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
    from lorakit.surgery import Plan
    from lorakit.tasks import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from lorakit.tools import combine
    from lorakit.training.checkpoints import AdapterTrainerMixin
    from lorakit.training.run import TrainResult, train
    from lorakit.training.settings import TrainConfig
    from lorakit.tuner import LoraModel
    from lorakit.types import Factors
    from lorakit.weighted import CombineReport

__version__ = "0.1.0"

_HOMES = {
    "checkpoint.adapter_report": ("AdapterReport",),
    "checkpoint.inspecting": ("inspect_adapter",),
    "checkpoint.combining": ("Combination",),
    "checkpoint.comparing": ("AdapterDifference", "diff"),
    "checkpoint.resizing": ("Resized", "resize"),
    "checkpoint.converting.convert": ("Converted", "convert"),
    "checkpoint.merging.merge": ("CheckpointMerge", "merge_checkpoint"),
    "api": ("get_peft_model", "inject_adapter_in_model", "plan"),
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "arrow": ("create_arrow_model",),
    "config": (
        "ArrowConfig",
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "PeftType",
        "TaskType",
        "VeloraConfig",
    ),
    "calibration": (
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
    ),
    "configs": ("LoraConfig", "PeftConfig"),
    "errors": (
        "AdapterError",
        "AdapterFormatError",
        "AdapterNameError",
        "AdapterNotFoundError",
        "AdapterStateError",
        "ConfigError",
        "KeyMismatchError",
        "LossyMergeError",
        "NonFiniteError",
        "PlanError",
        "UnsupportedError",
    ),
    "diagnosis.doctor": ("doctor",),
    "diagnosis.finding": ("Finding",),
    "extracting.extract": ("Extraction", "extract"),
    "estimating.estimate": ("Estimate", "estimate"),
    "helpers": ("DoraCaching", "MontecloraTrainerMixin", "check_if_peft_model", "rescale_adapter_scale"),
    "hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "inspection": ("write_report",),
    "intruders": ("IntruderReport", "reduce_intruder_dimension"),
    "kbit": ("prepare_model_for_kbit_training",),
    "kappa": ("find_kappa_target_modules",),
    "layers": ("LoraLayer", "ModulesToSaveWrapper"),
    "loading": ("LoadReport",),
    "loftq": ("replace_lora_weights_loftq",),
    "optimizers": ("create_lorafa_optimizer", "create_loraplus_optimizer"),
    "report": ("MergeReport",),
    "state_dict": ("get_peft_model_state_dict", "set_peft_model_state_dict"),
    "status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "surgery": ("Plan",),
    "tasks": (
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "tools": ("combine",),
    "training.checkpoints": ("AdapterTrainerMixin",),
    "training.run": ("TrainResult", "train"),
    "training.settings": ("TrainConfig",),
    "tuner": ("LoraModel",),
    "specs": ("AdapterSpec",),
    "types": ("Factors",),
    "weighted": ("CombineReport",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]  # noqa: PLE0604 - a computed list of strings


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(import_module(f"lorakit.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
