"""The formats, one row each: how one is recognised, read and written, and which features it has a place for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.checkpoint.converting import diffusers, gguf, kohya, mlx, peft, torchtune
from lorakit.checkpoint.converting.neutral import features_of
from lorakit.errors import UnsupportedError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorakit.checkpoint.converting.neutral import Adapter, Context


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        title: for messages.
        recognises: whether a path is of this format, as far as names and the first bytes tell.
        read: gives the adapter of a path.
        write: puts an adapter into a path.
        features: those of `neutral.features_of` that it has a place for.
        keeps: fields of a config that change no weight, and that it has a place for.
        pipelines: whether one file holds adapters of several models.
    """

    title: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Context], Adapter]
    write: Callable[[Adapter, Path, Context], None]
    features: frozenset[str]
    keeps: frozenset[str] = frozenset()
    pipelines: bool = False


SETTINGS = ("base_model_name_or_path", "revision", "task_type", "lora_dropout", "fan_in_fan_out")
"""Fields of a config that change no weight, and may be lost."""
_PEFT = frozenset({"dora", "lora_bias", "embedding", "convolution", "alora"})
FORMATS = {
    "peft": Format("PEFT", peft.recognises, peft.read, peft.write, _PEFT, frozenset(SETTINGS)),
    "diffusers": Format(
        "diffusers",
        diffusers.recognises,
        diffusers.read,
        diffusers.write,
        frozenset({"dora", "lora_bias", "convolution"}),
        pipelines=True,
    ),
    "kohya": Format(
        "kohya and ComfyUI",
        kohya.recognises,
        kohya.read,
        kohya.write,
        frozenset({"convolution"}),
        pipelines=True,
    ),
    "gguf": Format("GGUF", gguf.recognises, gguf.read, gguf.write, frozenset({"embedding", "alora"})),
    "mlx": Format(
        "MLX",
        mlx.recognises,
        mlx.read,
        mlx.write,
        frozenset({"dora", "embedding"}),
        frozenset({"base_model_name_or_path", "lora_dropout"}),
    ),
    "torchtune": Format(
        "torchtune",
        torchtune.recognises,
        torchtune.read,
        torchtune.write,
        frozenset({"dora"}),
        frozenset({"base_model_name_or_path"}),
    ),
}
FEATURES = {
    "dora": "DoRA",
    "lora_bias": "a bias of B (lora_bias)",
    "embedding": "adapters of an embedding",
    "convolution": "adapters of a convolution",
    "alora": "aLoRA (alora_invocation_tokens)",
}


def refuse_features(adapter: Adapter, target: Format) -> None:
    """Refuse what a format has no place for.

    Raises:
        UnsupportedError: names each feature and where it is.
    """
    found = [
        (feature, where)
        for part in adapter.parts
        for feature, where in features_of(part).items()
        if feature not in target.features
    ]
    if not found:
        return
    able = [form.title for form in FORMATS.values() if form.features >= {feature for feature, _ in found}]
    raise UnsupportedError(
        bullet_list(
            f"{adapter.where}: the format of {target.title} has no place for",
            [f"{FEATURES[feature]}, at {where}" for feature, where in found],
            f"Merge it into its base (lorakit merge), or choose a format that has: {', '.join(able)}.",
        )
    )
