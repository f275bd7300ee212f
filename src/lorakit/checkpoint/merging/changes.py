"""Everything that the adapters of a merge do to the weights of a base, gathered weight by weight.

Each tensor of each adapter is used exactly once; what has no use, and what an adapter should have and lacks, is listed
whole in one error.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.checkpoint.merging.fitting import FLOATS, Fitting
from lorakit.checkpoint.merging.weight import Weight
from lorakit.errors import (
    AdapterFormatError,
    AdapterStateError,
    KeyMismatchError,
    UnsupportedError,
    bullet_list,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from lorakit.checkpoint.merging.fitting import Fit
    from lorakit.checkpoint.merging.names import Names
    from lorakit.checkpoint.merging.parts import AdapterParts

    Read = Callable[[Weight], Tensor]

_DOUBLES = re.compile(r"\.(?:original_module|modules_to_save)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Stored(NamedTuple):
    """One tensor of an adapter."""

    adapter: AdapterParts
    key: str

    def read(self) -> Tensor:
        """It."""
        return self.adapter.read(self.key)


class Rows(NamedTuple):
    """Rows of a weight that an adapter replaces."""

    adapter: AdapterParts
    module: str

    @property
    def tokens(self) -> list[int]:
        """Which rows."""
        return self.adapter.tokens(self.module)

    def read(self) -> Tensor:
        """The rows, (tokens, dim)."""
        return self.adapter.read(self.adapter.rows[self.module])


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one weight.

    Attributes:
        weight: of the base.
        fits: factors that are added.
        biases: factors whose B has a bias that is added to this weight, which is a bias.
        rows: rows that are replaced before factors are added.
        replaced: what takes the weight's place before anything else, or None.
    """

    weight: Weight
    fits: tuple[Fit, ...] = ()
    biases: tuple[Fit, ...] = ()
    rows: tuple[Rows, ...] = ()
    replaced: Stored | None = None

    @property
    def is_something(self) -> bool:
        """Whether the weight changes at all."""
        return bool(self.fits or self.biases or self.rows) or self.replaced is not None


@dataclass
class Gathered:
    """The changes by the name of the weight, and what a report should tell."""

    changes: dict[str, Change] = field(default_factory=dict)
    added: list[Weight] = field(default_factory=list)
    """Weights that the base does not have: heads that adapters bring."""
    notes: list[str] = field(default_factory=list)

    def of(self, weight: Weight) -> Change:
        """The change of a weight so far."""
        return self.changes.setdefault(weight.name, Change(weight))


