"""`lorakit.convert`: an adapter from one tool's format to another's, from files to files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.checkpoint.converting.base import COMPONENTS, open_base
from lorakit.checkpoint.converting.neutral import Context
from lorakit.checkpoint.converting.registry import FORMATS, SETTINGS, refuse_features
from lorakit.checkpoint.storing import silent
from lorakit.config import LoraConfig, NearNames
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, ConfigError

if TYPE_CHECKING:
    import os

    from lorakit.checkpoint.converting.neutral import Adapter, Part
    from lorakit.checkpoint.storing import Progress


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
        output: the file or folder.
        from_format, to_format: names of the formats.
        components: the models of a pipeline that it holds adapters of; empty where the format knows none.
        modules: adapted modules.
        parameters: in their factors.
        notes: what the file says in another way than the source, and what it does not say.
    """

    output: str
    from_format: str
    to_format: str
    components: tuple[str, ...]
    modules: int
    parameters: int
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    from_: str | None = None,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Write an adapter in the format of another tool.

    What the adapter does to the weights stays the same: scalings, layouts and the order of rows are translated, and
    what the target has no place for is refused.

    Args:
        source: the file or folder.
        output: the file or folder to write; `.safetensors` for "kohya", `.gguf` for "gguf", either for "diffusers".
        to: "peft", "diffusers", "kohya" (ComfyUI reads it too), "gguf", "mlx" or "torchtune".
        from_: the same, of the source; None looks.
        base: a folder of the base, or a repository of the hub. "gguf" and "torchtune" need its config.json; "kohya"
            needs the headers of its safetensors files, where it is neither SD 1.5 nor SDXL; "mlx" its config.json for
            embeddings and heads.
        component: of a pipeline: which model's adapter to take out of `source`, or which model a PEFT adapter is for
            ("unet", "text_encoder" ...).
        overwrite: replace what is in `output`.
        progress: is called with (what, done, total).

    Returns:
        What was written, with notes.

    Raises:
        ConfigError: the request is not sound, or `output` is taken.
        AdapterNotFoundError, AdapterFormatError, NonFiniteError: the source cannot be read, or names modules
            that the target does not know.
        UnsupportedError: the adapter has something that the target has no place for, or that lorakit cannot translate.
        OSError: the disk refused. Nothing was written after any of these.
    """
    _check_format(to)
    path, target = Path(source).expanduser(), Path(output).expanduser()
    _check_component(component)
    name = _recognised(path) if from_ is None else from_
    _check_format(name)
    if name == to:
        raise ConfigError(f"{path}: is of the format {to!r} already")
    context = Context(None if base is None else open_base(base), overwrite)
    progress("converting", 0, 2)
    adapter = _selected(FORMATS[name].read(path, context), component, to)
    if not all(part.pieces for part in adapter.parts):
        raise AdapterFormatError(f"{path}: no factors in it")
    refuse_features(adapter, FORMATS[to])
    context.notes += _not_kept(adapter, to)
    progress("converting", 1, 2)
    FORMATS[to].write(adapter, target, context)
    progress("converting", 2, 2)
    pieces = [piece for part in adapter.parts for piece in part.pieces.values()]
    return Converted(
        output=str(target),
        from_format=name,
        to_format=to,
        components=tuple(part.component for part in adapter.parts if part.component),
        modules=len(pieces),
        parameters=sum(piece.factors.A.numel() + piece.factors.B.numel() for piece in pieces),
        notes=tuple(context.notes),
    )


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r}{NearNames(FORMATS)(name)}; there are {', '.join(FORMATS)}")


def _check_component(component: str | None) -> None:
    if component is not None and component not in COMPONENTS:
        raise ConfigError(f"no component {component!r}; there are {', '.join(COMPONENTS)}")


def _recognised(path: Path) -> str:
    """The one format that a path is of."""
    if not path.exists():
        raise AdapterNotFoundError(f"{path}: no such file or folder")
    found = [name for name, form in FORMATS.items() if form.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{path}: could be of the formats {' and '.join(found)}; say which: from_=... (--from)"
        )
    raise AdapterFormatError(
        f"{path}: of none of the formats {', '.join(FORMATS)}, as far as its names tell; say which it should be: "
        "from_=... (--from)"
    )


def _selected(adapter: Adapter, component: str | None, to: str) -> Adapter:
    """The parts that go into the target."""
    parts: tuple[Part, ...] = adapter.parts
    if component is not None:
        parts = tuple(
            replace(part, component=component) for part in parts if part.component in {"", component}
        )
        if not parts:
            held = ", ".join(part.component for part in adapter.parts)
            raise ConfigError(f"{adapter.where}: holds adapters of {held}, none of {component}")
    if len(parts) > 1 and not FORMATS[to].pipelines:
        held = ", ".join(part.component for part in parts)
        raise ConfigError(
            f"{adapter.where}: holds adapters of {held}, and a file of the format {to!r} holds one; say which: component=... "
            "(--component)"
        )
    if FORMATS[to].pipelines:
        parts = tuple(replace(part, component=_component_of(part)) for part in parts)
    return replace(adapter, parts=parts)


def _component_of(part: Part) -> str:
    """The model of a pipeline that a part is for: as it says itself, or as its names say."""
    if part.component:
        return part.component
    if any(path.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for path in part.pieces):
        return "unet"
    raise ConfigError(
        f"which model of the pipeline is the adapter for? component=... (--component), one of {', '.join(COMPONENTS)}"
    )


def _not_kept(adapter: Adapter, to: str) -> list[str]:
    """A note on what the config says and the target has no place for, though it changes no weight."""
    plain = LoraConfig().to_dict()
    told = [part.config.to_dict() for part in adapter.parts]
    lost = {
        f"{name}={fields[name]!r}": None
        for fields in told
        for name in SETTINGS
        if name not in FORMATS[to].keeps and fields[name] != plain[name]
    }
    return [f"not in the file: {', '.join(lost)}"] if lost else []
