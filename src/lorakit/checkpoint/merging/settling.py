"""What merging means for tied weights: either all that share one change alike and stay tied, or each gets a tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lorakit.checkpoint.merging.changes import Change, Rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.checkpoint.merging.fitting import Fit
    from lorakit.checkpoint.merging.parts import AdapterParts
    from lorakit.checkpoint.merging.ties import Tie
    from lorakit.checkpoint.merging.weight import Weight


class Settled(NamedTuple):
    """The changes with ties taken account of.

    Attributes:
        changes: by the name of the weight.
        parted: weights that get a tensor of their own, changed or not, beside that of their source.
    """

    changes: dict[str, Change]
    parted: list[tuple[Weight, Weight]]


def settle(ties: Sequence[Tie], changes: Mapping[str, Change]) -> Settled:
    """Decide for each tie whether it holds. If one is broken, no target is left for the config to tie."""
    found = dict(changes)
    broken = False
    shared: list[Tie] = []
    for tie in ties:
        source = found.get(tie.source.name, Change(tie.source))
        target = _with_rows(source, found.get(tie.target.name, Change(tie.target)))
        if _is_alike(source, target):
            shared.append(tie)
            target = replace(source, weight=tie.target)
        else:
            broken = True
        if target.is_something:
            found[tie.target.name] = target
        if not source.is_something:
            found.pop(tie.source.name, None)
    if not broken:
        for tie in shared:
            if not tie.is_stored:
                found.pop(tie.target.name, None)
        return Settled(found, [])
    return Settled(found, [(tie.target, tie.source) for tie in ties if not tie.is_stored])


def _with_rows(source: Change, target: Change) -> Change:
    """The target with the rows that adapters replace in the source, which are the target's too while it has no own."""
    rows = list(target.rows)
    for each in source.rows:
        mine = any(other.adapter is each.adapter for other in rows)
        owns = target.replaced is not None and target.replaced.adapter is each.adapter
        if not mine and not owns:
            rows.append(each)
    return replace(target, rows=tuple(rows))


def _is_alike(source: Change, target: Change) -> bool:
    return (
        _same_replaced(source, target)
        and _same_fits(source, target)
        and len(source.rows) == len(target.rows)
        and all(_same_rows(a, b) for a, b in zip(source.rows, target.rows, strict=True))
    )


def _same_rows(a: Rows, b: Rows) -> bool:
    if a.adapter is not b.adapter:
        return False
    return a.module == b.module or (a.tokens == b.tokens and a.read().equal(b.read()))


def _same_replaced(source: Change, target: Change) -> bool:
    a, b = source.replaced, target.replaced
    if a is None or b is None:
        # of copies that were trained as one, a file need not have the second
        path = target.weight.name.rpartition(".")[0]
        follows = a is not None and a.adapter.config.ensure_weight_tying and _is_saved(a.adapter, path)
        return a is b or (b is None and follows)
    return a.adapter is b.adapter and a.adapter.config.ensure_weight_tying and a.read().equal(b.read())


def _is_saved(adapter: AdapterParts, path: str) -> bool:
    return any(path.endswith(entry) for entry in adapter.config.modules_to_save or ())


def _same_fits(source: Change, target: Change) -> bool:
    theirs = {id(fit.adapter): fit for fit in target.fits}
    for fit in source.fits:
        config = fit.adapter.config
        other = theirs.pop(id(fit.adapter), None)
        if not config.ensure_weight_tying or fit.adapter.variant is not None:
            return False
        if other is None:
            if not fit.adapter.matcher.target(target.weight.name.rpartition(".")[0]):
                return False
        elif not _same_factors(fit, other):
            return False
    return not theirs


def _same_factors(fit: Fit, other: Fit) -> bool:
    """Whether two pairs of factors are one, seen from an embedding and from a head."""
    if fit.adapter.scaling(fit.named_as) != other.adapter.scaling(other.named_as):
        return False
    mine = {part: fit.adapter.read(key) for part, key in fit.site.keys.items()}
    theirs = {part: other.adapter.read(key) for part, key in other.site.keys.items()}
    if fit.layout.transposed == other.layout.transposed:
        return mine["A"].equal(theirs["A"]) and mine["B"].equal(theirs["B"])
    return mine["A"].t().equal(theirs["B"]) and mine["B"].t().equal(theirs["A"])
