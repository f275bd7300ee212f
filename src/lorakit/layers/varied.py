"""What an adapter has on a layer beside its factors: the parts of its variant, and what it takes off the base.

An offset is a pair of factors that belongs to one adapter and is never trained: the adapter adds
`scaling * B A - offset` to the untouched base, so that others on the same base see nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lorakit.layers.chosen import carried_by
from lorakit.layers.factors import acting_rate, let_go
from lorakit.variants import Call, Effect, Held

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorakit.layers.chosen import Chosen
    from lorakit.layers.holding import HoldingLayer
    from lorakit.types import Factors


class Kept(dict[str, dict[str, Any]]):
    """What variants keep on a layer, by adapter; copies and pickles of the layer begin without any."""

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class PartHolder(nn.Module):
    """A module that holds tensors of a variant, under the names that the variant gives them."""


class Offset(nn.Module):
    """What one adapter takes off the base: `scaling * B A`, of the layout's shapes.

    No file of an adapter holds it as such (`lorakit.exporting`); a state dict of the whole model does.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.scaling = scaling

    def held(self) -> Held:
        """As an adapter that adds it negatively."""
        return Held(self.A, self.B, None, -self.scaling, {})


# ---- tensors --------------------------------------------------------------------------------------------


def hold_parts(layer: HoldingLayer, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Make the parameters of a variant's parts out of these very tensors."""
    for part, place in layer.variants[name].parts.items():
        parameter = nn.Parameter(tensors[part], requires_grad=False)
        if place.holder not in layer._modules:
            layer.register_module(place.holder, nn.ModuleDict() if place.in_module else nn.ParameterDict())
        holder = cast("Any", layer._modules[place.holder])
        if not place.in_module:
            holder[name] = parameter
            continue
        if name not in holder:
            holder[name] = PartHolder()
        holder[name].register_parameter(place.attribute, parameter)


def drop_parts(layer: HoldingLayer, name: str) -> None:
    """Let what an adapter has beside its factors go."""
    variant = layer.variants.pop(name, None)
    for place in () if variant is None else variant.parts.values():
        holder = cast("Any", layer._modules.get(place.holder))
        if holder is not None:
            let_go(name, holder)
            if not len(holder):
                del layer._modules[place.holder]
    offsets = layer._modules["lora_offset"]
    if isinstance(offsets, nn.ModuleDict):
        let_go(name, offsets)
        if not len(offsets):
            layer.lora_offset = None
    layer.frozen.pop(name, None)
    layer.kept.pop(name, None)


def parts_of(layer: HoldingLayer, name: str) -> dict[str, nn.Parameter]:
    """The parameters of a variant's parts, by part."""
    if name not in layer.variants:
        return {}
    found = {}
    for part, place in layer.variants[name].parts.items():
        held = cast("Any", layer._modules[place.holder])[name]
        found[part] = held._parameters[place.attribute] if place.in_module else held
    return found


def offset_of(layer: HoldingLayer, name: str) -> Held | None:
    """What an adapter takes off the base, as one that adds it negatively; None where it takes nothing."""
    if layer.lora_offset is None or name not in layer.lora_offset:
        return None
    return cast("Offset", layer.lora_offset[name]).held()


def held_by(layer: HoldingLayer, name: str) -> Held:
    """The tensors of an adapter on a layer."""
    A, B, bias = layer.stored(name)
    return Held(A, B, bias, layer.scaling[name], parts_of(layer, name))


# ---- what it makes of the weight ------------------------------------------------------------------------


def effect_of(layer: HoldingLayer, name: str) -> Effect:
    """What an adapter makes of the weight, but for its offset; differentiable.

    Raises:
        UnsupportedError: its variant has no such effect.
    """
    variant = layer.variants.get(name)
    if variant is None:
        A, B, _ = layer.stored(name)
        return Effect(A, B)
    return variant.effect(held_by(layer, name), layer.layout, layer.read_weight)


def changes_of(layer: HoldingLayer, name: str) -> tuple[list[tuple[Factors, ...]], Tensor | None]:
    """What merging an adapter adds, as blocks of one or two pairs, and what it multiplies rows by; detached.

    Raises:
        UnsupportedError: as `effect_of`.
    """
    effect = effect_of(layer, name)
    bias = layer.stored(name).bias
    own = layer.layout.split(
        effect.A.detach(),
        effect.B.detach(),
        float(layer.scaling[name]),
        None if bias is None else bias.detach(),
    )
    found = [own]
    offset = offset_of(layer, name)
    if offset is not None:
        found.append(layer.layout.split(offset.A, offset.B, float(offset.scaling)))
    return found, None if effect.rows is None else effect.rows.detach()


def total_rows(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The factor on the rows of W when several adapters each make `rows W` of it: `1 + sum (rows - 1)`."""
    some = [row for row in rows if row is not None]
    return None if not some else torch.stack([row - 1 for row in some]).sum(dim=0) + 1


# ---- forward --------------------------------------------------------------------------------------------


def plain_on(layer: HoldingLayer) -> tuple[str, ...]:
    """The adapters on a layer that are plain LoRA and take nothing off the base."""
    apart = layer.lora_offset if layer.lora_offset is not None else ()
    return tuple([name for name in layer.r if name not in layer.variants and name not in apart])


def parted(layer: HoldingLayer, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adapters with factors among some: those that add the plain product, and those with a variant of their own."""
    variants = layer.variants
    plain = tuple([name for name in names if name in layer.r and name not in variants])
    return plain, tuple([name for name in names if name in variants]) if variants else ()


def parted_by_sample(layer: HoldingLayer, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same for a batch with an adapter for each sample: what takes something off the base goes by itself too."""
    plain, varied = parted(layer, names)
    if layer.lora_offset is None:
        return plain, varied
    apart = tuple(name for name in plain if name in layer.lora_offset)
    return tuple(name for name in plain if name not in apart), (*varied, *apart)


def call_of(
    layer: HoldingLayer,
    name: str,
    base_y: Tensor,
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor, Held], Tensor],
) -> Call:
    """The running call as the variant of one adapter sees it; see `add_variants`."""
    dropout, state = layer.lora_dropout[name], layer._original_state()
    return Call(
        x=x,
        base_y=base_y,
        bias=state.bias,
        layout=layer.layout,
        held=held_by(layer, name),
        rate=acting_rate(dropout),
        dropped=partial(dropout, x),
        training=layer.training,
        base=base,
        add=add,
        weight=layer.read_weight,
        stored=state.weight,
        kept=layer.kept.setdefault(name, {}),
        peer=partial(held_by, layer),
        peers=partial(plain_on, layer),
        chosen=carried_by(layer.owner, name),
    )


def add_variants(
    layer: HoldingLayer,
    names: Sequence[str],
    y: Tensor,
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor, Held], Tensor],
) -> Tensor:
    """Y with what adapters with variants add.

    Args:
        layer: that they are on.
        names: of these adapters.
        y: the base's output for x, given away.
        x: the layer's input.
        base: gives the base's output for another input.
        add: gives y plus what a plain adapter with such tensors adds to it, for (y, x, held).
    """
    base_y = y
    for number, name in enumerate(names):
        if number == 0 and len(names) > 1:
            y = y.clone()  # the others need what the base gave
        y = layer.variants[name].forward(y, call_of(layer, name, base_y, x, base, add))
        offset = offset_of(layer, name)
        if offset is not None:
            y = add(y, x, offset)
    return y


def add_by_sample(
    chosen: Chosen,
    names: tuple[str, ...],
    y: Tensor,
    x: Tensor,
    one: Callable[[str, Tensor, Tensor], Tensor],
) -> Tensor:
    """Y with what some adapters add, each to its own samples.

    Args:
        chosen: who goes through what.
        names: of these adapters.
        y: (samples, ..., out), the base's output for x.
        x: (samples, ...), the layer's input.
        one: gives y with what one adapter adds, for (name, y, x) of its samples; it may write into y.
    """
    groups = chosen.groups(names, x.shape[0], x.device)
    for number in groups.used:
        rows = (groups.ids == number).nonzero().squeeze(1)
        y = y.index_copy(0, rows, one(names[number], y[rows], x[rows]).to(y.dtype))
    return y


def one_apart(
    layer: HoldingLayer,
    base: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor, Held], Tensor],
    plain: Callable[[str, Tensor, Tensor], Tensor],
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """What `add_by_sample` takes, for adapters that have a variant or an offset.

    Args:
        layer: that they are on.
        base: as `add_variants` takes it.
        add: as `add_variants` takes it.
        plain: gives y with what an adapter without variant adds, for (name, y, x).
    """

    def one(name: str, y: Tensor, x: Tensor) -> Tensor:
        varied = name in layer.variants
        return add_variants(layer, [name], y, x, base, add) if varied else plain(name, y, x)

    return one


def calling(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """A module as a function of its input alone, with the further arguments of the running call."""

    def call(x: Tensor) -> Tensor:
        found: Tensor = module(x, *args, **kwargs)
        return found

    return call
