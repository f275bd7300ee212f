"""Names inside the model and keys of an adapter file.

A file key is `base_model.model.` plus the name inside the model, without any adapter name:
`layers.0.q_proj.lora_A.weight` is stored as `base_model.model.layers.0.q_proj.lora_A.weight`.
`to_file_key` and `from_file_key` undo each other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorakit.errors import AdapterFormatError, ConfigError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PREFIX = "base_model.model."
_NUMBER = re.compile(r"[0-9]{1,9}")


def to_file_key(name: str) -> str:
    """The file key of a tensor that the model calls `name`."""
    return PREFIX + name


def from_file_key(key: str) -> str:
    """The name inside the model of the tensor stored under `key`.

    Raises:
        AdapterFormatError: the key does not start with `base_model.model.`.
    """
    if not key.startswith(PREFIX) or key == PREFIX:
        raise AdapterFormatError(
            f"the tensor {key[:200]!r} does not start with {PREFIX!r}: not an adapter file of PEFT's format; "
            "rename its keys or convert it first"
        )
    return key.removeprefix(PREFIX)


def natural_key(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts names as a person does: layer 10 after layer 9."""
    words, numbers = _NUMBER.split(name), [int(number) for number in _NUMBER.findall(name)]
    return tuple(zip(words, [*numbers, -1], strict=True))


def apply_key_mapping(keys: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    r"""Rename by regular expressions; for each key the first pattern that is found in it counts.

    Args:
        keys: names inside the model (what `from_file_key` gives).
        mapping: pattern to replacement, as `re.sub` takes them. As in the conversion tables of transformers, a
            leading `^` and groups such as `(?!\.model)` in a replacement are dropped.

    Returns:
        The old name to the new one, in the order of `keys`.

    Raises:
        ConfigError: a pattern or replacement is not valid, or two keys would get the same name.
    """
    if not mapping:
        return {key: key for key in keys}
    rules = [_rule(pattern, replacement) for pattern, replacement in mapping.items()]
    renamed = {key: _renamed(key, rules) for key in keys}
    sources: dict[str, list[str]] = {}
    for old, new in renamed.items():
        sources.setdefault(new, []).append(old)
    clashes = [f"{new}: from {' and '.join(old)}" for new, old in sources.items() if len(old) > 1]
    if clashes:
        raise ConfigError(
            bullet_list(
                "key_mapping gives several tensors one name", clashes, "Make the patterns more exact."
            )
        )
    return renamed


def _rule(pattern: str, replacement: str) -> tuple[re.Pattern[str], str]:
    try:
        return re.compile(pattern), re.sub(r"\(.*\)", "", replacement.lstrip("^"))
    except (re.error, TypeError, AttributeError) as error:
        raise ConfigError(
            f"key_mapping: {pattern!r} -> {replacement!r} is not a valid rule: {error}"
        ) from None


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        try:
            new, found = pattern.subn(replacement, key)
        except (re.error, IndexError) as error:
            raise ConfigError(f"key_mapping: the replacement {replacement!r} is not valid: {error}") from None
        if found:
            return new
    return key
