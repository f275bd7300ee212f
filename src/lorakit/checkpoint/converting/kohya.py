"""The format of kohya's sd-scripts, which ComfyUI and the WebUI read: one safetensors file of flat names.

`lora_unet_<path with _ for every .>.lora_down.weight`, `.lora_up.weight` and `.alpha`; `lora_te_` for the text
encoder, or `lora_te1_` and `lora_te2_` for the two of SDXL. A flat name can be read only with the names of the
base's modules: those of SD 1.5's and SDXL's models are known, others come from the safetensors headers of `base`.
The scaling is alpha / r; without alpha it is 1. Facts: `networks/lora.py` of sd-scripts, `comfy/lora.py` of
ComfyUI.

DoRA is refused: the readers of its `dora_scale` do not agree on what it is divided by.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.converting.base import COMPONENTS
from lorakit.checkpoint.converting.input import WITH_WHOLE_NUMBERS, read_names, read_safetensors
from lorakit.checkpoint.converting.naming import refuse_unknown
from lorakit.checkpoint.converting.neutral import Adapter, Part, Piece, config_of
from lorakit.checkpoint.converting.output import safetensors_file, write_file
from lorakit.checkpoint.converting.unet_names import original_upsamplers, text_modules, unet_modules
from lorakit.errors import AdapterFormatError, ConfigError, UnsupportedError, bullet_list
from lorakit.layouts import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.base import Base
    from lorakit.checkpoint.converting.neutral import Context

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_KEY = re.compile(r"(lora_(?:unet|te[12]?)_)([^.]+)\.(.+)")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_OTHER_KINDS = {
    "dora_scale": "DoRA, whose readers do not agree on what it is divided by",
    "lora_mid.weight": "a convolution in three factors (CP decomposition of LyCORIS)",
    "hada_": "LoHa of LyCORIS",
    "lokr_": "LoKr of LyCORIS",
    "oft_": "OFT",
    "diff": "whole differences",
    "w_norm": "norms trained whole",
    "b_norm": "norms trained whole",
}
_SHOWN = 10


class _Names(NamedTuple):
    """Paths by flat name, and the flat names that several paths have."""

    paths: dict[str, str]
    ambiguous: frozenset[str]


def recognises(path: Path) -> bool:
    """Whether a path is a file of this format."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return any(_KEY.fullmatch(name) for name in read_names(path)[0])


