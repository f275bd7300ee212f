"""transformers' Trainer for our models: its checkpoints hold the adapter and not the base, and are resumed from it."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorakit.checkpoint.reading import open_adapter
from lorakit.config import TaskType
from lorakit.init.registry import TAKES_OFF
from lorakit.state_dict import set_peft_model_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorakit.peft_model import PeftModel
    from lorakit.training.settings import TrainConfig

RAW_NAME = "trainer_adapter.safetensors"
"""The adapter as it is in memory, where the adapter file has it in another form (`lorakit.exporting`)."""


class AdapterTrainer(Trainer):  # type: ignore[misc] # transformers has no types
    """Trains a `PeftModel`; a checkpoint is an adapter folder with the Trainer's own state beside it."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder)
        if takes_off(model):
            save_file(raw_state(model), folder / RAW_NAME)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        held = self.accelerator.unwrap_model(model if model is not None else self.model)
        if takes_off(held):
            held.load_state_dict(load_file(folder / RAW_NAME), strict=False)
        else:
            set_peft_model_state_dict(held, open_adapter(folder).load())


def takes_off(model: PeftModel) -> bool:
    """Whether the adapter takes its beginning off the base, so that its file is not what is in memory."""
    return str(model.active_peft_config.init_lora_weights) in TAKES_OFF


def raw_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained tensors of a model and what the adapter takes off the base, by their names in its state dict."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in trained or ".lora_offset." in name
    }


class Told(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Passes on how far the training is."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """After each step."""
        if state.is_world_process_zero:
            self._progress("train", state.global_step, state.max_steps)


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
    """A trainer of a model that may be quantised."""
    with _known_to_carry_adapters(model):
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


@contextmanager
def _known_to_carry_adapters(model: PeftModel) -> Iterator[None]:
    """Let the Trainer see that a quantised base carries adapters: it knows PEFT's class alone, and this mark."""
    base: Any = model.get_base_model()
    if not getattr(base, "is_quantized", False):
        yield
        return
    base._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del base._hf_peft_config_loaded
