"""transformers' Trainer for a run, and its settings."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorakit.config import TaskType
from lorakit.config.files import write_atomic
from lorakit.training.checkpoints import AdapterTrainerMixin
from lorakit.training.settings import SETTINGS_NAME, settings_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorakit.peft_model import PeftModel
    from lorakit.training.settings import TrainConfig


class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc] # transformers has no types
    """Trains a `PeftModel`."""


class Told(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Passes on how far the training is."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """After each step."""
        if state.is_world_process_zero:
            self._progress("train", state.global_step, state.max_steps)


class Noted(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Puts the settings of the run into each checkpoint."""

    def __init__(self, settings: TrainConfig) -> None:
        self._settings = settings

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """After each checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_atomic(folder / SETTINGS_NAME, settings_bytes(self._settings))


def arguments_for(settings: TrainConfig, rows: int, *, evaluates: bool) -> TrainingArguments:
    """The Trainer's own settings."""
    steps = settings.max_steps or math.ceil(
        settings.epochs * math.ceil(rows / (settings.batch * settings.accumulation * world_size()))
    )
    optimizers = {
        "adamw": "adamw_torch",
        "adamw_8bit": "adamw_bnb_8bit",
        "sgd": "sgd",
        "adafactor": "adafactor",
    }
    return TrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        optim=optimizers[settings.optimizer],
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        eval_strategy=("steps" if settings.eval_steps else "epoch") if evaluates else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps" if settings.save_steps else "epoch",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.keep,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )


def world_size() -> int:
    """How many processes train together, as torchrun says it."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def trainer_for(model: PeftModel, arguments: TrainingArguments, **parts: Any) -> AdapterTrainer:
    """A trainer that shows nothing by itself."""
    trainer = AdapterTrainer(model=model, args=arguments, **parts)
    base = model.get_base_model()
    takes_any = any(
        item.kind is item.VAR_KEYWORD for item in inspect.signature(base.forward).parameters.values()
    )
    # a classifier's loss is a mean over its batch, whatever arguments it takes
    counts = takes_any and model.active_peft_config.task_type == TaskType.CAUSAL_LM
    trainer.model_accepts_loss_kwargs = counts
    for callback in ("PrinterCallback", "ProgressCallback"):
        found = next(
            (item for item in trainer.callback_handler.callbacks if type(item).__name__ == callback), None
        )
        if found is not None:
            trainer.remove_callback(found)
    return trainer
