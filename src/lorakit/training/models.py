"""The base and its tokenizer for a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.config import TaskType
from lorakit.errors import AdapterError, AdapterNotFoundError, ConfigError, UnsupportedError
from lorakit.kbit import prepare_model_for_kbit_training
from lorakit.skeleton import read_model_config, transformers_or_refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.peft_model import PeftModel
    from lorakit.training.settings import TrainConfig


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a base; one without a token to pad with pads with its end token.

    Raises:
        AdapterNotFoundError: there is none.
        UnsupportedError: transformers is not installed.
    """
    transformers = transformers_or_refuse("training")
    read_model_config(model)  # says what is missing in one line
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=Path(model).exists())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterNotFoundError(f"{model}: no tokenizer can be read from it: {_line(error)}") from error
    tokenizer.padding_side = "right"
    return tokenizer


def pad_token(tokenizer: Any) -> int:
    """What rows are padded with; nothing looks at it."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def longest(settings: TrainConfig, tokenizer: Any) -> int:
    """How many tokens a row may have: as asked for, and no more than the model takes."""
    positions = getattr(read_model_config(settings.model).get_text_config(), "max_position_embeddings", None)
    limits = [settings.max_length, tokenizer.model_max_length, positions or settings.max_length]
    return int(min(limits))


def chosen_dtype(settings: TrainConfig) -> torch.dtype:
    """The dtype that the base is loaded in."""
    if settings.dtype == "auto":
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def load_base(settings: TrainConfig, task: TaskType, labels: Sequence[str | int], pad: int) -> Any:
    """The base, without an adapter.

    Args:
        settings: of the run.
        task: chooses the head.
        labels: of a classifier.
        pad: the token that rows are padded with, which some classifiers look for.

    Raises:
        AdapterNotFoundError: there is no such model, or a file of it is missing.
        ConfigError: it cannot do this task.
        UnsupportedError: 4 bits are asked for, and bitsandbytes is not installed.
    """
    transformers = transformers_or_refuse("training")
    options: dict[str, Any] = {
        "dtype": chosen_dtype(settings),
        "local_files_only": Path(settings.model).exists(),
    }
    auto = transformers.AutoModelForCausalLM
    if task == TaskType.SEQ_CLS:
        auto = transformers.AutoModelForSequenceClassification
        names = [str(label) for label in labels]
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(names)),
            "label2id": {name: place for place, name in enumerate(names)},
        }
    if settings.load_in_4bit:
        options |= _in_four_bits(transformers, chosen_dtype(settings))
    torch.manual_seed(settings.seed)  # a classifier's head is drawn
    try:
        base = auto.from_pretrained(settings.model, **options)
    except OSError as error:
        raise AdapterNotFoundError(f"{settings.model}: the model cannot be read: {_line(error)}") from error
    except ValueError as error:
        raise ConfigError(
            f"{settings.model}: no {task.value} model can be made of it: {_line(error)}"
        ) from error
    base.config.use_cache = False
    if task == TaskType.SEQ_CLS and base.config.pad_token_id is None:
        base.config.pad_token_id = pad
    if settings.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def enable_checkpointing(model: PeftModel) -> None:
    """Compute activations again in backward; `ConfigError` where the base cannot."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing: {_line(error)}") from error


def _in_four_bits(transformers: Any, dtype: torch.dtype) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("load_in_4bit needs bitsandbytes: pip install bitsandbytes") from error
    scheme = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    here = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    return {"quantization_config": scheme} | ({"device_map": here} if here else {})


def _line(error: BaseException) -> str:
    if isinstance(error, AdapterError):
        return str(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
