"""Checkpoints of transformers' Trainer that hold the adapter and not the base, for any Trainer: a mixin.

Beside the adapter's files a checkpoint has the Trainer's own: optimizer, schedule, random numbers, and, written last, its
state.
"""

from __future__ import annotations

import errno
import inspect
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorakit.api import get_peft_model
from lorakit.checkpoint.keys import from_file_key
from lorakit.checkpoint.reading import open_adapter
from lorakit.errors import KeyMismatchError
from lorakit.exporting import offsets_of
from lorakit.layers.varied import Offset
from lorakit.peft_model import PeftModel
from lorakit.saving import save_adapters
from lorakit.state_dict import registry_of, set_peft_model_state_dict
from lorakit.surgery import find_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from lorakit.configs import LoraConfig

RAW_NAME = "trainer_adapter.safetensors"
"""The adapter as it is in memory, where the adapter file has it in another form (`lorakit.exporting`)."""
_STATE_NAME = "trainer_state.json"
_TORCH_WRITES = re.compile("inline_container|iostream error")
"""What torch says when it cannot write a file."""


class AdapterTrainerMixin:
    """Put before a transformers Trainer, or one of TRL's, it keeps the adapter alone in checkpoints.

    `class MyTrainer(AdapterTrainerMixin, Trainer)`. A checkpoint is an adapter folder, which loads like any other, with
    the Trainer's own state beside it; resuming and `load_best_model_at_end` read it. The Trainer by itself knows PEFT's
    class alone: it writes the base into each checkpoint, fails there where weights are tied, refuses quantised bases, and
    does not see which columns and labels a base takes. What goes wrong while a checkpoint is written leaves those before.

    The model is a `PeftModel`, or one that adapters were injected into, such as `peft_model.get_base_model()`, which
    trainers want that replace a model's forward (TRL's `SFTTrainer`).

    Raises:
        AdapterNameError: the model carries no adapter.
    """

    args: Any
    accelerator: Any
    model: Any
    state: Any
    _signature_columns: Any

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with _known_to_carry_adapters(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg] # the Trainer's
        registry, _ = registry_of(self._own())
        self._look_into(registry.model)

    def _look_into(self, base: nn.Module) -> None:
        """Learn from the base what the Trainer looked for in the class of the model."""
        from transformers.utils import can_return_loss, find_labels

        if self.args.label_names is None:
            self.label_names = find_labels(type(base))
            self.can_return_loss = can_return_loss(type(base))
        self._base_columns = [*inspect.signature(base.forward).parameters, *self.label_names]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc] # the Trainer's
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._base_columns]))

    def _own(self) -> nn.Module:
        """The model without what the Trainer puts around it."""
        found: nn.Module = self.accelerator.unwrap_model(self.model)
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        if not self.args.should_save:
            return
        folder, model = Path(output_dir or self.args.output_dir), self._own()
        registry, _ = registry_of(model)
        save_adapters(registry, folder)
        if any(offsets_of(registry, name) for name in registry.active):
            save_file(_raw_state(model), folder / RAW_NAME)
        tokenizer = getattr(self, "processing_class", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        held = self._own() if model is None else self.accelerator.unwrap_model(model)
        if (folder / RAW_NAME).exists():
            _take_raw(held, folder / RAW_NAME)
            return
        registry, prefix = registry_of(held)
        for name in registry.configs:
            tensors = open_adapter(folder if name == "default" else folder / name).load()
            own = {prefix + from_file_key(key): tensor for key, tensor in tensors.items()}
            set_peft_model_state_dict(held, own, name)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        parent: str = self._get_output_dir(trial=trial)  # type: ignore[attr-defined] # the Trainer's
        folder = Path(parent) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc] # the Trainer's
        except BaseException as error:
            if self.args.should_save and not is_finished(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)) or _TORCH_WRITES.search(str(error)):
                raise _refused(error, folder) from error
            raise


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole: the Trainer writes its state last."""
    try:
        json.loads((checkpoint / _STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _refused(error: BaseException, folder: Path) -> OSError:
    """What the disk says to a checkpoint; torch and safetensors hide it in errors of their own."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        full = shutil.disk_usage(folder.parent).free < 1 << 20 or "os error 28" in str(error)
        number = errno.ENOSPC if full else errno.EIO
    what = error.strerror if isinstance(error, OSError) and error.strerror else None
    what = what or ("No space left on device" if number == errno.ENOSPC else str(error).splitlines()[0])
    return OSError(
        number, f"{what}; the checkpoints before it are whole, and the run can go on from them", str(folder)
    )


# ---- adapters whose file is not what is in memory -------------------------------------------------------------


def _raw_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors of a model and what adapters take off the base, by their names in its state dict."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in trained or ".lora_offset." in name
    }


def _take_raw(model: nn.Module, path: Path) -> None:
    tensors = load_file(path)
    own = _raw_state(model)
    wrong = [
        f"{name}: found {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if wrong or own.keys() != tensors.keys():
        missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        raise KeyMismatchError(
            str(path), missing=sorted(missing), unexpected=sorted(unexpected), mismatched=sorted(wrong)
        )
    model.load_state_dict(tensors, strict=False)


def attach_raw(base: nn.Module, config: LoraConfig, path: Path) -> PeftModel:
    """The base with an adapter that was written as it was in memory, what it takes off the base with it.

    Args:
        base: a model of transformers.
        config: of the adapter, without the scheme that it began by.
        path: a file of that name in a checkpoint.

    Raises:
        KeyMismatchError: it is not of this base and config.
    """
    model = get_peft_model(base, config)
    registry, tensors = model.base_model.registry, load_file(path)
    for place, layer in registry.layers.items():
        stem = f"base_model.model.{place}.lora_offset.default."
        if f"{stem}A" in tensors and f"{stem}B" in tensors:
            A, B = (tensors[stem + part].to(layer.stored("default").A.device) for part in "AB")
            layer.hold_offset("default", Offset(A, B, float(layer.scaling["default"])))
    registry.set_active(registry.active)
    _take_raw(model, path)
    return model


# ---- quantised bases ------------------------------------------------------------------------------------------


@contextmanager
def _known_to_carry_adapters(model: Any) -> Iterator[None]:
    """Let the Trainer see that a quantised base carries adapters: it knows PEFT's class alone, and this mark."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(base, "is_quantized", False) or find_registry(base) is None:
        yield
        return
    base._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del base._hf_peft_config_loaded
