"""The adapters of torchtune: a folder with `adapter_model.pt` and `adapter_config.json`.

`<module>.lora_a.weight` (r, in), `<module>.lora_b.weight` (out, r), and `<module>.magnitude` (out,) of DoRA, under
torchtune's own names of modules. One r and one lora_alpha hold for all, so lesser ranks are filled with zeros. For
most models torchtune stores the rows of queries and keys in the order of neighbours, which takes the number of
heads from the base's config. The config names target modules as transformers does, which torchtune itself writes
beside this file. Facts: `torchtune.models.convert_weights`, `torchtune.training.checkpointing` (0.6.1).

The `adapter_model.safetensors` that torchtune writes beside it is of PEFT's format (`from_="peft"`). For Qwen2 its
queries and keys are in the wrong order; this reader takes the `.pt`.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.converting.base import required
from lorakit.checkpoint.converting.input import number_in, read_object, read_pickle
from lorakit.checkpoint.converting.naming import NameTable, refuse_unknown
from lorakit.checkpoint.converting.neutral import (
    Adapter,
    Part,
    alpha_of,
    at_one_scaling,
    config_of,
    plain_piece,
    whole,
)
from lorakit.checkpoint.converting.output import bytes_file, write_folder
from lorakit.checkpoint.converting.rotary import halves, neighbours
from lorakit.checkpoint.files import CONFIG_NAME, present
from lorakit.config import LoraConfig, strict_json
from lorakit.errors import AdapterFormatError, UnsupportedError, at_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.base import Base
    from lorakit.checkpoint.converting.neutral import Context, Piece

FILE = "adapter_model.pt"
_HEAD = "lm_head"
_LAYER = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
NAMES = NameTable(
    {**{f"model.layers.{{}}.{path}": f"layers.{{}}.{name}" for path, name in _LAYER.items()}, _HEAD: "output"}
)
_ENDINGS = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "magnitude"}


class Family(NamedTuple):
    """How torchtune stores a model: whether the rows of queries and keys are in the order of neighbours."""

    neighbours: bool


FAMILIES = {
    "llama": Family(neighbours=True),
    "mistral": Family(neighbours=True),
    "gemma": Family(neighbours=True),
    "gemma2": Family(neighbours=True),
    "qwen2": Family(neighbours=False),
}
"""By the `model_type` of transformers."""


def recognises(path: Path) -> bool:
    """Whether a path is a folder of this format."""
    return path.is_dir() and present(path, FILE)


def read(path: Path, context: Context) -> Adapter:
    """Read a folder.

    Raises:
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: it cannot be read, or has names of no known module.
        ConfigError: no base is named.
        UnsupportedError: lorakit does not know how torchtune stores the base, or this torch's unpickler has holes.
    """
    base, family = _base(context, str(path))
    fields = read_object(path, CONFIG_NAME)
    where = str(path / CONFIG_NAME)
    r, alpha = number_in(fields, "r", where), number_in(fields, "lora_alpha", where)
    pieces = {}
    for module, own in _grouped(read_pickle(path / FILE), path).items():
        with at_path(module):
            pieces[module] = _piece(module, own, r, alpha, family, base)
    magnitudes = [piece.magnitude is not None for piece in pieces.values()]
    if any(magnitudes) and not all(magnitudes):
        raise AdapterFormatError(f"{path / FILE}: only some of the modules have a magnitude")
    name = fields.get("base_model_name_or_path")
    known = LoraConfig(base_model_name_or_path=name if isinstance(name, str) else None)
    return Adapter(str(path), (Part("", config_of(pieces, known), pieces),))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write a folder.

    Raises:
        AdapterFormatError: a module has no name in torchtune.
        ConfigError: no base is named, or the folder may not be written.
        UnsupportedError: lorakit does not know how torchtune stores the base, or the head is tied.
        OSError: the disk refused.
    """
    (part,) = adapter.parts
    base, family = _base(context, "torchtune's order of rows depends on the base")
    NAMES.require(part.pieces, f"{adapter.where}: modules that torchtune has no adapters for")
    rank, scaling, pieces = at_one_scaling(part, context)
    tensors: dict[str, Tensor] = {}
    for path, piece in pieces.items():
        with at_path(path):
            own = _stored(path, piece, family, base)
        tensors.update({f"{NAMES.name(path)}.{ending}": tensor for ending, tensor in own.items()})
    config = {
        "base_model_name_or_path": part.config.base_model_name_or_path,
        "lora_alpha": whole(alpha_of(scaling, rank)),
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in part.pieces}),
    }
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    files = {FILE: bytes_file(pickled.getvalue()), CONFIG_NAME: bytes_file(strict_json.dumps(config))}
    write_folder(target, files, overwrite=context.overwrite)


def _base(context: Context, why: str) -> tuple[Base, Family]:
    base = required(context.base, f"{why}: which rows are in which order, only the base's config says")
    kind = str(base.config.get("model_type"))
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"{base.folder}: how torchtune stores a model of the type {kind!r} is not known here, only of the types "
            f"{', '.join(FAMILIES)}"
        )
    return base, FAMILIES[kind]


def _stored(path: str, piece: Piece, family: Family, base: Base) -> dict[str, Tensor]:
    B, magnitude = piece.factors.B, piece.magnitude
    if path == _HEAD:
        base.require_untied(path)
    if _is_turned(path, family):
        B = neighbours(B, base.heads(path))
        magnitude = None if magnitude is None else neighbours(magnitude, base.heads(path))
    found = {"lora_a.weight": piece.factors.A.contiguous(), "lora_b.weight": B.contiguous()}
    return found if magnitude is None else {**found, "magnitude": magnitude}


def _piece(path: str, own: Mapping[str, Tensor], r: float, alpha: float, family: Family, base: Base) -> Piece:
    if not {"A", "B"} <= own.keys():
        raise AdapterFormatError(f"has only {sorted(own)} of A and B")
    A, B, magnitude = own["A"], own["B"], own.get("magnitude")
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == r:
        raise AdapterFormatError(
            f"A of {tuple(A.shape)} and B of {tuple(B.shape)} do not go together, or not with r={r:.0f}"
        )
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        raise AdapterFormatError(f"a magnitude of {tuple(magnitude.shape)}, wanted ({B.shape[0]},)")
    if path == _HEAD:
        base.require_untied(path)
    if _is_turned(path, family):
        B = halves(B, base.heads(path))
        magnitude = None if magnitude is None else halves(magnitude, base.heads(path))
    return replace(plain_piece(A, B, alpha), magnitude=magnitude)


def _is_turned(path: str, family: Family) -> bool:
    return family.neighbours and path.endswith((".q_proj", ".k_proj"))


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(f".{ending}")), None)
        module = None if ending is None else NAMES.path(key.removesuffix(f".{ending}"))
        if ending is None or module is None:
            unknown.append(key)
        else:
            found.setdefault(module, {})[_ENDINGS[ending]] = tensor
    if unknown:
        known = [f"{name}.{ending}" for name in NAMES.names_like(unknown[0]) for ending in _ENDINGS]
        raise refuse_unknown(f"{path / FILE}: tensors of no module that torchtune adapts", unknown, known)
    return found
