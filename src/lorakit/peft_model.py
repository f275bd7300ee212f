"""`PeftModel`: what users hold. A model with adapters, and saving and loading them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from lorakit.config import LoraConfig, TaskType
from lorakit.errors import AdapterStateError, UnsupportedError
from lorakit.later import Later
from lorakit.putting import put_on
from lorakit.tuner import LoraModel, check_bare

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from lorakit import loading, saving, status, surgery
    from lorakit.checkpoint import hub
    from lorakit.loading import LoadReport
    from lorakit.status import TunerLayerStatus, TunerModelStatus
    from lorakit.surgery import AdapterRegistry
else:
    hub = Later("lorakit.checkpoint.hub", globals())
    loading = Later("lorakit.loading", globals())
    saving = Later("lorakit.saving", globals())
    status = Later("lorakit.status", globals())
    surgery = Later("lorakit.surgery", globals())

_CLASSES: dict[str, type[PeftModel]] = {}


def _knows_checkpointing(module: nn.Module) -> bool:
    """Whether a module says if it is checkpointed; to ask one that does not costs ten times as much."""
    return "gradient_checkpointing" in module.__dict__ or hasattr(type(module), "gradient_checkpointing")


class PeftModel(nn.Module):
    """A model with LoRA adapters on it.

    Calling it calls the model; attributes that it does not have itself are those of the `LoraModel` and of the
    model. The model is changed in place; `unload()` gives it back as it was.

    Args:
        model: any module without adapters.
        peft_config: the first adapter's config; it is copied, not kept.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: keep adapters of a half-precision base in fp32.

    Raises:
        ConfigError, UnsupportedError, PlanError, AdapterNameError, AdapterStateError: the model was not touched.
    """

    task_type: ClassVar[TaskType | None] = None
    base_model: LoraModel

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.task_type is not None:
            _CLASSES.setdefault(cls.task_type.value, cls)

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        check_bare(model)
        if (
            self.task_type is not None
            and isinstance(peft_config, LoraConfig)
            and peft_config.task_type is None
        ):
            peft_config = replace(peft_config, task_type=self.task_type)
        self._adopt(put_on(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype))

    def _adopt(self, registry: AdapterRegistry) -> None:
        self.base_model = LoraModel.of(registry)
        modules = surgery.base_modules(registry.model)
        knowing = (module for module in modules if _knows_checkpointing(module))
        if any(getattr(module, "gradient_checkpointing", False) is True for module in knowing):
            self._let_inputs_require_grad()

    @classmethod
    def of(cls, registry: AdapterRegistry) -> PeftModel:
        """The `PeftModel` for the task of a model's first adapter, around a model that carries it already."""
        config = next(iter(registry.configs.values()))
        kind = cls if cls.task_type is not None else _CLASSES.get(config.task_type or "", cls)
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        made._adopt(registry)
        return made

    # ---- as a module --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; takes `adapter_names`, see `LoraModel.forward`."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own `generate`; takes `adapter_names`, see `LoraModel.generate`."""
        return self.base_model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet: asking it would ask for it again
                raise
            return getattr(self.base_model, name)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; refused while adapters are merged.

        Raises:
            AdapterStateError: adapters are merged.
        """
        self.base_model.registry.check_unmerged("load_state_dict()")
        return super().load_state_dict(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable it on the model, and let its inputs want gradients: a frozen embedding gives none."""
        inner: Any = self.get_base_model()
        if hasattr(inner, "activation_checkpointing_enable"):  # transformers' name for it since 5.20
            inner.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self._let_inputs_require_grad()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def _let_inputs_require_grad(self) -> None:
        self.get_base_model().enable_input_require_grads()  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The model that was wrapped; its modules still carry the adapters."""
        return self.base_model.model

    # ---- adapters -----------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The config of each adapter, by name."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter.

        Raises:
            AdapterStateError: none is active.
        """
        if not self.active_adapters:
            raise AdapterStateError("no adapter is active; call set_adapter()")
        return self.active_adapters[0]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,  # noqa: ARG002 - always lean here
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put another adapter on the model. It is not active until `set_adapter`, unless it is the only one.

        Raises:
            ConfigError, UnsupportedError, PlanError, AdapterNameError: the model was not touched.
        """
        put_on(
            self.get_base_model(), peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, active; see `LoraModel.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; see `LoraModel.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the base model acts alone: its output bit for bit."""
        before = self.base_model.registry.enabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.base_model.registry.set_enabled(enabled=before)

    # ---- reports ------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, each counted once."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See `lorakit.get_layer_status`."""
        return status.get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See `lorakit.get_model_status`."""
        return status.get_model_status(self)

    # ---- files --------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        **unsupported: Any,
    ) -> None:
        """Write adapters to `adapter_config.json` and `adapter_model.safetensors`, atomically.

        The adapter "default" goes into `save_directory`, every other into a subfolder of its name. Needs no
        network. Whatever fails, an adapter that was there before is still there whole.

        Args:
            save_directory: made if it is not there.
            safe_serialization: must be True: pickled files are not written.
            selected_adapters: names; default all.
            save_embedding_layers: True puts the base's embeddings into the file too (for a vocabulary that
                grew); "auto" and False do not.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: a folder with the adapters as they began, to be taken off what they
                add now. Adapters that were begun here by a scheme such as PiSSA need none: they remember it, and are
                always written as plain LoRA for the untouched base, at twice the rank unless one of A and B is as it was.
            **unsupported: refused by name.

        Raises:
            AdapterNameError, NonFiniteError, AdapterFormatError, UnsupportedError, OSError.
        """
        given = sorted(name for name, value in unsupported.items() if value is not None)
        if given:
            raise UnsupportedError(f"save_pretrained() does not take {given}")
        if not safe_serialization:
            raise UnsupportedError("lorakit writes safetensors only; leave safe_serialization=True")
        if is_main_process:
            saving.save_adapters(
                self.base_model.registry,
                save_directory,
                selected_adapters,
                with_embeddings=save_embedding_layers is True,
                began_as=path_initial_model_for_weight_conversion,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save all adapters and upload them to a hub repository; returns its address."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push_folder(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> PeftModel:
        """Load an adapter onto a model.

        Args:
            model: the base model, without adapters; changed in place.
            model_id: a folder, or a hub repository where no such path exists.
            adapter_name: the name to give it.
            is_trainable: let its parameters want gradients; otherwise the model is put in eval mode.
            config: takes the place of the config file.
            autocast_adapter_dtype: keep adapters of a half-precision base in fp32.
            **options: as of `load_adapter`.

        Raises:
            As `load_adapter`; the model is then as it was.
        """
        check_bare(model)
        how, where = loading.sort_options(
            options, config=config, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype
        )
        registry, _ = loading.load_onto(model, model_id, adapter_name, how, where)
        made = cls.of(registry)
        if not is_trainable:
            made.eval()
        return made

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        *,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        replace: bool = False,
        **options: Any,
    ) -> LoadReport:
        """Load another adapter. It is not active until `set_adapter`, unless it is the only one.

        Config and header are checked before anything is touched, tensors take their place as they are read;
        no initialiser runs and the cost does not depend on the adapters already there.

        Args:
            model_id: a folder, or a hub repository where no such path exists.
            adapter_name: the name to give it.
            is_trainable: let its parameters want gradients; otherwise the model is put in eval mode.
            config: takes the place of the config file.
            autocast_adapter_dtype: keep adapters of a half-precision base in fp32.
            key_mapping: regular expressions and replacements, applied to the file's keys without their prefix.
            strict: False passes over missing and unexpected keys and lists them in the report.
            replace: take the place of an adapter of this name.
            **options: `allow_base_weights`, `allow_pickle_bin` (see `lorakit.loading.LoadOptions`); `subfolder`,
                `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` (as in huggingface_hub);
                `low_cpu_mem_usage` is accepted and always so.

        Raises:
            AdapterNotFoundError, AdapterFormatError, ConfigError, PlanError, KeyMismatchError, NonFiniteError,
            AdapterNameError, AdapterStateError, UnsupportedError: the model is as it was.
        """
        how, where = loading.sort_options(
            options,
            config=config,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            key_mapping=key_mapping,
            strict=strict,
            replace=replace,
        )
        _, report = loading.load_onto(self.get_base_model(), model_id, adapter_name, how, where)
        if self.training and not is_trainable:  # the walk over all adapters is for the first time only
            self.eval()
        return report
