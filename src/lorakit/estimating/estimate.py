"""`estimate`: parameters, file size and training memory of an adapter, from the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from lorakit.api import get_peft_model, plan
from lorakit.config import LoraConfig, TaskType
from lorakit.errors import ConfigError, UnsupportedError
from lorakit.estimating.four_bit import SCHEMES, quantise_skeleton
from lorakit.estimating.states import STATES, state_bytes
from lorakit.estimating.tracing import trace_step
from lorakit.init.registry import TAKES_OFF, initialiser_name
from lorakit.skeleton import build_skeleton

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn

    from lorakit.estimating.tracing import Peak
    from lorakit.surgery import Plan

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_TASK_OF_CLASS: Mapping[str, TaskType] = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


@dataclass(frozen=True)
class Estimate:
    """What training an adapter takes. Sizes are in bytes.

    Attributes:
        model: the class of the model.
        targets: how many modules and parameters get factors.
        base_parameters: of the model, without the adapter.
        trainable_parameters: of the adapter, whole modules and all.
        adapter_bytes: of the tensors in its file.
        weights: the model's parameters and buffers.
        adapter: the adapter's parameters in memory.
        gradients: of the adapter's parameters.
        optimizer: what the optimizer keeps.
        activations: what is alive at the worst moment of a step beside all these and the logits.
        logits: of the same moment, what is as wide as the vocabulary: logits, their logarithms and gradients.
        total: the sum of the last six.
        batch: samples in a step.
        seq: tokens of a sample.
        dtype: that the model is loaded and computed in.
        quantization: how its linear layers are stored, or None.
        optimizer_name: which optimizer.
        gradient_checkpointing: whether activations are computed again in backward.
        notes: what the figures leave out.
    """

    model: str
    targets: int
    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    total: int
    batch: int
    seq: int
    dtype: str
    quantization: str | None
    optimizer_name: str
    gradient_checkpointing: bool
    notes: tuple[str, ...]


def estimate(
    model_or_config: str | os.PathLike[str] | Any,
    config: LoraConfig,
    *,
    batch: int = 1,
    seq: int = 1024,
    dtype: str | torch.dtype = "bfloat16",
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    quantization: str | None = None,
) -> Estimate:
    """Tell what training an adapter will take before anything is loaded.

    The model is built without numbers, and the adapter put on it as `lorakit.plan` says; activations and logits are
    counted in one training step with shapes in the place of numbers, through the very code that will run.

    Args:
        model_or_config: a transformers config, a model that has one, a folder with `config.json`, or a repository.
        config: the adapter; its `task_type` chooses the model's head.
        batch: samples in one step on one device.
        seq: tokens of a sample, padding included.
        dtype: "bfloat16", "float16" or "float32": that the base is loaded and computed in.
        optimizer: "adamw", "adamw_8bit", "adafactor", "lion", "sgd" or "sgd_momentum".
        gradient_checkpointing: whether it will be on.
        quantization: None, "nf4" or "nf4_double" (bitsandbytes, the second with quantised scales), with the rest of the
            model in fp32, as `prepare_model_for_kbit_training` leaves it.

    Returns:
        The parts, in bytes. Left out: memory of the driver and of fragmentation, and workspaces inside kernels.

    Raises:
        AdapterNotFoundError, AdapterFormatError: there is no such model, or its config cannot be read.
        ConfigError: a value is not one of those above, or the config makes no model for the task.
        PlanError: the adapter does not fit the model.
        UnsupportedError: transformers is not installed, or the model cannot run without numbers.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"expected a LoraConfig, got {type(config).__name__}")
    compute = _checked(batch, seq, dtype, optimizer, quantization)
    base = build_skeleton(model_or_config, config.task_type, compute)
    base.config.use_cache = False  # a cache of keys and values is for generation
    planned = plan(base, config)
    base_parameters = sum(parameter.numel() for parameter in base.parameters())
    if quantization is not None:
        quantise_skeleton(base, compute, SCHEMES[quantization])
    weights = _bytes_of(base)
    vocabulary = base.config.get_text_config().vocab_size
    inputs = _inputs(base, config, batch, seq)
    model = get_peft_model(base, _plain(config))
    _freeze(model, planned)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {
        "weights": weights,
        "adapter": _bytes_of(model) - weights + _offsets(planned, config),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": state_bytes(optimizer, trained),
    }
    peak = _peak(model, inputs, vocabulary, checkpointing=gradient_checkpointing)
    parts |= {"activations": peak.rest, "logits": peak.wide}
    return Estimate(
        model=type(base).__name__,
        targets=len(planned.specs),
        base_parameters=base_parameters,
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        adapter_bytes=planned.bytes,
        **parts,
        total=sum(parts.values()),
        batch=batch,
        seq=seq,
        dtype=str(compute).removeprefix("torch."),
        quantization=quantization,
        optimizer_name=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        notes=tuple(_notes(planned, config)),
    )


