"""`train`: from rows to an adapter."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from lorakit.config import strict_json
from lorakit.config.files import write_atomic
from lorakit.errors import ConfigError, UnsupportedError
from lorakit.training.beginning import Look, adapter_config, begin, go_on
from lorakit.training.checkpoints import is_finished
from lorakit.training.encoding import Collator, Encoded, encode_rows
from lorakit.training.models import enable_checkpointing, load_base, load_tokenizer, longest, pad_token
from lorakit.training.plot import plot_losses
from lorakit.training.rows import CLASSES, hold_out, kind_of_rows, labels_of, read_rows
from lorakit.training.settings import check_same_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorakit.peft_model import PeftModel
    from lorakit.training.rows import Kind, Row
    from lorakit.training.settings import TrainConfig

REPORT, PICTURE = "training.json", "loss.png"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        output: folder of the adapter.
        task: what was trained.
        kind: of the rows.
        rows, eval_rows: how many were trained on, and judged by.
        labels: of a classifier, in the order of its outputs.
        base_parameters, trainable_parameters: numbers of parameters.
        steps: of the optimizer, in all.
        resumed_from: the step of the checkpoint that the run went on from, or None.
        losses: (step, loss), the mean of the steps since the one before.
        evaluations: (step, loss) of the rows to judge by.
        accuracies: (step, share of right labels) of them, for a classifier.
        seconds: that the training took.
        picture: of the losses; None without matplotlib.
        notes: what should be known.
    """

    output: str
    task: str
    kind: str
    rows: int
    eval_rows: int
    labels: tuple[str | int, ...]
    base_parameters: int
    trainable_parameters: int
    steps: int
    resumed_from: int | None
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    accuracies: tuple[tuple[int, float], ...]
    seconds: float
    picture: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    kind: Kind
    train: list[Row]
    judged: list[Row]
    labels: tuple[str | int, ...]


def train(
    settings: TrainConfig,
    *,
    rows: Sequence[Row] | None = None,
    eval_rows: Sequence[Row] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,  # noqa: ARG005
) -> TrainResult:
    """Train an adapter on rows, on transformers' Trainer, and save it.

    The output folder gets the adapter, `training.json` (settings and result), `loss.png` if matplotlib is installed, and
    checkpoints. A checkpoint holds the adapter and the state of optimizer, schedule and random numbers, never the base; a
    run that is resumed goes on bit for bit. Under `torchrun` or `accelerate launch` all processes train together.

    Args:
        settings: of the run.
        rows: in place of the file `settings.data`.
        eval_rows: in place of the file `settings.eval_data`.
        resume: go on from the last checkpoint in the output folder.
        overwrite: replace an adapter in the output folder, and remove the checkpoints of another run there.
        progress: is called with (what, done, total).

    Raises:
        AdapterNotFoundError, AdapterFormatError: the model or a file of rows is not there, or cannot be read.
        ConfigError: rows are of no kind or of several, the output folder is in use, or the model cannot do the task.
        PlanError: the adapter does not fit the model.
        UnsupportedError: a package is missing that the run needs, or accelerate is to split the base (FSDP, DeepSpeed).
        OSError: the disk refused; checkpoints that were finished are whole.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise UnsupportedError("training needs accelerate: pip install 'lorakit[train]'")
    _check_launch()
    output = Path(settings.output).expanduser()
    settings = replace(settings, output=str(output))
    checkpoint = _checked_output(output, resume=resume, overwrite=overwrite)
    if checkpoint is not None:
        check_same_adapter(settings, checkpoint)
    data = _data(settings, rows, eval_rows)
    tokenizer = load_tokenizer(settings.model)
    most = longest(settings, tokenizer)
    train_set, judged = (
        encode_rows(part, data.kind, tokenizer, most, data.labels, progress) if part else Encoded([], ())
        for part in (data.train, data.judged)
    )

    from lorakit.training.trainer import Noted, Told, arguments_for, trainer_for

    arguments = arguments_for(settings, len(train_set.rows), evaluates=bool(judged.rows))
    collate = Collator(pad_token(tokenizer), data.kind, most)
    look = Look(train_set.rows, collate, arguments.device, settings, progress)
    model = _model(settings, data, pad_token(tokenizer), look, checkpoint)
    if arguments.should_save and overwrite and not resume:
        _remove_checkpoints(output)
    trainer = trainer_for(
        model,
        arguments,
        train_dataset=train_set.rows,
        eval_dataset=judged.rows or None,
        data_collator=collate,
        compute_metrics=_accuracy if data.kind is CLASSES else None,
        callbacks=[Told(progress), Noted(settings)],
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = _result(trainer, model, data, output, seconds=time.perf_counter() - started)
    result = replace(
        result,
        rows=len(train_set.rows),
        eval_rows=len(judged.rows),
        resumed_from=None if checkpoint is None else step_of(checkpoint),
        notes=(*train_set.notes, *judged.notes),
    )
    if not arguments.should_save:
        return result
    model.save_pretrained(output)
    return _reported(result, settings, output)


def _check_launch() -> None:
    """Refuse a launch that splits the base over processes: adapters on split weights are not tested."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "").lower() in {"1", "true", "yes"}:
            raise UnsupportedError(
                f"accelerate is set to {name}, which splits the base over processes; each process has to hold it whole: "
                "launch with torchrun or accelerate launch --multi_gpu, and set load_in_4bit where it does not fit"
            )


