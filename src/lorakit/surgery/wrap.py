"""Putting wrappers around modules and around bare parameters, wherever in a nest those go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.layers import PARAMETER, Linear, ParamWrapper, Place
from lorakit.layers.together import group_of, is_alike
from lorakit.surgery.describe import may_read
from lorakit.surgery.naming import outermost_first
from lorakit.weights import find_codec

if TYPE_CHECKING:
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
        layer.is_read = any(may_read(place.owner, place.attribute) for place in node.places)
    registry.install(path, node.places, layer)
    registry.layers[path] = layer
    if isinstance(layer, Linear) and node.places and is_alike(node.places[0].attribute):
        _group(layer, node.places[0].owner)


def _group(layer: Linear, parent: nn.Module) -> None:
    """Join a layer to those of its siblings that may read the same input."""
    row = layer.layout.row
    siblings = {
        name: child
        for name, child in parent._modules.items()
        if isinstance(child, Linear) and child.layout.row == row and is_alike(name)
    }
    group = group_of(siblings)
    if group is not None:
        for sibling in siblings.values():
            sibling.group = group


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