def _checked(
    batch: int, seq: int, dtype: str | torch.dtype, optimizer: str, quantization: str | None
) -> torch.dtype:
    for name, value in (("batch", batch), ("seq", seq)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: got {value!r}, wanted a positive int")
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if quantization is not None and quantization not in SCHEMES:
        raise ConfigError(
            f"quantization: got {quantization!r}, wanted None, {' or '.join(map(repr, SCHEMES))}"
        )
    if optimizer not in STATES:
        state_bytes(optimizer, ())
    return found


def _plain(config: LoraConfig) -> LoraConfig:
    """The same adapter without what would want numbers: schemes that read the weight, and masks of dropout."""
    return replace(
        config,
        init_lora_weights=True,
        lora_dropout=0.0,
        loftq_config={},
        eva_config=None,
        corda_config=None,
        lora_ga_config=None,
    )


def _freeze(model: nn.Module, planned: Plan) -> None:
    """Let nothing be trained that the config's own scheme would not train."""
    parts = {part for spec in planned.specs for part in spec.frozen} & {"A", "B"}
    for name, parameter in model.named_parameters():
        if any(f".lora_{part}." in name for part in parts):
            parameter.requires_grad = False


def _inputs(base: nn.Module, config: LoraConfig, batch: int, seq: int) -> dict[str, Tensor]:
    """The arguments of one step, on the meta device."""
    task = config.task_type or next(
        (task for suffix, task in _TASK_OF_CLASS.items() if type(base).__name__.endswith(suffix)), None
    )
    ids = torch.empty(batch, seq, dtype=torch.long, device="meta")
    one = torch.empty(batch, dtype=torch.long, device="meta")
    if task == TaskType.SEQ_CLS:
        return {"input_ids": ids, "labels": one}
    if task == TaskType.QUESTION_ANS:
        return {"input_ids": ids, "start_positions": one, "end_positions": one}
    if "labels" not in signature(base.forward).parameters:
        return {"input_ids": ids}  # an encoder alone: whatever follows it has the loss
    return {"input_ids": ids, "labels": ids}


def _peak(model: Any, inputs: Mapping[str, Tensor], vocabulary: int, *, checkpointing: bool) -> Peak:
    if checkpointing:
        try:
            model.gradient_checkpointing_enable()
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from error
    try:
        return trace_step(model, inputs, vocabulary)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(model.get_base_model()).__name__} cannot be run without numbers, so its activations cannot be "
            f"counted ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]}); lorakit.plan() tells the "
            "trainable parameters of the model itself"
        ) from error


def _bytes_of(model: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _offsets(planned: Plan, config: LoraConfig) -> int:
    """What is held beside the factors by a scheme that takes its beginning off the base."""
    taken = initialiser_name(config.init_lora_weights) in TAKES_OFF
    return sum(spec.bytes for spec in planned.specs) if taken else 0


def _notes(planned: Plan, config: LoraConfig) -> list[str]:
    notes = list(planned.notes)
    if initialiser_name(config.init_lora_weights) in TAKES_OFF:
        notes.append(
            f"init_lora_weights={config.init_lora_weights!r}: where the adapter began is held beside it, and a file may "
            "have twice the rank; what reading the weights takes is not counted"
        )
    if config.lora_dropout:
        notes.append(
            "lora_dropout: nothing is kept for it; what drawing a mask takes for a moment is not counted"
        )
    return notes
