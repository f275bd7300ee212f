"""The only walk of a model's tree. Everything that plans reads its result.

The walk passes by what adapters have put there, so its cost does not grow with their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorakit.layers import LoraLayer, ModulesToSaveWrapper, ParamWrapper, Place, kind_of
from lorakit.weights import find_codec
from lorakit.weights.opaque import may_be_opaque

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorakit.layers import LayerKind
    from lorakit.weights import WeightCodec


class Node(NamedTuple):
    """One module of a model, at the first path where the walk meets it."""

    path: str
    module: nn.Module
    """The base module: what wrappers wrap, not a wrapper."""
    kind: LayerKind | None
    """The layer type that adapts it, or None."""
    layer: LoraLayer | None
    """The wrapper, where the module carries adapters as a whole."""
    wrappers: tuple[ParamWrapper, ...]
    """The wrappers of its bare parameters that carry adapters, the outermost first."""
    places: tuple[Place, ...]
    """Every attribute that holds it; a module shared between parents has several."""
    codec: WeightCodec | None
    """How its weight is stored, where a layer type adapts it and the way is known."""


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

    def embedding(self, side: str) -> nn.Module | None:
        """The base module of the "input" or "output" embedding, where the model names one."""
        return embedding_of(self.model, side)

    def path_of(self, module: nn.Module | None) -> str | None:
        """The path of a base module, or None."""
        return next((path for path, node in self.nodes.items() if node.module is module), None)


def embedding_of(model: nn.Module, side: str) -> nn.Module | None:
    """What a model says is its "input" or "output" embedding, below our wrappers; None where it names none."""
    getter = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):  # transformers' way of saying that a model has none
        return None
    if isinstance(found, LoraLayer):
        return found.get_base_layer()
    if isinstance(found, ModulesToSaveWrapper):
        return found.original_module
    return found if isinstance(found, nn.Module) else None


def describe(
    model: nn.Module, instead: Mapping[int, nn.Module] | None = None, without: str | None = None
) -> Description:
    """Walk `model` once.

    Args:
        model: any module.
        instead: modules to go on with in place of others, by the `id` of those.
        without: an adapter to pass over: the model is described as if it were gone.
    """
    nodes: dict[str, Node] = {}
    saved: dict[str, ModulesToSaveWrapper] = {}
    paths: dict[int, str] = {}
    kinds: dict[type, LayerKind | None] = {}
    stack: list[tuple[str, nn.Module, Place | None]] = [("", model, None)]
    while stack:
        path, module, place = stack.pop()
        module = instead.get(id(module), module) if instead else module
        module = module if without is None else _without(module, without)
        if id(module) in paths:
            _note_place(nodes, paths[id(module)], place)
            continue
        paths[id(module)] = path
        if isinstance(module, ModulesToSaveWrapper):
            saved[path] = module
            continue
        nodes[path] = node = _node(path, module, place, kinds)
        prefix = f"{path}." if path else ""
        stack += [
            (prefix + name, child, Place(node.module, name))
            for name, child in reversed(node.module._modules.items())
            if child is not None
        ]
    return Description(model, nodes, saved)


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The model's own modules, and the copies of those trained whole; not what carries adapters."""
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        while "base_layer" in module._modules and isinstance(module, LoraLayer):
            module = module.base_layer
        if module not in seen:
            seen.add(module)
            yield module
            stack += [child for child in module._modules.values() if child is not None]


def _without(module: nn.Module, adapter: str) -> nn.Module:
    """What is left of a module when an adapter is taken off it."""
    while isinstance(module, LoraLayer) and set(module.adapters) <= {adapter}:
        module = module.base_layer
    if isinstance(module, ModulesToSaveWrapper) and set(module.adapters) <= {adapter}:
        return module.original_module
    return module


def _node(path: str, module: nn.Module, place: Place | None, kinds: dict[type, LayerKind | None]) -> Node:
    """The node of one module; `kinds` is what was found of modules of the same class."""
    places = () if place is None else (place,)
    wrappers: tuple[ParamWrapper, ...] = ()
    layer = module if "base_layer" in module._modules and isinstance(module, LoraLayer) else None
    base = module if layer is None else layer.base_layer
    if isinstance(layer, ParamWrapper):
        base, wrappers, layer = layer.get_base_layer(), tuple(layer.chain()), None
    if type(base) not in kinds or may_be_opaque(type(base)):
        kinds[type(base)] = kind_of(base)
    kind = kinds[type(base)]
    return Node(path, base, kind, layer, wrappers, places, None if kind is None else find_codec(base))


def _note_place(nodes: dict[str, Node], path: str, place: Place | None) -> None:
    if path in nodes and place is not None:
        nodes[path] = nodes[path]._replace(places=(*nodes[path].places, place))


def is_read_by_parent(module: nn.Module) -> bool:
    """Whether the parent reads the module's weight instead of calling it (`nn.MultiheadAttention.out_proj`)."""
    return type(module) is NonDynamicallyQuantizableLinear


def is_read(node: Node) -> bool:
    """Whether some forward of a parent computes with the module's weight and does not call it."""
    return any(
        place.attribute in _READ.get(kind.__name__, ())
        for place in node.places
        if place.attribute in _EVER_READ
        for kind in type(place.owner).__mro__
    )


# Torch's encoder layer does so in eval mode, the state-space mixers with their CUDA kernels (and the first kinds always
# for dt_proj).
_SCAN, _GATED = ("x_proj", "dt_proj", "out_proj", "conv1d"), ("out_proj", "conv1d")
_READ: dict[str, tuple[str, ...]] = {
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer"), _SCAN),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer"), _GATED),
    **dict.fromkeys(("GraniteMoeHybridMambaLayer", "Zamba2MambaMixer"), _GATED),
}
_EVER_READ = frozenset(name for names in _READ.values() for name in names)
