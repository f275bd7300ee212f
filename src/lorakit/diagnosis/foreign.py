"""Keys that are not those of an adapter file: of other formats, or with something too much or too little."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lorakit.checkpoint.keys import PREFIX
from lorakit.diagnosis.finding import Finding, some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Format(NamedTuple):
    name: str
    key: re.Pattern[str]


_FORMATS = (
    _Format(
        "kohya",
        re.compile(r"lora_(unet|te\d?|transformer)_.+\.(lora_(down|up|mid)\.weight|alpha|dora_scale)"),
    ),
    _Format(
        "diffusers",
        re.compile(
            r"(unet|transformer|text_encoder(_\d)?)\.(?!h\.).+\.(lora_[AB]\.weight|lora\.(down|up)\.weight|lora_linear_layer\..+)"
        ),
    ),
    _Format("mlx", re.compile(r".+\.lora_[ab]")),
    _Format("torchtune", re.compile(r"layers\.\d+\.(attn|mlp)\.\w+\.lora_[ab]\.weight")),
    _Format("gguf", re.compile(r"blk\.\d+\..+\.lora_[ab]")),
)
"""By the first key of a file that is none of PEFT's."""
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_NAMED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.([A-Za-z0-9_-]+)(\.weight)?$")


def format_of(keys: Sequence[str]) -> str | None:
    """The name of another format that some of the keys are of, or None."""
    own = [key for key in keys if not key.startswith(PREFIX)]
    found = {kind.name for kind in _FORMATS for key in own if kind.key.fullmatch(key)}
    return next((kind.name for kind in _FORMATS if kind.name in found), None)


def key_findings(keys: Sequence[str], where: str) -> Iterator[Finding]:
    """What is wrong with the names of a file's tensors, as names."""
    kind = format_of(keys)
    if kind is not None:
        yield Finding(
            "error",
            "foreign-format",
            where,
            f"its keys are those of {kind}: {some([key for key in keys if not key.startswith(PREFIX)][:2])}",
            f"Convert it: lorakit convert, from {kind} to peft.",
        )
        return
    yield from _prefix_findings(keys, where)
    inner = [key.removeprefix(PREFIX) for key in keys]
    doubled = [key for key in inner if key.startswith(PREFIX)]
    if doubled:
        yield Finding(
            "error",
            "doubled-prefix",
            where,
            f"{len(doubled)} keys have {PREFIX!r} twice: {PREFIX}{doubled[0]}",
            f"The model was wrapped twice before it was saved. Load with key_mapping={{{'^' + re.escape(PREFIX)!r}: ''}} and "
            "save again.",
        )
    for wrapper in _WRAPPERS:
        hit = [key for key in inner if f".{wrapper}" in f".{key}"]
        if hit:
            yield Finding(
                "error",
                "wrapper-in-keys",
                where,
                f"{len(hit)} keys have {wrapper!r}, which torch.compile or a parallel wrapper puts there: {hit[0]}",
                f"Save the unwrapped model; or load with key_mapping={{{re.escape(wrapper)!r}: ''}} and save again.",
            )
    named = sorted(
        {found[2] for key in inner if (found := _NAMED.search(key)) and found[2] not in {"weight", "bias"}}
    )
    if named:
        yield Finding(
            "error",
            "adapter-name-in-keys",
            where,
            f"keys have the adapter's name {some(named)} in them: this is a state dict of the model, not an adapter file",
            f"Save with save_pretrained(); or load with key_mapping={{{re.escape('.' + named[0])!r}: ''}} and save again.",
        )


def _prefix_findings(keys: Sequence[str], where: str) -> Iterator[Finding]:
    without = [key for key in keys if not key.startswith(PREFIX)]
    if without:
        yield Finding(
            "error",
            "prefix",
            where,
            f"{len(without)} of {len(keys)} keys do not begin with {PREFIX!r}: {some(without)}",
            f"Put {PREFIX!r} before every key, or save the adapter again with save_pretrained().",
        )
