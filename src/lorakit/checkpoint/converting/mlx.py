"""The adapters of mlx-lm: a folder with `adapters.safetensors` and `adapter_config.json`.

`<module>.lora_a` is (in, r) and `<module>.lora_b` (r, out), both turned over; DoRA has `<module>.m` (out,). One
rank and one `scale` hold for all modules, so lesser ranks are filled with zeros. mlx-lm calls the modules of the
models below as transformers does. The modules are named by whole paths in `keys`, which mlx-lm takes as well as
names inside a layer. Facts: `mlx_lm/tuner/utils.py`, `lora.py`, `dora.py` and `mlx_lm/models` (0.32.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.converting.base import required
from lorakit.checkpoint.converting.input import number_in, read_object, read_safetensors
from lorakit.checkpoint.converting.naming import NameTable, refuse_unknown
from lorakit.checkpoint.converting.neutral import (
    Adapter,
    Part,
    alpha_of,
    at_one_scaling,
    config_of,
    plain_piece,
)
from lorakit.checkpoint.converting.output import bytes_file, safetensors_file, write_folder
from lorakit.checkpoint.files import CONFIG_NAME, present
from lorakit.config import LoraConfig, strict_json
from lorakit.errors import AdapterFormatError, UnsupportedError, at_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.neutral import Context, Piece

FILE = "adapters.safetensors"
_EMBEDDING = "model.embed_tokens"
_OUTER = (_EMBEDDING, "lm_head")
_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2")),
    *(f"mlp.{name}" for name in ("c_fc", "c_proj")),
)
"""Those of llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, granite, olmo2, phi, phi3, starcoder2 and more."""
NAMES = NameTable({name: name for name in (*(f"model.layers.{{}}.{leaf}" for leaf in _LAYER), *_OUTER)})
_LEAVES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}


def recognises(path: Path) -> bool:
    """Whether a path is a folder of this format."""
    return path.is_dir() and present(path, FILE)


def read(path: Path, context: Context) -> Adapter:
    """Read a folder.

    Raises:
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: it cannot be read, or has names of no known module.
        ConfigError: it adapts an embedding or a head, and no base is named.
        UnsupportedError: it holds a whole model, experts, or an adapter of a tied embedding or head.
    """
    config = read_object(path, CONFIG_NAME)
    where = str(path / CONFIG_NAME)
    kind = config.get("fine_tune_type", "lora")
    if kind not in {"lora", "dora"}:
        raise UnsupportedError(f"{where}: fine_tune_type {kind!r}; only lora and dora are adapters")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise AdapterFormatError(f"{where}: lora_parameters: {settings!r}, wanted rank and scale")
    scale, rank = number_in(settings, "scale", where), number_in(settings, "rank", where)
    tensors, _ = read_safetensors(path / FILE)
    pieces = {}
    for module, own in _grouped(tensors, path).items():
        with at_path(module):
            _check_outer(module, context)
            pieces[module] = _piece(module, own, scale, rank, dora=kind == "dora")
    model = config.get("model")
    known = LoraConfig(
        base_model_name_or_path=model if isinstance(model, str) else None,
        lora_dropout=settings.get("dropout") or 0.0,
    )
    return Adapter(str(path), (Part("", config_of(pieces, known), pieces),))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write a folder.

    Raises:
        AdapterFormatError: a module has no such name in mlx-lm.
        ConfigError: it adapts an embedding or a head, and no base is named; or the folder may not be written.
        UnsupportedError: DoRA on an embedding, or an adapter of a tied embedding or head.
        OSError: the disk refused.
    """
    (part,) = adapter.parts
    NAMES.require(part.pieces, f"{adapter.where}: modules that mlx-lm is not known to call so")
    rank, scale, pieces = at_one_scaling(part, context)
    tensors: dict[str, Tensor] = {}
    for path, piece in pieces.items():
        with at_path(path):
            _check_outer(path, context)
        tensors.update({f"{path}.{leaf}": tensor for leaf, tensor in _stored(piece).items()})
    files = {
        FILE: safetensors_file(tensors, {"format": "mlx"}),
        CONFIG_NAME: bytes_file(strict_json.dumps(_config(part, rank, scale))),
    }
    write_folder(target, files, overwrite=context.overwrite)


def _config(part: Part, rank: int, scale: float) -> dict[str, Any]:
    return {
        "fine_tune_type": "dora" if part.config.use_dora else "lora",
        "lora_parameters": {
            "dropout": part.config.lora_dropout,
            "keys": sorted(part.pieces),
            "rank": rank,
            "scale": scale,
        },
        "model": part.config.base_model_name_or_path,
        "num_layers": -1,
    }


def _stored(piece: Piece) -> dict[str, Tensor]:
    """The tensors of a module: of an embedding A and B stand the same way round, (tokens, r) and (r, dim)."""
    found = {
        "lora_a": piece.factors.A.t().contiguous(),
        "lora_b": piece.factors.B.t().contiguous(),
    }
    return found if piece.magnitude is None else {**found, "m": piece.magnitude}


def _check_outer(path: str, context: Context) -> None:
    if path in _OUTER:
        base = required(
            context.base, f"{path}: whether input and output share a weight, only the base's config says"
        )
        base.require_untied(path)


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf not in _LEAVES or NAMES.path(module) is None:
            unknown.append(key)
        else:
            found.setdefault(module, {})[_LEAVES[leaf]] = tensor
    if unknown:
        known = [f"{name}.{leaf}" for name in NAMES.names_like(unknown[0]) for leaf in _LEAVES]
        raise refuse_unknown(
            f"{path / FILE}: tensors of modules that transformers is not known to call so", unknown, known
        )
    return found


def _piece(module: str, own: Mapping[str, Tensor], scale: float, rank: float, *, dora: bool) -> Piece:
    wanted = {"A", "B", "magnitude"} if dora else {"A", "B"}
    if own.keys() != wanted:
        raise AdapterFormatError(f"has {sorted(own)}, wanted {sorted(wanted)}")
    a, b = own["A"], own["B"]
    if a.ndim != 2 or b.ndim != 2 or not a.shape[1] == b.shape[0] == rank:
        raise AdapterFormatError(
            f"lora_a of {tuple(a.shape)} and lora_b of {tuple(b.shape)}, wanted (in, {rank:.0f}) and ({rank:.0f}, out)"
        )
    is_embedding = module == _EMBEDDING
    if dora and is_embedding:
        raise UnsupportedError("DoRA of an embedding, which is not converted")
    piece = plain_piece(
        a.t().contiguous(), b.t().contiguous(), alpha_of(scale, a.shape[1]), is_embedding=is_embedding
    )
    return replace(piece, magnitude=own["magnitude"]) if dora else piece
