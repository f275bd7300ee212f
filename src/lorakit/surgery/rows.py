"""The rows of a plan: what a config puts on one module or one bare parameter, or why it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lorakit.config import NearNames, ends_in
from lorakit.init.registry import (
    FROM_WEIGHT,
    FROZEN,
    REPLACES_BASE,
    TAKES_OFF,
    initialiser_name,
    initialiser_options,
    why_not_begin,
)
from lorakit.layers import PARAMETER, attention_parts
from lorakit.layers.whole import has_own_forward
from lorakit.specs import AdapterSpec, adapter_dtype, scaling_of
from lorakit.surgery.describe import is_read, is_read_by_parent
from lorakit.surgery.paths import joined
from lorakit.surgery.registry import find_registry
from lorakit.variants import variant_of
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from lorakit.config import LoraConfig, Matcher
    from lorakit.layers import LayerKind
    from lorakit.layouts import Layout
    from lorakit.surgery.describe import Description, Node
    from lorakit.surgery.ties import Ties
    from lorakit.surgery.tokens import TokenSpec
    from lorakit.variants import Variant
    from lorakit.weights import WeightCodec


class Rules(NamedTuple):
    """What every row of a plan needs.

    Attributes:
        config: with `target_modules` resolved.
        matcher: of that config.
        problems: what does not fit, added to.
        from_file: whether the config describes tensors that exist already; what only training needs is not asked then.
        widen: keep adapters of a half-precision base in fp32.
        variant: what the adapter is more than plain LoRA, or None.
        init: name of the initialiser.
        init_options: what the config says of it.
        frozen: which tensors of an adapter are never trained.
    """

    config: LoraConfig
    matcher: Matcher
    problems: list[str]
    from_file: bool
    widen: bool
    variant: Variant | None
    init: str
    init_options: object
    frozen: frozenset[str]

    @staticmethod
    def of(
        config: LoraConfig, matcher: Matcher, problems: list[str], *, from_file: bool, widen: bool
    ) -> Rules:
        """What a config says of every row alike, found once; see `Rules` for the arguments."""
        variant, init = variant_of(config), initialiser_name(config.init_lora_weights)
        frozen = FROZEN.get(init, frozenset()) | (variant.frozen if variant else frozenset())
        return Rules(
            config, matcher, problems, from_file, widen, variant, init, initialiser_options(config), frozen
        )


class Kept(NamedTuple):
    """The dtype of the numbers that a weight stands for, where it is, whether it is quantised and can be read."""

    dtype: torch.dtype
    device: torch.device
    on_grid: bool
    can_read: bool


def _kept(codec: WeightCodec, base: nn.Module) -> Kept:
    return Kept(codec.dtype(base), codec.state(base).weight.device, codec.on_grid, codec.can_read)


def module_rows(node: Node, rules: Rules, description: Description) -> list[AdapterSpec]:
    """The rows for one targeted module, or none and a problem."""
    parts = attention_parts(node.module)
    if parts:
        return _attention_rows(node, parts, rules, description)
    problem = _why_not(node)
    if problem:
        rules.problems.append(f"{node.path}: {problem}")
        return []
    codec = node.codec
    assert node.kind is not None
    assert codec is not None
    layout = codec.layout(node.module) if node.layer is None else node.layer.layout
    drops = node.kind.is_linear or not has_own_forward(node.module)
    called = drops and not is_read(node)
    kept = _kept(codec, node.module)
    return _row(node.path, node.kind, layout, kept, rules, drops=drops, called=called)


def parameter_rows(description: Description, rules: Rules, loose: list[str]) -> Iterator[AdapterSpec]:
    """The rows for `target_parameters`; entries that match nothing go to `loose`."""
    wanted = dict.fromkeys(rules.config.target_parameters or (), False)
    if not wanted:
        return
    names: list[str] = []
    for node in description.nodes.values():
        for attribute, _ in node.module.named_parameters(recurse=False):
            name = joined(node.path, attribute)
            names.append(name)
            hits = [entry for entry in wanted if ends_in(name, entry)]
            if hits:
                wanted.update(dict.fromkeys(hits, True))
                yield from _parameter_row(node, attribute, rules)
    near = NearNames(names)
    for entry, hit in wanted.items():
        if not hit:
            loose.append(f"target_parameters: {entry!r} matches no parameter{near(entry)}")


def _attention_rows(
    node: Node, parts: tuple[tuple[str, bool], ...], rules: Rules, description: Description
) -> list[AdapterSpec]:
    rows: list[AdapterSpec] = []
    for name, is_parameter in parts:
        if is_parameter:
            rows += _parameter_row(node, name, rules, matched_as=node.path)
            continue
        child = description.nodes[joined(node.path, name)]
        codec = child.codec
        if child.wrappers or codec is None or child.kind is None:
            problem = _taken(child) if child.wrappers else _stored(child.module)
            rules.problems.append(f"{child.path}: {problem}")
            continue
        kept = _kept(codec, child.module)
        rows += _row(child.path, child.kind, codec.layout(child.module), kept, rules, node.path)
    return rows


def _parameter_row(
    node: Node, attribute: str, rules: Rules, matched_as: str | None = None
) -> list[AdapterSpec]:
    """The row of one parameter; `matched_as` is the path of the attention module that was named in its stead."""
    path = joined(node.path, attribute)
    problem = _why_not_parameter(node, attribute) or ("" if matched_as else _why_not_bare(node, rules))
    if problem:
        rules.problems.append(f"{path}: {problem}")
        return []
    codec = find_codec(node.module, attribute)
    assert codec is not None
    return _row(path, PARAMETER, codec.layout(node.module), _kept(codec, node.module), rules, matched_as)


def _why_not_parameter(node: Node, attribute: str) -> str:
    """Why a parameter cannot carry an adapter, or an empty text."""
    weight = node.module._parameters[attribute]
    if not node.path:
        return "a parameter of the model itself, which cannot be wrapped; put it into a module"
    if find_codec(node.module, attribute) is None:
        kind = (
            "none"
            if weight is None
            else f"{type(weight).__name__} of {weight.dtype}, {weight.ndim} dimensions"
        )
        return f"got {kind}; wanted a plain parameter of 2 or 3 dimensions in fp64, fp32, bf16 or fp16"
    if node.layer is not None:
        return f"{node.path} carries an adapter as a module; name it in target_modules or here, not in both"
    return ""


def _why_not_bare(node: Node, rules: Rules) -> str:
    """Why a config may not name a parameter of this module, given what else it names; or an empty text."""
    owner = node.path.rpartition(".")[0] if is_read_by_parent(node.module) else node.path
    if rules.matcher.target(node.path) or rules.matcher.target(owner):
        return f"{owner} is named in target_modules too; name it in one of the two fields"
    parts = node.path.split(".")
    above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    whole = [
        entry for entry in rules.config.modules_to_save or () if any(path.endswith(entry) for path in above)
    ]
    return f"modules_to_save {whole} trains it whole; name it in one of the two fields" if whole else ""


def _row(
    path: str,
    kind: LayerKind,
    layout: Layout,
    kept: Kept,
    rules: Rules,
    matched_as: str | None = None,
    *,
    drops: bool = True,
    called: bool = True,
) -> list[AdapterSpec]:
    """One row, or none and a problem; ranks are looked up for the path, or for the module that was named."""
    config = rules.config
    r, alpha = rules.matcher.rank(matched_as or path), rules.matcher.alpha(matched_as or path)
    drops = drops and kind.drops and not _in_attention(path, matched_as)
    dropout = config.lora_dropout if drops else 0.0
    called = called and not _in_attention(path, matched_as)
    refused = (
        _refused(kind, layout, r, config, drops=drops or rules.from_file)
        or _variant_refused(path, kind, layout, r, rules, called=called)
        or ("" if rules.from_file else why_not_begin(rules.init, layout, r, on_grid=kept.on_grid))
        or _unreadable(kept, rules)
    )
    if refused:
        rules.problems.append(f"{path}: {refused}")
        return []
    return [
        AdapterSpec(
            path=path,
            kind=kind.name,
            layout=layout,
            r=r,
            lora_alpha=alpha,
            scaling=scaling_of(r, alpha, rslora=config.use_rslora),
            dropout=dropout,
            lora_bias=config.lora_bias,
            init=rules.init,
            dtype=adapter_dtype(kept.dtype, widen=rules.widen),
            device=kept.device,
            variant=rules.variant,
            init_options=rules.init_options,
            frozen=rules.frozen,
        )
    ]


def _in_attention(path: str, matched_as: str | None) -> bool:
    return matched_as is not None and matched_as != path


def _refused(kind: LayerKind, layout: Layout, r: int, config: LoraConfig, *, drops: bool) -> str:
    """What of a config this kind of weight cannot do, or an empty text."""
    if r % layout.groups:
        return f"the rank must be divisible by the {layout.groups} groups of this convolution, got r={r}"
    if config.lora_bias and not kind.has_bias:
        return f"lora_bias=True has no place on a {kind.name}; leave it False, or exclude it"
    if config.lora_dropout and not drops:
        return (
            "lora_dropout cannot act here, since the weight is changed and not the input; set lora_dropout=0, or give "
            "these weights an adapter of their own"
        )
    return ""


def _unreadable(kept: Kept, rules: Rules) -> str:
    """What of a config needs to know a weight that cannot be read, or an empty text."""
    variant, init = rules.variant, rules.init
    asks = variant.name if variant is not None and variant.reads else ""
    if init in FROM_WEIGHT and not rules.from_file:
        asks = f"init_lora_weights={init!r}"
    if kept.can_read or not asks:
        return ""
    return (
        f"{asks} needs to know the weight, and this layer keeps it in a way that cannot be read; train plain LoRA from "
        "init_lora_weights=True on it, or leave it out with exclude_modules"
    )


def _variant_refused(
    path: str, kind: LayerKind, layout: Layout, r: int, rules: Rules, *, called: bool
) -> str:
    """Why the variant cannot be on this weight, or an empty text; `called` says whether the layer is called with it."""
    variant = rules.variant
    if variant is None:
        return ""
    if kind.name not in variant.kinds:
        where = ", ".join(sorted(variant.kinds))
        return f"{variant.name} is not defined on a {kind.name}, but on {where}; leave this one out with exclude_modules"
    if not called and not variant.merges:
        return (
            f"{variant.name} acts on what a layer is given, but this layer's weight is read without calling it; leave "
            "it out with exclude_modules"
        )
    return variant.why_not(path, layout, r)


def variant_problems(specs: Sequence[AdapterSpec], tokens: Sequence[TokenSpec]) -> Iterator[str]:
    """Why a variant does not go with what else a config asks for."""
    rows = {token.path for token in tokens}
    for spec in specs:
        if spec.variant is not None and spec.path in rows:
            yield f"{spec.path}: {spec.variant.name} and trainable_token_indices are both on it; use one of them"
        if spec.tied_to is not None and spec.variant is not None:
            yield f"{spec.path}: ensure_weight_tying ties factors, and {spec.variant.name} has more than these"


def begin_problems(
    specs: Sequence[AdapterSpec], ties: Ties | None, description: Description
) -> Iterator[str]:
    """Why an initialiser that looks at the base cannot be run on this model."""
    schemes = {spec.init for spec in specs}
    if schemes & TAKES_OFF and any(spec.tied_to for spec in specs):
        yield "ensure_weight_tying: ties factors, and this init_lora_weights has more than these; set it to False"
    if schemes & TAKES_OFF and any(spec.variant for spec in specs):
        yield (
            f"init_lora_weights: {sorted(schemes & TAKES_OFF)} takes something off the base, which this kind of adapter "
            "would have to know of; set it to True"
        )
    if not schemes & REPLACES_BASE:
        return
    yield from (
        f"{spec.path}: the grouped weight has no place for what {spec.init!r} makes of it; leave it out with "
        "exclude_modules"
        for spec in specs
        if spec.layout.groups > 1
    )
    registry = find_registry(description.model)
    if registry is not None and registry.configs:
        yield (
            f"init_lora_weights: {sorted(schemes & REPLACES_BASE)} replaces the base weights, for which the adapters "
            f"{list(registry.configs)} on this model were made; put it on before any other, or unload() them"
        )
    tied = [] if ties is None else [spec.path for spec in specs if spec.path in {ties.source, *ties.others}]
    if tied:
        yield (
            f"init_lora_weights: {sorted(schemes & REPLACES_BASE)} would untie {tied}, whose weight is also another "
            "module's; leave them out with exclude_modules"
        )


def _why_not(node: Node) -> str:
    """Why a module cannot carry an adapter, or an empty text."""
    module = node.module
    if is_read_by_parent(module):
        return (
            "nn.MultiheadAttention reads this layer's weight without calling it; name the attention module itself, "
            "or leave this one out with exclude_modules"
        )
    if node.wrappers:
        return _taken(node)
    if node.kind is None:
        return (
            f"{type(module).__name__} cannot carry an adapter; lorakit adapts nn.Linear, transformers' Conv1D, "
            "nn.Embedding, nn.Conv1d/2d/3d, nn.MultiheadAttention and known quantised linear layers, and bare parameters "
            "by target_parameters"
        )
    codec = node.codec
    # a linear layer gives such a parent a stand-in, which a quantised weight does not fit into
    apart = not node.kind.is_linear or (codec is not None and codec.on_grid)
    if apart and is_read(node):
        return (
            f"{type(node.places[0].owner).__name__} reads this layer's weight without calling it, so an adapter would "
            "not act; leave it out with exclude_modules"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "this embedding rescales its own weight (max_norm) whenever it is called; it cannot carry an adapter"
    return _stored(module) if codec is None else ""


def _taken(node: Node) -> str:
    taken = [wrapper.parameter_name for wrapper in node.wrappers]
    return f"its parameters {taken} carry adapters already; name them in target_parameters, or delete those"


def _stored(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    stored = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
    return (
        f"{type(module).__name__} keeps its weight as {stored}, which lorakit cannot adapt; "
        "it adapts plain fp64, fp32, bf16 and fp16 numbers"
    )
