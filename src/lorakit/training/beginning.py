"""How a run's adapter begins: anew by a scheme, which may look at rows of the data first, or where a checkpoint was."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.api import get_peft_model
from lorakit.calibration import initialize_lora_eva_weights, preprocess_corda, preprocess_loraga
from lorakit.config import CordaConfig, EvaConfig, LoraGAConfig
from lorakit.configs import LoraConfig
from lorakit.loftq import replace_lora_weights_loftq
from lorakit.tasks import PeftModel
from lorakit.training.checkpoints import RAW_NAME, attach_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, nn

    from lorakit.config import TaskType
    from lorakit.training.settings import TrainConfig

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "default": {"init_lora_weights": True},
    "loftq": {"init_lora_weights": True},  # fitted to the quantised base once the adapter is on it
    "eva": {"eva_config": EvaConfig()},
    "corda": {"corda_config": CordaConfig(verbose=False)},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
}


def adapter_config(settings: TrainConfig, task: TaskType) -> LoraConfig:
    """The config of the adapter that a run trains."""
    targets = settings.targets
    scheme = {"init_lora_weights": settings.init} | dict(_OPTIONS.get(settings.init, {}))
    return LoraConfig(
        r=settings.r,
        lora_alpha=2 * settings.r if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        modules_to_save=list(settings.modules_to_save) or None,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type=task,
        **scheme,
    )


@dataclass(frozen=True)
class Look:
    """What a scheme that begins from data may look at: a few of the training rows, drawn by a seed.

    Attributes:
        rows: all of them, encoded.
        collate: makes a batch of rows.
        device: where the run will be.
        settings: how many rows, in batches of how many, and the seed that says which; all processes that train together
            look at the same ones.
        progress: is called with (what, done, total).
    """

    rows: Sequence[dict[str, Any]]
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    device: device
    settings: TrainConfig
    progress: Callable[[str, int, int], None]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Padded batches with labels."""
        chosen, size = self._chosen(), self.settings.batch
        for first in range(0, len(chosen), size):
            yield self._moved(self.collate(chosen[first : first + size]))
            self._tell(first + size, len(chosen))

    def samples(self) -> Iterator[dict[str, Tensor]]:
        """The rows one at a time, without padding and labels."""
        chosen = self._chosen()
        for done, row in enumerate(chosen, 1):
            batch = self.collate([row])
            real = batch["attention_mask"][0].bool()
            yield self._moved({name: batch[name][:, real] for name in ("input_ids", "attention_mask")})
            self._tell(done, len(chosen))

    def _chosen(self) -> list[dict[str, Any]]:
        count = min(len(self.rows), self.settings.init_batches * self.settings.batch)
        return random.Random(self.settings.seed).sample(list(self.rows), count)  # noqa: S311 - no secret

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _tell(self, done: int, total: int) -> None:
        self.progress("look at rows to begin from", min(done, total), total)


def begin(base: nn.Module, config: LoraConfig, scheme: str, look: Look) -> PeftModel:
    """The base with a new adapter.

    Args:
        base: a model of transformers.
        config: of `adapter_config`.
        scheme: `TrainConfig.init`.
        look: for schemes that begin from data.

    Raises:
        PlanError, UnsupportedError, ConfigError: the adapter does not fit the base, or cannot begin so.
        NonFiniteError: data, weights or gradients hold NaN or infinity.
        AdapterNotFoundError, AdapterFormatError, KeyMismatchError: LoftQ cannot read the original weights.
    """
    return _BEGIN.get(scheme, _plainly)(base, config, look)


def _plainly(base: nn.Module, config: LoraConfig, look: Look) -> PeftModel:  # noqa: ARG001
    return get_peft_model(base, config)


def _by_eva(base: nn.Module, config: LoraConfig, look: Look) -> PeftModel:
    model = get_peft_model(_placed(base, look), config, low_cpu_mem_usage=True)
    # every process looks at the same rows, so there is nothing to gather
    initialize_lora_eva_weights(
        model, look.batches(), gather_distributed_inputs=False, show_progress_bar=False
    )
    return model


def _by_corda(base: nn.Module, config: LoraConfig, look: Look) -> PeftModel:
    def run() -> None:
        for sample in look.samples():  # each call of a layer counts alike, and padding would count too
            base(**sample)

    preprocess_corda(_placed(base, look), config, run)
    return get_peft_model(base, config)


def _by_lora_ga(base: nn.Module, config: LoraConfig, look: Look) -> PeftModel:
    def step() -> None:
        for batch in look.batches():
            base(**batch).loss.backward()

    preprocess_loraga(_placed(base, look), config, step)
    return get_peft_model(base, config)


def _by_loftq(base: nn.Module, config: LoraConfig, look: Look) -> PeftModel:
    model = get_peft_model(base, config)
    total = len(model.base_model.registry.layers)
    done = 0

    def fitted(_model: nn.Module, _path: str) -> bool:
        nonlocal done
        done += 1
        look.progress("fit what 4 bits took", done, total)
        return True

    replace_lora_weights_loftq(model, callback=fitted, show_progress_bar=False)
    look.progress("fit what 4 bits took", total, total)
    return model


_BEGIN: Mapping[str, Callable[[nn.Module, LoraConfig, Look], PeftModel]] = {
    "eva": _by_eva,
    "corda": _by_corda,
    "lora_ga": _by_lora_ga,
    "loftq": _by_loftq,
}


def _placed(base: nn.Module, look: Look) -> nn.Module:
    """The base where the run will be; a quantised one was loaded there."""
    return base if getattr(base, "is_quantized", False) else base.to(look.device)


def go_on(base: nn.Module, config: LoraConfig, checkpoint: Path) -> PeftModel:
    """The base with the adapter of a checkpoint; no scheme runs again.

    Raises:
        AdapterError: the checkpoint is damaged, or not of this base.
    """
    if not (checkpoint / RAW_NAME).exists():
        return PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    plain = replace(config, init_lora_weights=True, corda_config=None, lora_ga_config=None)
    return attach_raw(base, plain, checkpoint / RAW_NAME)
