"""What a training run is: every setting, its default and its check, and the YAML file that may hold them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.config import TaskType, checks, strict_json
from lorakit.config.files import read_small
from lorakit.config.suggest import NearNames
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    UnsupportedError,
    bullet_list,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from lorakit.config.checks import Check

INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "mica", "eva", "corda", "lora_ga", "loftq")
DTYPES = ("auto", "float32", "bfloat16")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "sgd")
SETTINGS_NAME = "settings.json"
"""The settings of a run, in each of its checkpoints."""
_MAX_YAML = 1 << 20
_OF_THE_ADAPTER = ("r", "alpha", "dropout", "targets", "modules_to_save", "init", "dora", "rslora")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; those without a default are needed.

    Args:
        model: folder of the base, or a repository of the hub.
        output: folder for the adapter, its checkpoints and the report.
        data: a JSONL file of rows: {"text"}, {"prompt", "completion"}, {"messages"}, or {"text", "label"}. Or a data set
            of the `datasets` package with such columns: a folder, or owner/name on the hub; ":split" may follow.
        eval_data: another one to judge by.
        eval_share: without `eval_data`, the share of the rows that is held out to judge by, from 0 to 0.5.
        task: "CAUSAL_LM" or "SEQ_CLS"; None reads it off the rows.
        r: rank.
        alpha: `lora_alpha`; None is twice the rank.
        dropout: of the adapter's input.
        targets: names of modules to adapt.
        modules_to_save: names of modules to train whole.
        init: how the adapter begins: "default", "gaussian" or "orthogonal"; from the weights, "pissa", "olora" or "mica";
            from rows, "eva", "corda" or "lora_ga"; from what 4 bits took from the weights, "loftq".
        init_batches: batches of training rows, drawn by the seed, that "eva", "corda" and "lora_ga" look at.
        dora: train magnitudes too (arXiv:2402.09353).
        rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        epochs: passes over the rows.
        max_steps: steps of the optimizer in all; None goes by `epochs`.
        batch: rows in a step, on each device.
        accumulation: batches whose gradients make one step.
        learning_rate: at its highest.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes), "adafactor" or "sgd".
        schedule: "linear", "cosine", "constant" or "constant_with_warmup".
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of the optimizer.
        max_grad_norm: gradients are scaled down to this norm.
        max_length: tokens of a row; longer ones are cut.
        dtype: "bfloat16" or "float32", that the base is loaded and computed in; "auto" is bfloat16 on a GPU that has it.
        load_in_4bit: quantise the base's linear layers to NF4 (bitsandbytes).
        gradient_checkpointing: compute activations again in backward.
        log_steps: steps between reports of the loss.
        eval_steps: steps between evaluations; None evaluates after each epoch.
        save_steps: steps between checkpoints; None saves one after each epoch.
        keep: how many checkpoints are kept.
        seed: of everything that is drawn.

    Raises:
        ConfigError: lists every setting with a wrong value.
    """

    model: str
    output: str
    data: str | None = None
    eval_data: str | None = None
    eval_share: float = 0.0
    task: str | None = None
    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()
    init: str = "default"
    init_batches: int = 16
    dora: bool = False
    rslora: bool = False
    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    dtype: str = "auto"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    keep: int = 2
    seed: int = 0

    _CHECKS: ClassVar[Mapping[str, Check]] = {
        "model": checks.text,
        "output": checks.text,
        "data": checks.optional(checks.text),
        "eval_data": checks.optional(checks.text),
        "eval_share": checks.a(
            "a number from 0 to 0.5", lambda value: checks.is_number(value) and 0 <= value <= 0.5
        ),
        "task": checks.optional(checks.one_of(TaskType.CAUSAL_LM.value, TaskType.SEQ_CLS.value)),
        "r": checks.rank,
        "alpha": checks.optional(checks.alpha),
        "dropout": checks.rate,
        "targets": checks.names,
        "modules_to_save": checks.names,
        "init": checks.one_of(*INITS),
        "init_batches": checks.rank,
        "dora": checks.flag,
        "rslora": checks.flag,
        "epochs": checks.positive,
        "max_steps": checks.optional(checks.rank),
        "batch": checks.rank,
        "accumulation": checks.rank,
        "learning_rate": checks.positive,
        "optimizer": checks.one_of(*OPTIMIZERS),
        "schedule": checks.one_of(*SCHEDULES),
        "warmup": checks.unit,
        "weight_decay": checks.amount,
        "max_grad_norm": checks.positive,
        "max_length": checks.a("an int of 2 or more", lambda value: checks.is_int(value) and value >= 2),
        "dtype": checks.one_of(*DTYPES),
        "load_in_4bit": checks.flag,
        "gradient_checkpointing": checks.flag,
        "log_steps": checks.rank,
        "eval_steps": checks.optional(checks.rank),
        "save_steps": checks.optional(checks.rank),
        "keep": checks.rank,
        "seed": checks.index,
    }

    def __post_init__(self) -> None:
        for name in ("targets", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, set)):
                object.__setattr__(self, name, tuple(value))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        found = checks.problems(values, self._CHECKS, ())
        found = found or list(self._contradictions())
        if found:
            raise ConfigError(bullet_list("training settings", found))

    def _contradictions(self) -> Iterator[str]:
        if self.eval_data is not None and self.eval_share:
            yield "eval_share: got a share beside eval_data, wanted one of the two"
        if self.init in {"corda", "lora_ga"} and self.load_in_4bit:
            yield (
                f"init: {self.init!r} begins from weights in full precision; leave out load_in_4bit, or begin by 'eva', "
                "'loftq' or 'pissa'"
            )
        if self.init == "loftq" and not self.load_in_4bit:
            yield "init: 'loftq' makes up for what 4 bits take from the weights; set load_in_4bit too"