class Gathering:
    """Gathers the changes of one adapter after another.

    Args:
        names: of the base's weights.
        config: the base's `config.json`.
        read: gives a weight of the base, for comparing copies of it.
        new_dtype: what weights get that the base does not have; None keeps the adapter's.
    """

    def __init__(
        self, names: Names, config: Mapping[str, Any], read: Read, new_dtype: torch.dtype | None
    ) -> None:
        self._names, self._config, self._read, self._new_dtype = names, config, read, new_dtype
        self.gathered = Gathered()

    def add(self, adapter: AdapterParts, *, strict: bool) -> None:
        """Take in an adapter.

        Raises:
            KeyMismatchError, AdapterFormatError: its tensors do not fit the base.
            AdapterStateError: it replaces what another one replaces.
            UnsupportedError: it owns tensors and has another weight than 1.
        """
        fitting = Fitting(adapter, self._names, self._config)
        fits = fitting.run()
        unexpected = [key for site in fitting.unplaced for key in site.keys.values()]
        wrong = list(fitting.problems)
        for fit in fits:
            weight = self._found(fit.name)
            own = self.gathered.of(weight)
            if any(other.layout.transposed != fit.layout.transposed for other in own.fits):
                wrong.append(
                    f"{fit.site.path}: another adapter takes this weight for one stored the other way round"
                )
            self._put(replace(own, fits=(*own.fits, fit)))
            wrong += self._add_bias(fit)
        unexpected += self._add_owned(adapter, wrong)
        unexpected += self._add_rows(adapter, wrong)
        missing = self._missing(
            adapter, {fit.site.module for fit in fits} | {site.module for site in fitting.unplaced}
        )
        self._judge(adapter, unexpected, wrong, missing, strict=strict)
        if adapter.weight != 1.0 and (adapter.owned or adapter.rows):
            what = sorted([*adapter.owned, *adapter.rows])[:3]
            raise UnsupportedError(
                f"{adapter.where}: has a weight of {adapter.weight:g}, but tensors that replace the base's ({what}) cannot "
                "be weighed; merge it with weight 1"
            )

    # ---- what an adapter does -------------------------------------------------------------------------

    def _found(self, name: str) -> Weight:
        weight = self._names.find(name)
        assert weight is not None, name
        return weight

    def _put(self, change: Change) -> None:
        self.gathered.changes[change.weight.name] = change

    def _replace(self, weight: Weight, stored: Stored) -> None:
        own = self.gathered.of(weight)
        if own.replaced is not None:
            raise AdapterStateError(
                f"{weight.name}: {own.replaced.adapter.where} and {stored.adapter.where} each bring their own; only one of "
                "them can be merged"
            )
        self._put(replace(own, replaced=stored))

    def _add_bias(self, fit: Fit) -> list[str]:
        if "bias" not in fit.site.keys:
            return []
        weight = self._names.find(f"{fit.site.module}.bias")
        if weight is None or fit.layout.experts:
            return [
                f"{fit.site.path}: lora_bias=True, and the base's layer has no bias to merge that into; keep it unmerged"
            ]
        own = self.gathered.of(weight)
        self._put(replace(own, biases=(*own.biases, fit)))
        return []

    def _add_owned(self, adapter: AdapterParts, wrong: list[str]) -> list[str]:
        """Tensors that replace those of the base; gives the keys of those that may not."""
        unexpected = []
        for name, key in adapter.owned.items():
            if (
                adapter.config.bias == "all"
                and _DOUBLES.search(name)
                and _DOUBLES.sub(".", name) in adapter.owned
            ):
                continue  # PEFT writes each bias of a wholly trained module twice more
            weight = self._names.find(name)
            is_saved = any(_saved_paths(adapter, name))
            if not is_saved and not (name.endswith(".bias") and adapter.config.bias != "none"):
                if weight is not None and self._is_copy(adapter, key, weight):
                    self.gathered.notes.append(f"{key}: the base's own embedding, passed over")
                else:
                    unexpected.append(key)
                continue
            if weight is None and is_saved and not self._names.has_top(name):
                weight = self._new(adapter, name, key)
            if weight is None:
                unexpected.append(key)
                continue
            problem = _owned_problem(adapter, key, weight)
            wrong += [problem] * bool(problem)
            self._replace(weight, Stored(adapter, key))
        return unexpected

    def _new(self, adapter: AdapterParts, name: str, key: str) -> Weight:
        info = adapter.info(key)
        weight = Weight(name, info.shape, self._new_dtype or info.dtype, ())
        if name not in {other.name for other in self.gathered.added}:
            self.gathered.added.append(weight)
            labels = f"; load the model with num_labels={info.shape[0]}" * _is_labelling(adapter, info.shape)
            self.gathered.notes.append(f"{name}: the base has none; the adapter's own is added{labels}")
        return weight

    def _is_copy(self, adapter: AdapterParts, key: str, weight: Weight) -> bool:
        """Whether a tensor is the base's own embedding, as PEFT writes it beside an adapter on it."""
        if adapter.info(key).shape != weight.shape or len(weight.shape) != 2 or weight.dtype not in FLOATS:
            return False
        if any(
            weight.name == change.weight.name and change.replaced for change in self.gathered.changes.values()
        ):
            return False
        mine, theirs = adapter.read(key), self._read(weight)
        return bool(mine.to(theirs.dtype).equal(theirs) or theirs.to(mine.dtype).equal(mine))

    def _add_rows(self, adapter: AdapterParts, wrong: list[str]) -> list[str]:
        unexpected = []
        for module, key in adapter.rows.items():
            weight = self._names.find(f"{module}.weight")
            if weight is None:
                unexpected.append(key)
                continue
            rows = Rows(adapter, module)
            shape = (len(rows.tokens), *weight.shape[1:])
            outside = [token for token in rows.tokens if token >= weight.shape[0]]
            if adapter.info(key).shape != shape or len(shape) != 2:
                wrong.append(f"{key}: found {adapter.info(key).shape}, expected {shape}")
            elif outside:
                wrong.append(
                    f"{key}: tokens {outside[:10]} are not among the {weight.shape[0]} rows of the base"
                )
            own = self.gathered.of(weight)
            taken = [t for other in own.rows for t in other.tokens if t in rows.tokens]
            if taken:
                raise AdapterStateError(
                    f"{weight.name}: two adapters replace the rows of tokens {taken[:10]}"
                )
            self._put(replace(own, rows=(*own.rows, rows)))
        return unexpected

    # ---- what is wrong ----------------------------------------------------------------------------------

    def _missing(self, adapter: AdapterParts, modules: set[str]) -> list[str]:
        """Weights that the config says the adapter changes, and of which its file has nothing."""
        layers = self._config.get("num_hidden_layers")
        found = []
        for name, weight in self._names.everything():
            module, _, attribute = name.rpartition(".")
            number = _LAYER.search(name)
            beyond = number is not None and isinstance(layers, int) and int(number[1]) >= layers
            halved = adapter.config.ensure_weight_tying and weight.name in self._names.borrowed
            if _EXPERT.search(name) or beyond or halved or weight.dtype not in FLOATS:
                # experts that the model stacks; layers that only other software reads; what is stored with its source
                continue
            if any(_saved_paths(adapter, name)):
                found += [name] * (name not in adapter.owned)
            elif attribute == "weight" and len(weight.shape) > 1 and module not in modules:
                found += [name] * adapter.matcher.target(module)
        return found

    def _judge(
        self,
        adapter: AdapterParts,
        unexpected: list[str],
        wrong: list[str],
        missing: list[str],
        *,
        strict: bool,
    ) -> None:
        if missing and not strict:
            self.gathered.notes += [
                f"{name}: the config names it, and the adapter has nothing for it" for name in missing
            ]
            missing = []
        if not (unexpected or wrong or missing):
            return
        near = self._names.near()
        shown = [key + near(_site_of(key)) for key in unexpected]
        hints = []
        if unexpected:
            hints.append("Is this the base that the adapter was made for?")
        if missing and not (unexpected or wrong):
            hints.append("Pass strict=False (--no-strict) to merge what is there.")
        raise KeyMismatchError(
            str(adapter.file.weights_path),
            "the base",
            missing=missing,
            unexpected=shown,
            mismatched=wrong,
            hint=" ".join(hints),
        )


