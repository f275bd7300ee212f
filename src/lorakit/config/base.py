"""`PeftConfig`: what every adapter config can do: check itself, become a dict, be written and read.

Strict on values, tolerant of files: a wrong value is refused with everything else that is wrong, while a key that no
one here knows is kept in `extra` and written back unchanged. Writing never uses the network.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

from lorakit.config import checks
from lorakit.config.files import read_small, write_atomic
from lorakit.config.names import PeftType, TaskType
from lorakit.config.strict_json import dumps, loads
from lorakit.errors import AdapterNotFoundError, ConfigError, bullet_list

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "adapter_config.json"
REQUIRED_KEYS = ("peft_type", "r", "lora_alpha", "target_modules")

Resolver: TypeAlias = Callable[[str, "str | None", Mapping[str, Any]], Path]
_resolvers: list[Resolver] = []
_config_types: dict[str, type[PeftConfig]] = {}
_C = TypeVar("_C", bound="type[PeftConfig]")


def set_resolver(resolver: Resolver) -> None:
    """Say how a hub repository becomes a local folder; until then only local folders are found.

    Args:
        resolver: called as `resolver(repo_id, subfolder, hub_kwargs)`; returns the local folder that holds
            `adapter_config.json`, or raises `AdapterNotFoundError`.
    """
    _resolvers[:] = [resolver]


def register_config(peft_type: PeftType) -> Callable[[_C], _C]:
    """Class decorator: configs of this PEFT type are built as the decorated class."""

    def register(cls: _C) -> _C:
        _config_types[peft_type.value] = cls
        return cls

    return register


def _as_enum(kind: type[Enum]) -> Callable[[Any], Any]:
    return lambda value: kind(value) if isinstance(value, str) and value in kind.__members__ else value


@dataclass
class PeftConfig:
    """What all adapter configs have in common.

    Args:
        task_type: what the adapted model is used for, a `TaskType` or its name.
        peft_type: the adapter family; "LORA" is the only one.
        auto_mapping: names of the base model's class and library, for `AutoPeftModel`.
        peft_version: version of the library that wrote the file, kept as found.
        base_model_name_or_path: the base model the adapter was made for.
        revision: revision of the base model.
        inference_mode: whether the adapter is frozen.
        extra: keys of a file that have no meaning here; written back unchanged.

    Raises:
        ConfigError: lists every field with a wrong value.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    extra: dict[str, Any] = field(default_factory=dict, kw_only=True)

    _CHECKS: ClassVar[Mapping[str, checks.Check]] = checks.BASE
    _RULES: ClassVar[tuple[checks.Rule, ...]] = ()
    _CONVERT: ClassVar[Mapping[str, Callable[[Any], Any]]] = {
        "task_type": _as_enum(TaskType),
        "peft_type": _as_enum(PeftType),
    }
    _NOT_SAVED: ClassVar[frozenset[str]] = frozenset({"extra"})

    def __post_init__(self) -> None:
        self.validate()

    @property
    def is_prompt_learning(self) -> bool:
        """Always False: the adapter changes weights, not prompts."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always False, as `is_prompt_learning`."""
        return False

    def validate(self) -> None:
        """Check all fields again, after attributes were changed, and bring them to their usual types.

        Raises:
            ConfigError: lists every field with a wrong value.
        """
        values = self._converted({f.name: getattr(self, f.name) for f in fields(self)})
        found = checks.problems(values, self._CHECKS, self._RULES)
        clash = [] if found else sorted(set(self.extra) & (set(values) - {"extra"}))
        found += [f"extra: got the key {name!r}, wanted it as the field {name}" for name in clash]
        if found:
            raise ConfigError(bullet_list(type(self).__name__, found))
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values: sets as sorted lists, enums as names, and the `extra` keys among the rest."""
        names = [f.name for f in fields(self) if f.name not in self._NOT_SAVED]
        return {**{name: _plain(getattr(self, name)) for name in names}, **self.extra}

    @classmethod
    def from_dict(cls, data: object, *, where: str = "config", required: Collection[str] = ()) -> Self:
        """Build a config from the keys of `adapter_config.json`.

        Args:
            data: the parsed JSON object.
            where: what the data is from; it opens every message.
            required: keys that must be present. `REQUIRED_KEYS` are those of a file; `target_modules` may then be
                null only where `target_parameters` is set.

        Returns:
            The config class that `peft_type` names. Keys that are no fields land in `extra`, with a warning.

        Raises:
            ConfigError: lists every wrong value and every missing key.
        """
        if not isinstance(data, dict):
            raise ConfigError(checks.problem(where, data, "an object with the fields of a config"))
        kind = cls._class_for(data, where)
        names = {f.name for f in fields(kind)} - {"extra"}
        values = kind._converted({key: value for key, value in data.items() if key in names})
        extra = {key: value for key, value in data.items() if key not in names}
        found = [f"{key}: missing, wanted this key in the file" for key in required if key not in data]
        found += checks.problems(values | {"extra": extra}, kind._CHECKS, kind._RULES)
        untargeted = values.get("target_modules") is None and values.get("target_parameters") is None
        if "target_modules" in required and not found and untargeted:
            found.append(checks.problem("target_modules", None, "the names of the adapted modules"))
        if found:
            raise ConfigError(bullet_list(where, found))
        if extra:
            unknown = ", ".join(sorted(key[:80] for key in extra))
            warnings.warn(f"{where}: unknown keys, kept but without effect here: {unknown}", stacklevel=2)
        return cast("Self", kind(**values, extra=extra))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The JSON object of a config file, parsed strictly but not yet checked field by field.

        Raises:
            AdapterNotFoundError: there is no such file.
            AdapterFormatError: it is no regular file, larger than 1 MiB, or not unambiguous JSON.
            ConfigError: it is JSON, but not an object.
        """
        path = Path(path_json_file)
        data = loads(read_small(path), where=str(path))
        if not isinstance(data, dict):
            raise ConfigError(checks.problem(str(path), data, "an object with the fields of a config"))
        return data

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> Self:
        """Read `adapter_config.json` of a local folder or, where none has that name, of a hub repository.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's id.
            subfolder: folder inside it that holds the file.
            hub_kwargs: passed on to the hub download (`revision`, `token`, `cache_dir` ...).

        Raises:
            AdapterNotFoundError: no such folder or repository, or no config in it.
            AdapterFormatError: the file is damaged.
            ConfigError: a required key is missing or a value is wrong.
        """
        folder = _folder(os.fspath(pretrained_model_name_or_path), subfolder, hub_kwargs)
        path = folder / CONFIG_NAME
        return cls.from_dict(cls.from_json_file(path), where=str(path), required=REQUIRED_KEYS)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Write `adapter_config.json` in one step; the same config always gives the same bytes.

        Args:
            save_directory: made where it does not exist.
            auto_mapping_dict: written as `auto_mapping` in place of the field's value.

        Raises:
            ConfigError: a field has a wrong value; nothing is written.
            OSError: the folder cannot be written to; an older file is untouched.
        """
        self.validate()
        values = self.to_dict()
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        data = dumps(values)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / CONFIG_NAME, data)

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values in their usual types; those that cannot be converted stay for the checks to name."""
        return {
            key: cls._CONVERT[key](value) if key in cls._CONVERT else value for key, value in values.items()
        }

    @classmethod
    def _class_for(cls, data: dict[str, Any], where: str) -> type[PeftConfig]:
        named = data.get("peft_type", cls.__dict__.get("peft_type"))
        kind = _config_types.get(named) if isinstance(named, str) else None
        if kind is None or not issubclass(kind, cls):
            wanted = " or ".join(map(repr, _config_types)) + ", the only adapter family that lorakit has"
            raise ConfigError(f"{where}: {checks.problem('peft_type', named, wanted)}")
        return kind


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _folder(name: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> Path:
    """The local folder of an adapter; a name that exists locally is never looked up on the hub."""
    root = Path(name)
    if root.exists():
        return root / subfolder if subfolder else root
    if not _resolvers:
        raise AdapterNotFoundError(f"{name}: no such folder, wanted one with {CONFIG_NAME}")
    return _resolvers[0](name, subfolder, hub_kwargs)
