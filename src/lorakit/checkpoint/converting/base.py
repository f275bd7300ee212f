"""What a conversion asks of a base: its config and the names of its modules. No weight is read, no model built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.converting.input import read_object
from lorakit.checkpoint.files import open_regular, read_up_to
from lorakit.checkpoint.header import ALL_DTYPES, parse_header
from lorakit.checkpoint.hub import resolve_model_config
from lorakit.errors import AdapterNotFoundError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    import os
    from pathlib import Path

_MAX_CONFIG = 16 << 20
_CONFIG = "config.json"
_PIPELINE = "model_index.json"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The models of a pipeline that adapters are made for, by the names of diffusers."""
_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


@dataclass(frozen=True)
class Base:
    """A folder of a model or of a pipeline.

    Attributes:
        folder: the one that was named.
        config: of a model, its `config.json`; empty for a pipeline.
        modules: the modules with a weight, by component; "" for a model that is none of a pipeline. Empty where there
            are no safetensors files.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, tuple[str, ...]]

    def heads(self, path: str) -> int:
        """How many attention heads the rows of a `q_proj` or `k_proj` belong to.

        Raises:
            ConfigError: the config does not say.
        """
        key = "num_attention_heads"
        if path.endswith("k_proj") and self.config.get("num_key_value_heads") is not None:
            key = "num_key_value_heads"
        found = self.config.get(key)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ConfigError(f"{self.folder / _CONFIG}: {key}: {found!r}, wanted the number of heads")
        return found

    def require_untied(self, what: str) -> None:
        """Refuse an embedding or a head that shares its weight with the other.

        Raises:
            UnsupportedError: they are one weight, or the config does not say.
        """
        if self.config.get("tie_word_embeddings") is not False:
            raise UnsupportedError(
                f"{what}: {self.folder / _CONFIG} does not say tie_word_embeddings: false, so input and output may share "
                "a weight, of which PEFT adapts one side and other tools both; leave the module out of the adapter"
            )


def open_base(path: str | os.PathLike[str]) -> Base:
    """Read the configs and the headers of a folder: of a model, of a component of a pipeline, or of a pipeline.

    Of a repository of the hub, that of a model, the config alone is downloaded.

    Raises:
        AdapterNotFoundError: there is no such folder, or no config in it.
        AdapterFormatError: a file is damaged.
    """
    folder = resolve_model_config(path)
    if not folder.is_dir():
        raise AdapterNotFoundError(f"{folder}: not a folder; a base is a folder with {_CONFIG}")
    if (folder / _PIPELINE).is_file():
        parts = [name for name in COMPONENTS if (folder / name / _CONFIG).is_file()]
        return Base(folder, {}, {name: _modules(folder / name) for name in parts})
    if not (folder / _CONFIG).is_file():
        raise AdapterNotFoundError(f"{folder}: neither {_CONFIG} nor {_PIPELINE} in this folder")
    config = read_object(folder, _CONFIG, _MAX_CONFIG)
    modules = _modules(folder)
    return Base(folder, config, {_component(config): modules} if modules else {})


def required(base: Base | None, why: str) -> Base:
    """The base, where one is needed.

    Raises:
        ConfigError: none was named, or it is a pipeline.
    """
    if base is None:
        raise ConfigError(
            f"{why}; name the base model's folder (its config.json is enough): base=... (--base)"
        )
    if not base.config:
        raise ConfigError(f"{why}; {base.folder} is a pipeline, name the folder of a model with config.json")
    return base


def _component(config: dict[str, Any]) -> str:
    names = config.get("architectures") or [config.get("_class_name")]
    return _CLASSES.get(str(names[0]) if isinstance(names, list) and names else "", "")


def _modules(folder: Path) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_regular(folder, file.name) as (descriptor, status):
            read = parse_header(partial(read_up_to, descriptor), status.st_size, str(file), ALL_DTYPES)
        found.update(
            dict.fromkeys(name.removesuffix(".weight") for name in read.tensors if name.endswith(".weight"))
        )
    return tuple(found)
