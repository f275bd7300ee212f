"""Which weight the factors of an adapter change, and how they lie in it.

A checkpoint says no more of a weight than its shape. That tells an `nn.Linear` from a `Conv1D`, and experts stored one
way from those stored the other; where a matrix is square, what is known of the model's type decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.config import ends_in
from lorakit.errors import AdapterError, UnsupportedError
from lorakit.layouts import Layout, matrix_layout
from lorakit.specs import AdapterSpec, adapter_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorakit.checkpoint.merging.names import Names
    from lorakit.checkpoint.merging.parts import AdapterParts, Site
    from lorakit.checkpoint.merging.weight import Weight

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
_ATTENTION = (("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight"))


@dataclass(frozen=True, slots=True)
class Fit:
    """The factors of one adapter on one weight.

    Attributes:
        adapter: whose they are.
        site: where in its file.
        name: of the weight, in the model.
        layout: how they lie in it.
        named_as: what the config calls it, for its rank and alpha.
    """

    adapter: AdapterParts
    site: Site
    name: str
    layout: Layout
    named_as: str

    def spec(self, base: torch.dtype) -> AdapterSpec:
        """The row that a plan of an adapter in memory has for it."""
        r = self.adapter.rank(self.named_as)
        return AdapterSpec(
            path=self.site.module,
            kind="",
            layout=self.layout,
            r=r,
            lora_alpha=self.adapter.matcher.alpha(self.named_as),
            scaling=self.adapter.scaling(self.named_as),
            dropout=0.0,
            lora_bias="bias" in self.site.keys,
            init="default",
            dtype=adapter_dtype(base, widen=True),
            device=torch.device("cpu"),
            variant=self.adapter.variant,
        )


class _Candidate(NamedTuple):
    """One way to read a weight: the kind of layer that it may belong to, and the layout."""

    kind: str
    layout: Layout
    name: str
    named_as: str


class Fitting:
    """Finds the weights of all sites of one adapter.

    Args:
        adapter: whose sites.
        names: of the base's weights.
        config: the base's `config.json`.
    """

    def __init__(self, adapter: AdapterParts, names: Names, config: Mapping[str, Any]) -> None:
        self._adapter = adapter
        self._names = names
        self._types = _model_types(config)
        self._is_foreign = "auto_map" in config
        self.problems: list[str] = []
        self.unplaced: list[Site] = []

    def run(self) -> list[Fit]:
        """The fits; what does not fit goes to `problems`, what has no weight to `unplaced`."""
        found = []
        taken: set[str] = set()
        for site in sorted(self._adapter.sites.values(), key=lambda site: (site.module, site.depth)):
            try:
                fit = self._fit(site, taken)
            except AdapterError as error:
                self.problems.append(f"{site.path}: {error}")
                continue
            if fit is not None:
                taken.add(fit.name)
                found.append(fit)
        return found

    def _fit(self, site: Site, taken: set[str]) -> Fit | None:
        lacking = self._lacking(site)
        if lacking:
            self.problems.append(f"{site.path}: lacks {', '.join(lacking)}")
            return None
        possible = [(name, named_as) for name, named_as in self._targets(site) if name not in taken]
        weights = {name: self._names.find(name) for name, _ in possible}
        if all(weight is None for weight in weights.values()):
            self.unplaced.append(site)
            return None
        candidates = [
            candidate
            for name, named_as in possible
            for candidate in self._candidates(site, name, named_as, weights[name])
        ]
        fitting = [candidate for candidate in candidates if self._has_shapes(site, candidate)]
        chosen = self._chosen(site, fitting)
        if chosen is None:
            self.problems.append(
                self._misfit(site, candidates, [w for w in weights.values() if w is not None])
            )
            return None
        problem = self._refusal(site, chosen)
        if problem:
            self.problems.append(f"{site.path}: {problem}")
            return None
        return Fit(self._adapter, site, chosen.name, chosen.layout, chosen.named_as)

    # ---- which weight ---------------------------------------------------------------------------------

    def _targets(self, site: Site) -> Iterator[tuple[str, str]]:
        """Names of weights that a site may be for, with what the config calls them."""
        own = f"{site.module}.weight"
        if self._names.find(own) is not None and not site.depth and not self._parameters(site.module):
            yield own, site.named_as
            return
        for name in self._parameters(site.module):
            yield name, name
        for group in _ATTENTION:
            for attribute in group:
                if self._names.find(f"{site.module}.{attribute}") is not None:
                    yield f"{site.module}.{attribute}", site.named_as
        if not site.depth:
            yield own, site.named_as

    def _parameters(self, module: str) -> list[str]:
        """The names of a module's parameters that the config's `target_parameters` mean, the last first."""
        wanted = self._adapter.config.target_parameters or ()
        if not any(ends_in(module, entry.rpartition(".")[0]) or "." not in entry for entry in wanted):
            return []
        here = self._names.below(module)
        return [name for name in here if any(ends_in(name, entry) for entry in wanted)]

    # ---- which way --------------------------------------------------------------------------------------

    def _candidates(
        self, site: Site, name: str, named_as: str, weight: Weight | None
    ) -> Iterator[_Candidate]:
        if weight is None:
            return
        shape = weight.shape
        a = len(self._adapter.info(site.keys["A"]).shape)
        if site.is_embedding and len(shape) == 2:
            yield _Candidate("embedding", matrix_layout(shape[1], shape[0], transposed=True), name, named_as)
        elif a > 2 and a == len(shape):
            yield _Candidate("conv", Layout(shape[0], tuple(shape[1:])), name, named_as)
        elif name == f"{site.module}.weight" and len(shape) == 2:
            yield _Candidate("linear", matrix_layout(shape[0], shape[1]), name, named_as)
            yield _Candidate("conv1d", matrix_layout(shape[1], shape[0], transposed=True), name, named_as)
        elif len(shape) == 2:
            yield _Candidate("parameter", matrix_layout(shape[0], shape[1]), name, named_as)
        elif len(shape) == 3 and a == 2:
            experts, rows, columns = shape
            yield _Candidate("parameter", Layout(rows, (columns,), experts=experts), name, named_as)
            turned = Layout(columns, (rows,), experts=experts, transposed=True)
            yield _Candidate("parameter", turned, name, named_as)

    def _wanted(self, site: Site, candidate: _Candidate) -> dict[str, tuple[int, ...]]:
        """The shapes that the tensors of a site have if it is a candidate."""
        r, layout = self._adapter.rank(candidate.named_as), candidate.layout
        shapes: dict[str, tuple[int, ...]] = dict(zip("AB", layout.factor_shapes(r), strict=True))
        shapes["bias"] = (layout.out,)
        variant = self._adapter.variant
        if variant is not None:
            shapes.update(variant.shapes(site.module, layout, r))
        return {part: shapes[part] for part in site.keys}

    def _has_shapes(self, site: Site, candidate: _Candidate) -> bool:
        wanted = self._wanted(site, candidate)
        return all(self._adapter.info(key).shape == wanted[part] for part, key in site.keys.items())

    def _chosen(self, site: Site, fitting: Sequence[_Candidate]) -> _Candidate | None:
        if len(fitting) < 2:
            return next(iter(fitting), None)
        names = list(dict.fromkeys(candidate.name for candidate in fitting))
        if len(names) > 1:
            if not names[-1].endswith(_ATTENTION[1]):
                raise UnsupportedError(
                    f"fits {names} alike, and a file does not say which of them it is; merge in memory (merge_and_unload)"
                )
            # wrappers are nested with a module's last parameter outermost
            fitting = [candidate for candidate in fitting if candidate.name == names[-1]]
        turned = self._is_turned(site, fitting[0])
        return next((each for each in fitting if each.layout.transposed == turned), None)

    def _is_turned(self, site: Site, candidate: _Candidate) -> bool:
        """Whether a square weight is stored (in, out)."""
        if candidate.kind == "parameter":
            return bool(candidate.layout.experts) and not self._types.isdisjoint(_EXPERTS_IN_OUT)
        if not self._types.isdisjoint(_CONV1D_TYPES):
            return site.module.rpartition(".")[2] in _CONV1D_NAMES
        return self._adapter.config.fan_in_fan_out

    # ---- what is wrong ----------------------------------------------------------------------------------

    def _lacking(self, site: Site) -> list[str]:
        variant = self._adapter.variant
        needed = ["A", "B", *(() if variant is None else variant.parts)]
        return [part for part in needed if part not in site.keys]

    def _refusal(self, site: Site, chosen: _Candidate) -> str:
        """Why factors that fit cannot be merged, or an empty text."""
        layout, variant = chosen.layout, self._adapter.variant
        weight = self._names.find(chosen.name)
        if weight is not None and weight.dtype not in FLOATS:
            return (
                f"the base's weight is {str(weight.dtype).removeprefix('torch.')}, quantised; merge into the checkpoint "
                "that it was quantised from"
            )
        square = chosen.kind == "parameter" and layout.experts and layout.out == layout.row[0]
        if square and self._is_foreign:
            return (
                "experts with square matrices in a model with code of its own: whether they are stored (in, out) cannot be "
                "told from files; merge in memory (merge_and_unload)"
            )
        if variant is None:
            return ""
        if chosen.kind not in variant.kinds:
            return (
                f"{variant.name} is not defined on this kind of weight ({chosen.kind}); it cannot be merged"
            )
        return variant.why_not(site.module, layout, self._adapter.rank(chosen.named_as))

    def _misfit(self, site: Site, candidates: Sequence[_Candidate], weights: Sequence[Weight]) -> str:
        found = {part: self._adapter.info(key).shape for part, key in site.keys.items()}
        shape = weights[0].shape
        if len(found["A"]) > 2 and len(found["A"]) == len(shape) and found["A"][1] != shape[1]:
            groups, rest = divmod(found["A"][1], shape[1])
            if not rest:
                return (
                    f"{site.path}: a convolution in {groups} groups; merging makes it ungrouped, which the base's code does "
                    "not know: merge in memory (merge_and_unload) or keep the adapter"
                )
        wanted = "; or ".join(dict.fromkeys(str(self._wanted(site, each)) for each in candidates))
        return (
            f"{site.path}: found {found}, and the base's weight of {shape} with rank {self._adapter.rank(site.named_as)} "
            f"needs {wanted or 'another kind of factors'}"
        )


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The types of a model and of its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return frozenset(str(part["model_type"]) for part in parts if "model_type" in part)
