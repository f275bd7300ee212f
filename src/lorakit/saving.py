"""From a model's adapters to files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.checkpoint.keys import to_file_key
from lorakit.checkpoint.writing import write_adapter
from lorakit.exporting import as_plain, offsets_in_file, offsets_of
from lorakit.fitting import embedding_weights
from lorakit.init.registry import REPLACES_BASE, initialiser_name
from lorakit.padding import file_entries
from lorakit.surgery import describe
from lorakit.surgery.paths import joined

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.surgery import AdapterRegistry


def save_adapters(
    registry: AdapterRegistry,
    folder: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    with_embeddings: bool = False,
    began_as: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write adapters (default: all): "default" into `folder`, every other into a subfolder of its name.

    Args:
        registry: the adapters of a model.
        folder: made if it is not there.
        names: which adapters.
        began_as: a folder with what the adapters were when they began, for those that do not remember it themselves: it
            is taken off what they add now.
        with_embeddings: put the base's input and output embeddings into the file too, as PEFT does for a
            vocabulary that grew.

    Raises:
        AdapterNameError: a name is unknown.
        AdapterStateError: numbers were written where a hot-swapped adapter has none; see `lorakit.padding`.
        NonFiniteError, AdapterFormatError: a tensor cannot be saved; files that were there are untouched.
        OSError: the disk refused; files that were there are untouched.
    """
    chosen = list(registry.configs if names is None else names)
    registry.check_known(chosen)
    written: list[Path] = []
    for name in chosen:
        entries, config = file_entries(registry, name), stored_config(registry, name)
        offsets = offsets_of(registry, name)
        if began_as is not None and not offsets:
            offsets = offsets_in_file(registry, name, entries, began_as)
        own, config = as_plain(registry, name, entries, config, offsets)
        tensors = {to_file_key(file_name): tensor for file_name, tensor in own.items()}
        if with_embeddings:
            tensors |= _embeddings(registry, name)
        target = Path(folder) if name == "default" else Path(folder) / name
        written += write_adapter(target, config.to_dict(), tensors, readme=_model_card(config))
    return written


def stored_config(registry: AdapterRegistry, name: str) -> LoraConfig:
    """The config as a file holds it: for inference, and with the base's class where no task names one."""
    config = registry.configs[name]
    mapping = config.auto_mapping
    if config.task_type is None:
        kind = type(registry.model)
        mapping = mapping or {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    stored = replace(config, inference_mode=True, auto_mapping=mapping)
    if initialiser_name(config.init_lora_weights) not in REPLACES_BASE:
        return stored
    # PEFT runs the scheme again when it loads a file that names it, on a base that has been changed already
    return replace(stored, init_lora_weights=True, loftq_config={})


def _embeddings(registry: AdapterRegistry, adapter: str) -> dict[str, Tensor]:
    """The base's own, without what is merged into them."""
    wanted = {id(weight) for weight in embedding_weights(registry.model)}
    found: dict[str, Tensor] = {}
    names = registry.names(adapter)
    for path, node in describe(registry.model).nodes.items():
        for attribute, parameter in node.module.named_parameters(recurse=False):
            if id(parameter) in wanted:
                own = parameter if node.layer is None else node.layer.original_weight
                found[to_file_key(names.parameter(joined(path, attribute)))] = own.detach()
    return found


def _model_card(config: LoraConfig) -> str:
    """The least that a hub page needs to know."""
    base = config.base_model_name_or_path
    header = ["---", "library_name: peft", "tags:", "- lora", "- lorakit"]
    header += [f"base_model: {base}"] if base and not Path(base).is_absolute() else []
    body = f"LoRA adapter, rank {config.r}, alpha {config.lora_alpha:g}" + (
        f", for `{base}`." if base else "."
    )
    return "\n".join([*header, "---", "", body, ""])
