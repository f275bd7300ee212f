"""The format of diffusers' pipelines: PEFT's names under the name of the model, in `pytorch_lora_weights.safetensors`.

The config of each model is in the header's metadata (`lora_adapter_metadata`), as diffusers 0.34 and later writes
and reads it; without it every module's scaling is 1. The older names of the tensors (`lora.down`,
`lora_linear_layer.down`, and those of attention processors) are read too. Facts: `diffusers.loaders.lora_base`,
`diffusers.utils.state_dict_utils` (0.42.1).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.converting.base import COMPONENTS
from lorakit.checkpoint.converting.input import read_names, read_safetensors
from lorakit.checkpoint.converting.naming import refuse_unknown
from lorakit.checkpoint.converting.neutral import Adapter, config_of, most_common, whole
from lorakit.checkpoint.converting.output import safetensors_file, write_file
from lorakit.checkpoint.converting.peft import named_tensors, part_of
from lorakit.checkpoint.storing import module_pattern
from lorakit.config import LoraConfig, strict_json
from lorakit.errors import AdapterFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lorakit.checkpoint.converting.neutral import Context

FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "lora_bias")
"""Those that every PEFT which diffusers works with knows."""
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), ending)
    for pattern, ending in (
        (r"(.+)\.lora_A\.weight", "lora_A.weight"),
        (r"(.+)\.lora_B\.weight", "lora_B.weight"),
        (r"(.+)\.lora_B\.bias", "lora_B.bias"),
        (r"(.+)\.lora_magnitude_vector(?:\.weight)?", "lora_magnitude_vector"),
        (r"(.+)\.(?:lora|lora_linear_layer)\.down\.weight", "lora_A.weight"),
        (r"(.+)\.(?:lora|lora_linear_layer)\.up\.weight", "lora_B.weight"),
    )
)
_PROCESSOR = re.compile(r"(.+?)(\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def recognises(path: Path) -> bool:
    """Whether a path is a file of this format, or a folder with one under its usual name."""
    file = _file(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    return any(name.partition(".")[0] in COMPONENTS for name in read_names(file)[0])


def read(path: Path, _context: Context) -> Adapter:
    """Read a file, or the usual one of a folder.

    Raises:
        AdapterNotFoundError, AdapterFormatError, ConfigError, NonFiniteError: it cannot be read.
        UnsupportedError: it holds more than factors.
    """
    file = _file(path)
    tensors, metadata = read_safetensors(file)
    by_component: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        name = _peft_name(component, rest) if component in COMPONENTS else None
        if name is None:
            unknown.append(key)
            continue
        own = by_component.setdefault(component, {})
        if name in own:
            raise AdapterFormatError(f"{file}: {key}: the same tensor is there under another name too")
        own[name] = tensor
    if unknown:
        raise refuse_unknown(
            f"{file}: tensors whose names are none of diffusers'",
            unknown,
            hint=f"Wanted <{'|'.join(COMPONENTS)}>.<module>.lora_A.weight and so on.",
        )
    told = _told(metadata, file)
    parts = []
    for component, own in by_component.items():
        where = f"{file}, {component}"
        config = _config(told.get(component), own, where)
        parts.append(part_of(component, config, own, where))
    return Adapter(str(file), tuple(parts))


def write(adapter: Adapter, target: Path, context: Context) -> None:
    """Write a file, or the usual one of a folder.

    Raises:
        ConfigError: the file is there and may not be overwritten.
        OSError: the disk refused.
    """
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for part in adapter.parts:
        component = part.component
        tensors.update({f"{component}.{name}": tensor for name, tensor in named_tensors(part.pieces)})
        fields = config_of(part.pieces, part.config).to_dict()
        told.update({f"{component}.{name}": fields[name] for name in _FIELDS})
    metadata = {"format": "pt", _METADATA: json.dumps(told, indent=2, sort_keys=True)}
    file = target if target.suffix == ".safetensors" else target / FILE
    write_file(file, safetensors_file(tensors, metadata), overwrite=context.overwrite)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _peft_name(component: str, name: str) -> str | None:
    """PEFT's name of a tensor, without any prefix, or None."""
    found = _PROCESSOR.fullmatch(name)
    if found:
        factor = {"down": "lora_A.weight", "up": "lora_B.weight"}[found[4]]
        projection = {"q": "q", "k": "k", "v": "v", "out": "out"}[found[3]]
        if component.startswith("text_encoder"):
            return f"{found[1]}.{projection}_proj.{factor}"
        return f"{found[1]}.to_{projection}{'.0' if projection == 'out' else ''}.{factor}"
    for pattern, ending in _ENDINGS:
        matched = pattern.fullmatch(name)
        if matched:
            return f"{matched[1].replace('.processor.', '.')}.{ending}"
    return None


def _told(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """The fields of each component's config, from the header."""
    if _METADATA not in metadata:
        return {}
    where = f"{file}, {_METADATA}"
    fields = strict_json.loads(metadata[_METADATA], where=where)
    if not isinstance(fields, dict):
        raise AdapterFormatError(f"{where}: holds a {type(fields).__name__}, wanted an object of fields")
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return found


def _config(told: dict[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> LoraConfig:
    """The config that the header has; else one that says scaling 1."""
    if told is not None:
        return LoraConfig.from_dict({"peft_type": "LORA", **told}, where=where, required=("r", "lora_alpha"))
    ranks = {
        name.removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight") and tensor.ndim
    }
    return _ones(ranks, dora=_any(tensors, "lora_magnitude_vector"), biased=_any(tensors, "lora_B.bias"))


def _ones(ranks: Mapping[str, int], *, dora: bool, biased: bool) -> LoraConfig:
    """A config of these ranks whose scalings are 1."""
    r = most_common(ranks.values()) if ranks else 1
    others = {module_pattern(path): rank for path, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=int(r),
        lora_alpha=whole(r),
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=set(ranks),
        use_dora=dora,
        lora_bias=biased,
    )


def _any(tensors: Iterable[str], ending: str) -> bool:
    return any(name.endswith(f".{ending}") for name in tensors)
