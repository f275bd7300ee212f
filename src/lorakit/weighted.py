"""`add_weighted_adapter`: a new adapter of a model out of several that are there.

The factors are combined weight by weight by a method of `combiners`. What an adapter owns beside factors (whole
modules, trained biases, token rows) is combined as what it changes: base + sum of weight · (own - base).
The config of the result is written from its tensors, so that it always loads again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.combiners import CombineOptions, check_request, combine
from lorakit.config import check_adapter_name, combined_config
from lorakit.errors import AdapterNameError, UnsupportedError, at_path
from lorakit.layers import Embedding, ParamWrapper, attention_parts
from lorakit.layouts import filled
from lorakit.specs import TOKEN_ROWS
from lorakit.surgery import describe, make_plan
from lorakit.surgery.attach import New, put
from lorakit.surgery.naming import names_in_file, whole_module
from lorakit.surgery.targets import shortest_names
from lorakit.types import Factors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lorakit.combiners import Combined
    from lorakit.config import LoraConfig
    from lorakit.layers import LoraLayer
    from lorakit.specs import AdapterSpec
    from lorakit.surgery import AdapterRegistry, Plan

    Blocks = dict[str, tuple[Factors, ...]]


class CombineReport(NamedTuple):
    """What a combination kept of what was asked for.

    Attributes:
        kept: by the path of each changed weight, the share in [0, 1] of the energy (squared Frobenius norm) of the
            wanted delta that the result has; the smallest one of a stack of experts.
        ranks: the rank of the result there.
    """

    kept: dict[str, float]
    ranks: dict[str, int]


class Asked(NamedTuple):
    """The adapters to combine, with their weights."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    options: CombineOptions

    def weight_of(self, name: str) -> float:
        """The sum of the weights under a name: it may be given twice."""
        return sum(w for other, w in zip(self.names, self.weights, strict=True) if other == name)


def add_weighted(
    registry: AdapterRegistry,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    method: str,
    options: CombineOptions,
) -> CombineReport:
    """Put a combination of adapters on the model under a free name, not active.

    Raises:
        AdapterNameError: a name is unknown, or the new one is taken.
        ConfigError: the request is not sound (see `check_request`), or the factors do not go together.
        UnsupportedError: what they own beside factors cannot be combined.
        NonFiniteError: NaN or infinity in the factors or in the result. Nothing was changed after any of these.
    """
    check_adapter_name(adapter_name)
    registry.check_known(adapters)
    if adapter_name in registry.configs:
        raise AdapterNameError(
            f"adapter {adapter_name!r} exists already; choose another name or delete it first"
        )
    check_request(method, len(adapters), weights, options)
    asked = Asked(tuple(adapters), tuple(map(float, weights)), method, options)
    blocks, report = _combined_blocks(registry, asked)
    config = _config(registry, asked, blocks)
    plan = make_plan(registry.model, config, source="file", autocast_adapter_dtype=_is_wide(registry, asked))
    _check_ties(registry, asked, plan)
    factors = {
        spec.path: New.of(spec, _as_planned(blocks[spec.path], spec))
        for spec in plan.specs
        if spec.tied_to is None
    }
    with torch.no_grad():
        rest = dict(_rest(registry, asked, plan))
    put(registry.model, plan, adapter_name, factors, rest)
    return report


def _combined_blocks(registry: AdapterRegistry, asked: Asked) -> tuple[Blocks, CombineReport]:
    """The combined factors of each weight that any of the adapters changes."""
    found: Blocks = {}
    report = CombineReport({}, {})
    for path, layer in registry.layers.items():
        names = [
            (name, weight) for name, weight in zip(asked.names, asked.weights, strict=True) if name in layer.r
        ]
        if not names:
            continue
        with at_path(path):
            results = _combine_layer(path, layer, names, asked)
        found[path] = tuple(result.factors for result in results)
        report.kept[path] = min(result.kept for result in results)
        report.ranks[path] = max(result.factors.rank for result in results) * layer.layout.groups
    return found, report


def _combine_layer(
    path: str, layer: LoraLayer, names: list[tuple[str, float]], asked: Asked
) -> list[Combined]:
    each = [layer.blocks(name) for name, _ in names]
    weights = [weight for _, weight in names]
    if len(names) < len(asked.names) and asked.method == "slerp":
        raise UnsupportedError(
            "slerp is between two deltas, and only one of the adapters is on this layer; use 'sum' or 'svd'"
        )
    return [
        combine(parts, weights, asked.method, asked.options.of_block(path, number, layer.layout.groups))
        for number, parts in enumerate(zip(*each, strict=True))
    ]


def _as_planned(blocks: tuple[Factors, ...], spec: AdapterSpec) -> tuple[Factors, ...]:
    """The blocks with the plan's rank, dtype and device; the rank and a missing bias are filled up with zeros."""
    rank = spec.layout.block_rank(spec.r)
    found = []
    for block in blocks:
        A, B = filled(block.A, rank, dim=0), filled(block.B, rank, dim=1)
        bias = block.bias
        if bias is None and spec.lora_bias:
            bias = B.new_zeros(B.shape[0])
        bias = None if bias is None else bias.to(spec.device, spec.dtype)
        found.append(Factors(A.to(spec.device, spec.dtype), B.to(spec.device, spec.dtype), 1.0, bias))
    return tuple(found)


# ---- the config ---------------------------------------------------------------------------------------


