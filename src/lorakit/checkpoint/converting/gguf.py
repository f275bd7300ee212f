"""The LoRA files of llama.cpp: GGUF with `<weight>.lora_a` and `.lora_b`, and one `adapter.lora.alpha` for all.

A module's scaling there is alpha / r of its own lora_b, and 1 where alpha is 0. The rows of queries and keys are in
the order of neighbours for the architectures that llama.cpp converts so, which takes the number of heads from the
base's config. Both factors of `token_embd` are turned over. Facts: `convert_lora_to_gguf.py`, `conversion/*.py`,
`src/llama-adapter.cpp` and `llama-adapter.h` of llama.cpp; the names of tensors are those of the `gguf` package
(0.19), which a test compares.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.checkpoint.converting.base import required
from lorakit.checkpoint.converting.gguf_file import MAGIC, gguf_file, read_gguf
from lorakit.checkpoint.converting.input import refuse_non_finite
from lorakit.checkpoint.converting.naming import NameTable, refuse_unknown
from lorakit.checkpoint.converting.neutral import (
    Adapter,
    Part,
    config_of,
    most_common,
    plain_piece,
    with_alpha,
)
from lorakit.checkpoint.converting.output import write_file
from lorakit.checkpoint.converting.rotary import halves, neighbours
from lorakit.checkpoint.files import open_regular, read_up_to
from lorakit.config import LoraConfig
from lorakit.errors import AdapterFormatError, ConfigError, UnsupportedError, at_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.base import Base
    from lorakit.checkpoint.converting.neutral import Context, Piece

ALPHA = "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_OUTER = {_EMBEDDING: "token_embd", _HEAD: "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TWO = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


class Architecture(NamedTuple):
    """How llama.cpp stores a model.

    Attributes:
        name: of the architecture in llama.cpp.
        layer: PEFT's names inside a layer, and llama.cpp's.
        neighbours: whether the rows of queries and keys are stored in the order of neighbours.
        outer: whether an adapter may be on the embedding and the head: some conversions cut or drop them.
    """

    name: str
    layer: Mapping[str, str]
    neighbours: bool = False
    outer: bool = True

    def names(self) -> NameTable:
        """The names of the modules, without the `.weight` of llama.cpp's."""
        rows = {f"model.layers.{{}}.{path}": f"blk.{{}}.{name}" for path, name in self.layer.items()}
        return NameTable({**rows, **(_OUTER if self.outer else {})})


_LLAMA = {**_ATTENTION, **_GATED}
ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, neighbours=True),
    "mistral": Architecture("llama", _LLAMA, neighbours=True),
    "granite": Architecture("granite", _LLAMA, neighbours=True),
    "qwen2": Architecture("qwen2", _LLAMA),
    "qwen3": Architecture("qwen3", _LLAMA),
    "gemma": Architecture("gemma", _LLAMA, outer=False),
    "gemma2": Architecture("gemma2", _LLAMA, outer=False),
    "gemma3_text": Architecture("gemma3", _LLAMA, outer=False),
    "phi3": Architecture("phi3", _FUSED),
    "starcoder2": Architecture("starcoder2", {**_ATTENTION, **_TWO}),
}
"""By the `model_type` of transformers."""