def _is_labelling(adapter: AdapterParts, shape: tuple[int, ...]) -> bool:
    """Whether a head's tensor has a row for each label, of which a base without a head says nothing."""
    return adapter.config.task_type in {"SEQ_CLS", "TOKEN_CLS"} and len(shape) == 2


def _saved_paths(adapter: AdapterParts, name: str) -> Iterator[str]:
    """The paths in a tensor's name that `modules_to_save` means: as in PEFT, the ends of them need not be whole words."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        if any(path.endswith(entry) for entry in adapter.config.modules_to_save or ()):
            yield path


def _owned_problem(adapter: AdapterParts, key: str, weight: Weight) -> str:
    shape = adapter.info(key).shape
    if weight.dtype not in FLOATS:
        return f"{key}: the base's is {weight.dtype}, no floating-point numbers"
    if shape != weight.shape:
        return (
            f"{key}: found {shape}, and the base's has {weight.shape}; if the vocabulary was resized, resize and save the "
            "base first"
        )
    return ""


def _site_of(key: str) -> str:
    return re.sub(r"^base_model\.model\.|\.(?:lora_|token_adapter|weight$|bias$).*", "", key)


def check_apart(changes: Mapping[str, Change]) -> None:
    """Refuse weights that are replaced and changed as well, or that have elements of the checkpoint in common.

    Raises:
        AdapterStateError: adapters both replace and change a weight.
        AdapterFormatError: two weights have elements in common.
    """
    both = [name for name, change in changes.items() if change.replaced and (change.fits or change.rows)]
    if both:
        raise AdapterStateError(
            f"{both[:5]}: one adapter replaces what another one changes; merge them one after another"
        )
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for name, change in changes.items():
        for piece in change.weight.pieces:
            ranges.setdefault(piece.tensor, []).append((piece.begin, piece.begin + piece.count, name))
    clashes = []
    for tensor, found in ranges.items():
        ordered: Sequence[tuple[int, int, str]] = sorted(found)
        clashes += [
            f"{a[2]} and {b[2]}: both are in the tensor {tensor}"
            for a, b in itertools.pairwise(ordered)
            if b[0] < a[1]
        ]
    if clashes:
        raise AdapterFormatError(bullet_list("adapters change the same numbers under two names", clashes))
