"""The only walk of a model's tree. Everything that plans reads its result.

The walk stops at modules that already carry adapters, so its cost does not grow with their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.layers import LoraLayer, ModulesToSaveWrapper, Place, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.layers import LayerKind


class Node(NamedTuple):
    """One module of a model, at the first path where the walk meets it."""

    path: str
    module: nn.Module
    """The base module: what a `LoraLayer` wraps, not the wrapper."""
    kind: LayerKind | None
    """The layer type that adapts it, or None."""
    layer: LoraLayer | None
    """The wrapper, where the module already carries adapters."""
    places: tuple[Place, ...]
    """Every attribute that holds it; a module shared between parents has several."""


class Description(NamedTuple):
    """What planning needs to know of a model."""

    model: nn.Module
    nodes: dict[str, Node]
    saved: dict[str, ModulesToSaveWrapper]

    def children_of(self, path: str) -> Iterator[Node]:
        """The node at `path` and all below it."""
        for node in self.nodes.values():
            if node.path == path or node.path.startswith(path + "."):
                yield node

    def model_type(self) -> str | None:
        """`model.config.model_type` of a transformers model, else None."""
        found = getattr(getattr(self.model, "config", None), "model_type", None)
        return found if isinstance(found, str) else None

    def output_embedding(self) -> nn.Module | None:
        """The head that makes logits over a vocabulary, where the model names one."""
        getter = getattr(self.model, "get_output_embeddings", None)
        found = getter() if callable(getter) else None
        return found if isinstance(found, nn.Module) else None


def describe(model: nn.Module) -> Description:
    """Walk `model` once."""
    nodes: dict[str, Node] = {}
    saved: dict[str, ModulesToSaveWrapper] = {}
    paths: dict[int, str] = {}
    stack: list[tuple[str, nn.Module, Place | None]] = [("", model, None)]
    while stack:
        path, module, place = stack.pop()
        if id(module) in paths:
            _note_place(nodes, paths[id(module)], place)
            continue
        paths[id(module)] = path
        if isinstance(module, ModulesToSaveWrapper):
            saved[path] = module
            continue
        layer = module if isinstance(module, LoraLayer) else None
        base = layer.base_layer if layer is not None else module
        nodes[path] = Node(path, base, kind_of(base), layer, () if place is None else (place,))
        if layer is None:
            children = reversed(list(module._modules.items()))
            stack += [
                (f"{path}.{name}" if path else name, child, Place(module, name))
                for name, child in children
                if child is not None
            ]
    return Description(model, nodes, saved)


def _note_place(nodes: dict[str, Node], path: str, place: Place | None) -> None:
    if path in nodes and place is not None:
        nodes[path] = nodes[path]._replace(places=(*nodes[path].places, place))


def is_read_by_parent(module: nn.Module) -> bool:
    """Whether the parent reads the module's weight instead of calling it (`nn.MultiheadAttention.out_proj`)."""
    return type(module) is NonDynamicallyQuantizableLinear