def check_same_adapter(settings: TrainConfig, checkpoint: Path) -> None:
    """Make sure that a run that goes on has the adapter of the run before.

    Raises:
        ConfigError: lists the settings of the adapter that differ.
        AdapterFormatError: the settings in the checkpoint cannot be read.
    """
    path = checkpoint / SETTINGS_NAME
    if not path.exists():  # killed between the checkpoint and its settings; shapes are compared anyway
        return
    before = strict_json.loads(read_small(path), where=str(path))
    now = strict_json.loads(settings_bytes(settings), where="settings")
    wrong = [
        f"{name}: got {now[name]!r}, the run began with {before.get(name)!r}"
        for name in _OF_THE_ADAPTER
        if now[name] != before.get(name)
    ]
    if wrong:
        raise ConfigError(bullet_list(f"{checkpoint}: resuming keeps the adapter", wrong))


def settings_bytes(settings: TrainConfig) -> bytes:
    """The settings as JSON."""
    return strict_json.dumps({field.name: getattr(settings, field.name) for field in fields(settings)})


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a YAML file, by name; not yet checked against each other.

    Numbers such as 1e-4, which YAML takes for a text, are numbers here.

    Raises:
        AdapterNotFoundError: there is no such file.
        AdapterFormatError: it is no YAML mapping, or names something twice.
        ConfigError: it names what is no setting; lists all of them, with near names.
        UnsupportedError: PyYAML is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise AdapterNotFoundError(f"{file}: no such file; wanted a YAML file of training settings")
    if file.stat().st_size > _MAX_YAML:
        raise AdapterFormatError(f"{file}: more than {_MAX_YAML:,} bytes; not a file of training settings")
    content = _parsed(file)
    known = {field.name: field for field in fields(TrainConfig)}
    near = NearNames(known)
    wrong = [f"{name}: no such setting{near(str(name))}" for name in content if name not in known]
    if wrong:
        raise ConfigError(bullet_list(str(file), wrong, f"Settings are {', '.join(known)}."))
    return {
        name: _number(value) if _is_numeric(known[name].type) else value for name, value in content.items()
    }


def _parsed(file: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UnsupportedError("a YAML file needs PyYAML: pip install pyyaml") from error
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _named_twice(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())[:300]
        raise AdapterFormatError(f"{file}: not valid YAML: {place}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise AdapterFormatError(
            f"{file}: holds a {type(content).__name__}, wanted settings as `name: value`"
        )
    if twice:
        raise AdapterFormatError(f"{file}: {', '.join(twice)} given more than once; keep one of them")
    return content


def _named_twice(node: Any) -> list[str]:
    pairs = node.value if node is not None and node.id == "mapping" else []
    names = [key.value for key, _ in pairs]
    return sorted({name for name in names if names.count(name) > 1})


def _is_numeric(kind: object) -> bool:
    return str(kind).startswith("float")


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # for the checks to name
    return value