def read(path: Path, context: Context) -> Adapter:
    """Read a file.

    Raises:
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: it cannot be read, or has names of no known module.
        UnsupportedError: it holds more than LoRA factors.
    """
    tensors, _ = read_safetensors(path, WITH_WHOLE_NUMBERS)
    grouped, unknown = _grouped(tensors, path)
    names = {component: _names(component, context.base) for component in grouped}
    parts, problems = [], []
    for component, modules in grouped.items():
        pieces: dict[str, Piece] = {}
        for flat, own in modules.items():
            found = names[component].paths.get(flat)
            if found is None or flat in names[component].ambiguous:
                unknown.append(flat)
                continue
            if found in pieces:
                problems.append(f"{flat}: the same module is there under another name too")
            try:
                pieces[found] = _piece(own)
            except AdapterFormatError as error:
                problems.append(f"{flat}: {error}")
        if pieces:
            parts.append(Part(component, config_of(pieces), pieces))
    if problems:
        raise AdapterFormatError(bullet_list(f"{path}: its factors cannot be read", problems[:_SHOWN]))
    if unknown:
        raise refuse_unknown(
            f"{path}: names of no module of the base",
            unknown,
            [flat for known in names.values() for flat in known.paths],
            "Known are the models of SD 1.5 and SDXL; for another, name the base's folder: base=... (--base).",
        )
    return Adapter(str(path), tuple(parts))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write a file.

    Raises:
        ConfigError: the name does not end in .safetensors, or the file is there.
        AdapterFormatError: a module is none of the models of SD 1.5 and SDXL, nor of the base.
        OSError: the disk refused.
    """
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: wanted a file name that ends in .safetensors")
    components = {part.component: part for part in adapter.parts}
    original = _is_sdxl(components)
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for component, part in components.items():
        prefix = _prefix(component, two_encoders=original)
        flat_names = _flat_names(component, context.base, original=original)
        for path, piece in part.pieces.items():
            flat = flat_names.get(path)
            if flat is None:
                unknown.append(path)
                continue
            A, B, _ = piece.layout.join([piece.factors])
            name = prefix + flat
            tensors.update(
                {
                    f"{name}.lora_down.weight": A,
                    f"{name}.lora_up.weight": B,
                    f"{name}.alpha": _alpha(piece.alpha),
                }
            )
    if unknown:
        raise refuse_unknown(
            f"{adapter.where}: modules that no model of SD 1.5 or SDXL has",
            unknown,
            [*unet_modules(), *text_modules()],
            "For another model, name the base's folder: base=... (--base).",
        )
    write_file(target, safetensors_file(tensors, {"format": "pt"}), overwrite=context.overwrite)


# ---- reading ------------------------------------------------------------------------------------------


def _grouped(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, dict[str, dict[str, Tensor]]], list[str]]:
    """Tensors by component, flat name and what they are; and the keys that are of no such form."""
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
    unknown, refused = [], []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        part = _PARTS.get(found[3]) if found else None
        if found and part:
            modules = grouped.setdefault(_PREFIXES[found[1]], {})
            own = modules.setdefault(found[2], {})
            if part in own:
                raise AdapterFormatError(f"{path}: {key}: the same tensor is there under another prefix too")
            own[part] = tensor
            continue
        ending = found[3] if found else ""
        kind = next((what for start, what in _OTHER_KINDS.items() if ending.startswith(start)), None)
        if kind is None:
            unknown.append(key)
        else:
            refused.append(f"{key}: {kind}")
    if refused:
        raise UnsupportedError(bullet_list(f"{path}: more than LoRA factors", refused[:_SHOWN]))
    return grouped, unknown


def _piece(own: Mapping[str, Tensor]) -> Piece:
    if not {"A", "B"} <= own.keys():
        raise AdapterFormatError(f"has only {sorted(own)} of A (lora_down), B (lora_up) and alpha")
    A, B = own["A"], own["B"]
    shape = f"lora_down of {tuple(A.shape)} and lora_up of {tuple(B.shape)}"
    fits = A.ndim == B.ndim and A.ndim in {2, 4} and A.shape[0] == B.shape[1] > 0
    if not fits or B.shape[2:].numel() != 1:
        raise AdapterFormatError(f"{shape} do not go together")
    if not (A.is_floating_point() and B.is_floating_point()):
        raise AdapterFormatError(f"{shape} are no floating-point numbers")
    rank = A.shape[0]
    alpha = own.get("alpha", torch.tensor(float(rank)))
    if alpha.numel() != 1 or not float(alpha):
        raise AdapterFormatError(f"alpha is {alpha.tolist()}, wanted one number other than 0")
    layout = Layout(B.shape[0], tuple(A.shape[1:]))
    (factors,) = layout.split(A, B, float(alpha) / rank)
    return Piece(factors, float(alpha), layout)


# ---- names --------------------------------------------------------------------------------------------


def _names(component: str, base: Base | None) -> _Names:
    """What flat names of a component mean: in the base where it says, else in the known models."""
    own = () if base is None else base.modules.get(component, base.modules.get("", ()))
    if own:
        rows = [(_flat(path), path) for path in own]
        if component == "unet":
            rows += [(_flat(name), path) for path, name in unet_modules().items() if path in set(own)]
    elif component == "unet":
        rows = [(_flat(path), path) for path in unet_modules()]
        rows += [(_flat(name), path) for path, name in unet_modules().items()]
        rows += [(_flat(name), path) for path, name in original_upsamplers().items()]
    else:
        rows = [(_flat(path), path) for path in text_modules()]
    paths: dict[str, str] = {}
    ambiguous = set()
    for flat, path in rows:
        if paths.setdefault(flat, path) != path:
            ambiguous.add(flat)
    return _Names(paths, frozenset(ambiguous))


def _flat_names(component: str, base: Base | None, *, original: bool) -> dict[str, str]:
    """The flat name of each path of a component."""
    names = _names(component, base)
    found = {
        path: flat
        for flat, path in names.paths.items()
        if flat not in names.ambiguous and flat == _flat(path)
    }
    if component == "unet" and original:
        found.update({path: _flat(name) for path, name in unet_modules().items() if path in found})
    if component != "unet":  # transformers 5 dropped text_model from the paths, kohya's names have it
        found.update({path.removeprefix("text_model."): flat for path, flat in found.items()})
    return found


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _is_sdxl(components: Mapping[str, Part]) -> bool:
    """Whether the parts are of SDXL: it has a second text encoder, and attentions of more than one block."""
    if "text_encoder_2" in components:
        return True
    unet = components.get("unet")
    deep = re.compile(r"\.transformer_blocks\.[1-9]\d*\.")
    return unet is not None and any(deep.search(path) for path in unet.pieces)


def _prefix(component: str, *, two_encoders: bool) -> str:
    if component == "text_encoder":
        return "lora_te1_" if two_encoders else "lora_te_"
    found = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}.get(component)
    if found is None:
        raise UnsupportedError(
            f"{component}: kohya's scripts train such models under the names of their original code, whose layers are fused; "
            f"only {', '.join(name for name in COMPONENTS if name in _PREFIXES.values())} can be written"
        )
    return found


def _alpha(alpha: float) -> Tensor:
    """In float32, or in float64 where only that holds it."""
    short = torch.tensor(alpha, dtype=torch.float32)
    return short if float(short) == alpha else torch.tensor(alpha, dtype=torch.float64)