def _config(registry: AdapterRegistry, asked: Asked, blocks: Blocks) -> LoraConfig:
    """A config that describes exactly the combined adapter."""
    configs = [registry.configs[name] for name in dict.fromkeys(asked.names)]
    nodes = describe(registry.model).nodes
    ranks: dict[str, int] = {}
    parameters: list[str] = []
    for path, parts in blocks.items():
        layer = registry.layers[path]
        module = path.rpartition(".")[0]
        inside = module in nodes and bool(attention_parts(nodes[module].module))
        if isinstance(layer, ParamWrapper) and not inside:
            parameters.append(path)
        key = module if inside else path
        rank = max(part.rank for part in parts) * layer.layout.groups
        ranks[key] = max(rank, ranks.get(key, 0))
    modules = shortest_names(ranks.keys() - set(parameters), nodes)
    biased = any(part.bias is not None for parts in blocks.values() for part in parts)
    _check_biases(registry, blocks, biased=biased)
    config = combined_config(
        configs,
        ranks,
        biased=biased,
        modules_to_save=_whole(registry, asked),
        tokens=_tokens(registry, asked),
    )
    return replace(
        config,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _check_biases(registry: AdapterRegistry, blocks: Blocks, *, biased: bool) -> None:
    """Refuse a bias of B on some layers beside layers that have no place for one."""
    without = [path for path in blocks if isinstance(registry.layers[path], (Embedding, ParamWrapper))]
    if biased and without:
        raise UnsupportedError(
            f"some of the adapters have lora_bias=True, and {without} have no place for such a bias; combine adapters "
            "that are on the same kinds of layers"
        )


def _whole(registry: AdapterRegistry, asked: Asked) -> list[str]:
    return [
        path for path, wrapper in registry.saved.items() if not set(asked.names).isdisjoint(wrapper.adapters)
    ]


def _tokens(registry: AdapterRegistry, asked: Asked) -> dict[str, list[int]]:
    """The tokens that any of the adapters replaces, by module."""
    found = {}
    for path, layer in registry.layers.items():
        rows = layer.token_adapter
        tokens = {t for name in asked.names for t in (rows.token_indices.get(name, ()) if rows else ())}
        if tokens:
            found[path] = sorted(tokens)
    return found


def _is_wide(registry: AdapterRegistry, asked: Asked) -> bool:
    """Whether the adapters of a half-precision base are kept in fp32."""
    tensors = [item.tensor for item in registry.tensors(asked.names[0])]
    return not any(tensor.dtype in {torch.float16, torch.bfloat16} for tensor in tensors)


def _check_ties(registry: AdapterRegistry, asked: Asked, plan: Plan) -> None:
    """Refuse to tie what one of the adapters has apart."""
    for token in plan.tokens:
        if token.tied_to is None:
            continue
        layer, source = registry.layers[token.path], registry.layers[token.tied_to]
        for name in asked.names:
            both = all(item.token_adapter and name in item.token_adapter.adapters for item in (layer, source))
            if both and layer.tied_rows.get(name) is not source and source.tied_rows.get(name) is not layer:
                raise UnsupportedError(
                    f"{name!r} trains the rows of {token.path} and {token.tied_to} apart, others have them tied, and "
                    "the result could have only one of the two"
                )


# ---- what is no factor ----------------------------------------------------------------------------------


def _rest(registry: AdapterRegistry, asked: Asked, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Whole modules, biases and token rows of the result, by their names in a file."""
    for path in plan.modules_to_save:
        base = whole_module(plan, path).state_dict()
        owned = {name: dict(registry.saved[path].tensors(name)) for name in asked.names}
        for key, value in base.items():
            own = {name: tensors[key] for name, tensors in owned.items() if tensors}
            with at_path(f"{path}.{key}"):
                yield f"{path}.{key}", _changed(value, own, asked)
    for token in plan.tokens:
        if token.tied_to is None:
            yield f"{token.path}.{TOKEN_ROWS}", _rows(registry.layers[token.path], token.indices, asked)
    names = names_in_file(plan)
    for parameter in plan.biases:
        slot = registry.slots.get(parameter)
        original = plan.base_parameter(parameter) if slot is None else slot.original
        copies: Mapping[str, Tensor] = {} if slot is None else slot.copies
        yield (
            names.parameter(parameter),
            _changed(original, {n: copies[n] for n in asked.names if n in copies}, asked),
        )


def _rows(layer: LoraLayer, tokens: Sequence[int], asked: Asked) -> Tensor:
    """The rows of each token: what those adapters that replace it make of it."""
    base = layer.original_rows(tokens)
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    wide = total.clone()
    rows = layer.token_adapter
    assert rows is not None
    place = {token: number for number, token in enumerate(tokens)}
    for name in dict.fromkeys(asked.names):
        mine = [place[token] for token in rows.token_indices.get(name, ())]
        if mine:
            index = torch.tensor(mine, device=base.device)
            change = (rows.rows(name).to(wide.dtype) - wide[index]) * asked.weight_of(name)
            total.index_add_(0, index, change)
    return total


def _changed(base: Tensor, own: Mapping[str, Tensor], asked: Asked) -> Tensor:
    """Base + sum of weight · (own - base), in fp32 at least, rounded once.

    Raises:
        UnsupportedError: tensors of integers differ.
    """
    if not base.is_floating_point():
        if any(not torch.equal(value.to(base), base) for value in own.values()):
            raise UnsupportedError("a buffer of integers differs from the base's, and has no weighted sum")
        return base
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide, copy=True)
    for name, value in own.items():
        total += (value.to(wide) - base.to(wide)) * asked.weight_of(name)
    return total.to(base.dtype)
