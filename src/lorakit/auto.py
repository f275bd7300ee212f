"""`AutoPeftModel*`: from an adapter folder to a base model with the adapter on it.

A config chooses only among the classes in a fixed table; nothing is imported by a name that a file holds. With
`trust_remote_code=True` the base must be one that the caller named, in `allow_base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.config import LoraConfig, TaskType
from lorakit.errors import ConfigError, UnsupportedError
from lorakit.loading import HubOptions, LoadOptions, read_adapter
from lorakit.tasks import PeftModel

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

    from torch import nn

_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """Loads the base model that an adapter's config names, and the adapter onto it."""

    task_type: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} has no instances; call {name}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        *,
        subfolder: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        strict: bool = True,
        allow_base_weights: bool = False,
        allow_base: Collection[str] = (),
        trust_remote_code: bool = False,
        **base_arguments: Any,
    ) -> PeftModel:
        """Load a base model and an adapter.

        Args:
            pretrained_model_name_or_path: the adapter: a folder, or a hub repository.
            adapter_name: the name to give it.
            is_trainable: let its parameters want gradients; otherwise the model is put in eval mode.
            config: takes the place of the adapter's config file.
            revision: of the adapter's repository; that of the base is in the config.
            subfolder: where in the repository or folder the adapter is.
            token: as in huggingface_hub.
            cache_dir: as in huggingface_hub.
            force_download: as in huggingface_hub.
            local_files_only: as in huggingface_hub.
            strict: False passes over missing and unexpected keys.
            allow_base_weights: accept embeddings that PEFT saves with an adapter whose vocabulary grew.
            allow_base: base models whose own code may run, with `trust_remote_code=True`.
            trust_remote_code: passed to transformers, for a base in `allow_base` only.
            **base_arguments: go to the base model's `from_pretrained` (`dtype`, `device_map` …).

        Raises:
            ConfigError: the config names no base model, or another task than this class's.
            UnsupportedError: transformers is not installed, or the base's code is not trusted by name.
            As `PeftModel.load_adapter` otherwise.
        """
        hub = HubOptions(subfolder, revision, token, cache_dir, force_download, local_files_only)
        _, found = read_adapter(pretrained_model_name_or_path, LoadOptions(config=config), hub)
        base = found.base_model_name_or_path
        if not base:
            raise ConfigError(f"{pretrained_model_name_or_path}: its config has no base_model_name_or_path")
        if trust_remote_code and base not in allow_base:
            raise UnsupportedError(
                f"the adapter names {base!r} as its base; to run that model's own code, pass "
                f"allow_base=[{base!r}] together with trust_remote_code=True"
            )
        shared = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        model = cls._auto_class(found).from_pretrained(
            base,
            revision=found.revision or "main",
            trust_remote_code=trust_remote_code,
            **{key: value for key, value in shared.items() if value},
            **base_arguments,
        )
        return PeftModel.from_pretrained(
            model,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            config,
            strict=strict,
            allow_base_weights=allow_base_weights,
            **hub.__dict__,
        )

    @classmethod
    def _auto_class(cls, config: LoraConfig) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise UnsupportedError(
                "loading a base model needs transformers: pip install transformers"
            ) from error
        task = cls.task_type or config.task_type
        if cls.task_type and config.task_type not in {None, cls.task_type}:
            raise ConfigError(
                f"task_type: {cls.__name__} loads {cls.task_type.value}, the adapter is for {config.task_type}"
            )
        if task is not None:
            return getattr(transformers, _AUTO_CLASSES[TaskType(task)])
        return _by_class_name(transformers, config)


def _by_class_name(transformers: Any, config: LoraConfig) -> type[nn.Module]:
    """The transformers model class that `auto_mapping` names, when that is what the name means."""
    name = (config.auto_mapping or {}).get("base_model_class")
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ConfigError(
            f"the config has no task_type and names the class {name!r}, which is no model class of transformers; "
            "load the base yourself and call PeftModel.from_pretrained(base, adapter)"
        )
    return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` for text generation."""

    task_type: ClassVar[TaskType | None] = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` for encoder-decoder models."""

    task_type: ClassVar[TaskType | None] = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` for text classification."""

    task_type: ClassVar[TaskType | None] = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` for labelling tokens."""

    task_type: ClassVar[TaskType | None] = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` for extractive question answering."""

    task_type: ClassVar[TaskType | None] = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` for embeddings."""

    task_type: ClassVar[TaskType | None] = TaskType.FEATURE_EXTRACTION