def recognises(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with open_regular(path.parent, path.name) as (descriptor, _):
        return read_up_to(descriptor, 4) == MAGIC


def read(path: Path, context: Context) -> Adapter:
    """Read a file.

    Raises:
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: it cannot be read, or has names that its architecture
            has not.
        ConfigError: no base is named, or it is of another architecture.
        UnsupportedError: its tensors are quantised, or lorakit does not know the architecture.
    """
    file = read_gguf(path)
    _check_fields(file.fields, path)
    refuse_non_finite(path, file.tensors)
    base = required(
        context.base, f"{path}: which model's names these are and how many heads it has, only its config says"
    )
    architecture = _architecture(base)
    found = str(file.fields.get("general.architecture"))
    if found != architecture.name:
        raise ConfigError(
            f"{path}: an adapter of the architecture {found!r}, and {base.folder} is {architecture.name!r}; name its own base"
        )
    pairs = _pairs(file.tensors, architecture, path)
    alpha = float(file.fields.get(ALPHA, 0.0))
    pieces = {}
    for module, pair in pairs.items():
        with at_path(module):
            pieces[module] = _read_piece(module, pair, alpha, architecture, base)
    tokens = file.fields.get(INVOCATION)
    config = config_of(pieces, LoraConfig(alora_invocation_tokens=tokens))
    return Adapter(str(path), (Part("", config, pieces),))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write a file.

    Raises:
        ConfigError: the name does not end in .gguf, no base is named, or the file is there.
        AdapterFormatError: a module has no name in llama.cpp.
        UnsupportedError: lorakit does not know the architecture, or an embedding or head is tied.
        OSError: the disk refused.
    """
    if target.suffix != ".gguf":
        raise ConfigError(f"{target}: wanted a file name that ends in .gguf")
    (part,) = adapter.parts
    base = required(context.base, "llama.cpp's names and the order of rows depend on the base")
    architecture = _architecture(base)
    names = architecture.names()
    names.require(
        part.pieces,
        f"{adapter.where}: modules that an adapter of llama.cpp's {architecture.name!r} cannot have",
    )
    alpha = most_common(piece.alpha for piece in part.pieces.values())
    folded = with_alpha(part.pieces, alpha)
    tensors: dict[str, Tensor] = {}
    for path, piece in folded.pieces.items():
        with at_path(path):
            A, B = _stored(path, piece, architecture, base)
        tensors[f"{names.name(path)}.weight.lora_a"] = A
        tensors[f"{names.name(path)}.weight.lora_b"] = B
    (short,) = struct.unpack("<f", struct.pack("<f", alpha))
    context.notes += [folded.note] if folded.note else []
    if short != alpha:
        context.notes.append(f"alpha is {alpha!r} and a float32 in the file: {short!r}")
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        context.notes.append("llama.cpp does not compute in float64: such tensors are rounded to float32")
    fields: dict[str, str | float | list[int]] = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        ALPHA: float(alpha),
    }
    if part.config.alora_invocation_tokens is not None:
        fields[INVOCATION] = list(part.config.alora_invocation_tokens)
    stored = {name: t.float() if t.dtype == torch.float64 else t for name, t in tensors.items()}
    write_file(target, gguf_file(fields, stored), overwrite=context.overwrite)


# ---- one module ---------------------------------------------------------------------------------------


def _stored(path: str, piece: Piece, architecture: Architecture, base: Base) -> tuple[Tensor, Tensor]:
    """A and B as llama.cpp has them."""
    A, B = piece.factors.A, piece.factors.B
    if path in _OUTER:
        base.require_untied(path)
    if path == _EMBEDDING:
        return A.t().contiguous(), B
    if _is_turned(path, architecture):
        B = neighbours(B, base.heads(path))
    return A, B


def _read_piece(
    path: str, pair: Mapping[str, Tensor], alpha: float, architecture: Architecture, base: Base
) -> Piece:
    A, B = pair["a"], pair["b"]
    if A.ndim != 2 or B.ndim != 2:
        raise AdapterFormatError(f"lora_a of {tuple(A.shape)}, lora_b of {tuple(B.shape)}; wanted matrices")
    if path in _OUTER:
        base.require_untied(path)
    if path == _EMBEDDING:
        A = A.t().contiguous()
    if A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterFormatError(f"A of {tuple(A.shape)} and B of {tuple(B.shape)} do not go together")
    if _is_turned(path, architecture):
        B = halves(B, base.heads(path))
    return plain_piece(A, B, alpha or float(B.shape[1]), is_embedding=path == _EMBEDDING)


def _is_turned(path: str, architecture: Architecture) -> bool:
    return architecture.neighbours and path.endswith((".q_proj", ".k_proj"))


# ---- the file -----------------------------------------------------------------------------------------


def _architecture(base: Base) -> Architecture:
    kind = str(base.config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{base.folder}: how llama.cpp stores a model of the type {kind!r} is not known here, only of the types "
            f"{', '.join(ARCHITECTURES)}; convert with llama.cpp's convert_lora_to_gguf.py"
        )
    return ARCHITECTURES[kind]


def _check_fields(fields: Mapping[str, object], path: Path) -> None:
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise AdapterFormatError(f"{path}: {key} is {fields.get(key)!r}, wanted {value!r}; not a LoRA")
    alpha = fields.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterFormatError(f"{path}: {ALPHA}: {alpha!r}, wanted a number")


def _pairs(
    tensors: Mapping[str, Tensor], architecture: Architecture, path: Path
) -> dict[str, dict[str, Tensor]]:
    """The two factors by PEFT's path of their module."""
    names = architecture.names()
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, _, which = key.rpartition(".lora_")
        module = names.path(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is None or which not in {"a", "b"}:
            unknown.append(key)
        else:
            found.setdefault(module, {})[which] = tensor
    if unknown:
        known = [f"{name}.weight.lora_{which}" for name in names.names_like(unknown[0]) for which in "ab"]
        raise refuse_unknown(
            f"{path}: tensors that no adapter of llama.cpp's {architecture.name!r} has", unknown, known
        )
    lone = [module for module, pair in found.items() if len(pair) < 2]
    if lone:
        raise refuse_unknown(f"{path}: modules with only one of lora_a and lora_b", lone)
    return found
