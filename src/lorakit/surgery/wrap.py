"""Putting wrappers around modules and around bare parameters, wherever in a nest those go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.layers import PARAMETER, Linear, ParamWrapper, Place
from lorakit.layers.together import group_of, is_alike
from lorakit.surgery.describe import is_read
from lorakit.surgery.naming import outermost_first
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from lorakit.layers import LoraLayer
    from lorakit.surgery.describe import Description
    from lorakit.surgery.registry import AdapterRegistry


def wrap_module(registry: AdapterRegistry, description: Description, path: str) -> None:
    """Put a layer around the module at a path, if there is none yet."""
    if path in registry.layers:
        return
    node = description.nodes[path]
    kind, codec = node.kind, node.codec
    assert kind is not None
    assert codec is not None
    layer = kind.layer(node.module, codec)
    _prepare(registry, layer)
    if isinstance(layer, Linear):
        layer.__dict__["is_read"] = is_read(node)
    registry.install(path, node.places, layer)
    registry.layers[path] = layer


def group_siblings(registry: AdapterRegistry, description: Description, paths: Iterable[str]) -> None:
    """Join layers, just wrapped, to those of their siblings that may read the same input."""
    found: set[tuple[nn.Module, tuple[int, ...]]] = set()
    for path in paths:
        layer = registry.layers[path]
        if isinstance(layer, Linear):
            found.update(
                (place.owner, layer.layout.row)
                for place in description.nodes[path].places[:1]
                if is_alike(place.attribute)
            )
    for parent, row in found:
        siblings = {
            name: child
            for name, child in parent._modules.items()
            if type(child) is Linear and child.layout.row == row and is_alike(name)
        }
        group = group_of(siblings)
        if group is not None:
            for sibling in siblings.values():
                sibling.__dict__["group"] = group


def wrap_parameter(registry: AdapterRegistry, description: Description, path: str) -> None:
    """Put a wrapper of one parameter around its module, at its place among those that are there.

    The order is that of the module's parameters, so that names do not depend on which adapter came first.
    """
    if path in registry.layers:
        return
    module_path, _, attribute = path.rpartition(".")
    node = description.nodes[module_path]
    here = [name for name in registry.layers if name.rpartition(".")[0] == module_path]
    here = [name for name in here if isinstance(registry.layers[name], ParamWrapper)]
    order = outermost_first(node.module, [attribute, *(name.rpartition(".")[2] for name in here)])
    position = order.index(attribute)
    inner: nn.Module = node.module
    if position + 1 < len(order):
        inner = registry.layers[f"{module_path}.{order[position + 1]}"]
    codec = find_codec(node.module, attribute)
    assert codec is not None
    layer = PARAMETER.layer(inner, codec)
    _prepare(registry, layer)
    if position:
        outer = registry.layers[f"{module_path}.{order[position - 1]}"]
        places: tuple[Place, ...] = (Place(outer, "base_layer"),)
    elif isinstance(inner, ParamWrapper):
        places = registry.places[f"{module_path}.{order[1]}"]
    else:
        places = node.places
    if isinstance(inner, ParamWrapper):
        registry.places[f"{module_path}.{order[position + 1]}"] = (Place(layer, "base_layer"),)
    registry.install(path, places, layer)
    registry.layers[path] = layer


def _prepare(registry: AdapterRegistry, layer: LoraLayer) -> None:
    layer.enter(registry.owner, registry.active, enabled=registry.enabled)
