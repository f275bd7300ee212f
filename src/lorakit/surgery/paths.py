"""Where a tensor is once modules are wrapped: the names inside the base model, with `base_layer` put in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def located(path: str, wrapped: Mapping[str, int]) -> str:
    """A path of the base model as files and state dicts have it.

    Args:
        path: of a module or a parameter.
        wrapped: how many wrappers are around a module, by its path. Those around the module `path` itself do not
            count: what is asked for is the outermost.
    """
    if not wrapped:
        return path
    parts = path.split(".")
    found: list[str] = []
    for number, part in enumerate(parts):
        found.append(part)
        if number < len(parts) - 1:
            found += ["base_layer"] * wrapped.get(".".join(parts[: number + 1]), 0)
    return ".".join(found)


def nested(path: str, depth: int) -> str:
    """The path of the wrapper that has `depth` others of its module around it."""
    return path + ".base_layer" * depth


def joined(path: str, name: str) -> str:
    """A name below a path; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name
