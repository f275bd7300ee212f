"""A transformers model without numbers: its classes and shapes on the meta device, from its config alone."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.checkpoint.hub import resolve_model_config
from lorakit.config import TaskType
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL_CONFIG = "config.json"
AUTO_CLASSES: Mapping[str, str] = {
    TaskType.CAUSAL_LM.value: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM.value: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS.value: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS.value: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS.value: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION.value: "AutoModel",
}


def transformers_or_refuse(what: str) -> Any:
    """The package transformers.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(f"{what} needs transformers: pip install 'lorakit[transformers]'") from error
    return transformers


def read_model_config(source: Any) -> Any:
    """The transformers config of a model.

    Args:
        source: a config object, a model that has one, a folder with `config.json` or that file, or a repository of the
            hub, `user/name`.

    Raises:
        AdapterNotFoundError: there is none.
        AdapterFormatError: it cannot be read.
        UnsupportedError: transformers is not installed.
    """
    transformers = transformers_or_refuse("a model's config")
    if isinstance(source, transformers.PreTrainedConfig):
        return source
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        if not isinstance(config, transformers.PreTrainedConfig):
            raise UnsupportedError(
                f"{type(source).__name__} has no transformers config; pass a model that has one, or its folder"
            )
        return config
    found = resolve_model_config(source)
    folder = found.parent if found.name == MODEL_CONFIG else found
    if not (folder / MODEL_CONFIG).is_file():
        raise AdapterNotFoundError(f"{folder}: no {MODEL_CONFIG} in it; is it the folder of a model?")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise AdapterFormatError(
            f"{source}: its config cannot be read: {_first_line(error)} Mend or restore {MODEL_CONFIG}, or update transformers"
        ) from error
    config._name_or_path = os.fspath(source)
    return config


def build_skeleton(source: Any, task: TaskType | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The model of a config on the meta device: modules, shapes and dtypes, and not one number.

    Args:
        source: as `read_model_config` takes it.
        task: chooses the model's head; None takes the class that the config names, or a language model.
        dtype: of the parameters; None as the config says, or fp32.

    Returns:
        A `transformers.PreTrainedModel` in train mode.

    Raises:
        AdapterNotFoundError, AdapterFormatError, UnsupportedError: as `read_model_config`.
        ConfigError: no class of transformers makes a model for this task of this config.
    """
    transformers = transformers_or_refuse("a model's structure")
    config = copy.deepcopy(read_model_config(source))
    kind = type(source) if isinstance(source, transformers.PreTrainedModel) else None
    if kind is None and task is None:
        kind = _named_class(transformers, config)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            if kind is not None:
                return kind._from_config(config, dtype=dtype).train()
            auto = getattr(transformers, AUTO_CLASSES[TaskType(task or TaskType.CAUSAL_LM)])
            return auto.from_config(config, dtype=dtype).train()
    except (ValueError, ImportError, AttributeError) as error:
        what = kind.__name__ if kind is not None else task or TaskType.CAUSAL_LM
        raise ConfigError(
            f"no {what} model can be made of this {type(config).__name__}: {_first_line(error)}"
        ) from error


def _named_class(transformers: Any, config: Any) -> Any:
    """The class of transformers itself that a config names as its model's."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