def _model(settings: TrainConfig, data: _Data, pad: int, look: Look, checkpoint: Path | None) -> PeftModel:
    """The base with the adapter, as it begins or as a checkpoint has it."""
    base = load_base(settings, data.kind.task, data.labels, pad)
    config = adapter_config(settings, data.kind.task)
    if checkpoint is None:
        model = begin(base, config, settings.init, look)
    else:
        model = go_on(base, config, checkpoint)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _result(trainer: Any, model: PeftModel, data: _Data, output: Path, *, seconds: float) -> TrainResult:
    """What the trainer and the model say of a run."""
    trainable, total = model.get_nb_trainable_parameters()
    history = trainer.state.log_history
    return TrainResult(
        output=str(output),
        task=data.kind.task.value,
        kind=data.kind.name,
        rows=len(data.train),
        eval_rows=len(data.judged),
        labels=data.labels,
        base_parameters=total - trainable,
        trainable_parameters=trainable,
        steps=trainer.state.global_step,
        resumed_from=None,
        losses=_logged(history, "loss"),
        evaluations=_logged(history, "eval_loss"),
        accuracies=_logged(history, "eval_accuracy"),
        seconds=seconds,
        picture=str(output / PICTURE),
        notes=(),
    )


def _reported(result: TrainResult, settings: TrainConfig, output: Path) -> TrainResult:
    """Write the picture and the report."""
    if not plot_losses(result.losses, result.evaluations, output / PICTURE):
        result = replace(
            result, picture=None, notes=(*result.notes, "matplotlib is not installed: no picture")
        )
    content = {"settings": asdict(settings), "result": asdict(result)}
    write_atomic(output / REPORT, strict_json.dumps(content))
    return result


def _data(settings: TrainConfig, rows: Sequence[Row] | None, eval_rows: Sequence[Row] | None) -> _Data:
    """Rows of one kind to train on, and to judge by."""
    if (rows is None) == (settings.data is None):
        raise ConfigError("data: wanted a file of rows, or rows, and not both")
    where = settings.data or "rows"
    found = read_rows(settings.data) if settings.data is not None else list(rows or ())
    if not found:
        raise ConfigError("rows: there are none")
    kind = kind_of_rows(found, where, settings.task)
    if settings.eval_data is not None or eval_rows is not None:
        judged = read_rows(settings.eval_data) if settings.eval_data is not None else list(eval_rows or ())
        if judged and kind_of_rows(judged, settings.eval_data or "eval_rows", kind.task.value) is not kind:
            raise ConfigError(
                f"{settings.eval_data or 'eval_rows'}: rows of another kind than the {kind.name} of {where}"
            )
    else:
        found, judged = hold_out(found, settings.eval_share, settings.seed)
    labels = labels_of(found, judged) if kind is CLASSES else ()
    return _Data(kind, found, judged, labels)


def _checked_output(output: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if one is asked for."""
    checkpoint = last_checkpoint(output)
    if resume:
        if checkpoint is None:
            raise ConfigError(f"{output}: no checkpoint to resume from; leave out resume (--resume) to begin")
        return checkpoint
    there = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (output / name).exists()]
    if (there or checkpoint is not None) and not overwrite:
        what = "an adapter" if there else "checkpoints"
        raise ConfigError(
            f"{output}: {what} of an earlier run there; choose another folder, go on with resume=True (--resume), or pass "
            "overwrite=True (--overwrite)"
        )
    return None


def _checkpoints(output: Path) -> list[Path]:
    """The finished ones."""
    if not output.is_dir():
        return []
    return [path for path in output.iterdir() if _CHECKPOINT.fullmatch(path.name) and is_finished(path)]


def last_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in an output folder that a run would be resumed from."""
    return max(_checkpoints(Path(output).expanduser()), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def _remove_checkpoints(output: Path) -> None:
    for path in output.iterdir() if output.is_dir() else ():
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _logged(history: Sequence[dict[str, Any]], name: str) -> tuple[tuple[int, float], ...]:
    return tuple((entry["step"], float(entry[name])) for entry in history if name in entry)


def _accuracy(judged: Any) -> dict[str, float]:
    right = judged.predictions.argmax(axis=-1) == judged.label_ids
    return {"accuracy": float(right.mean())}
