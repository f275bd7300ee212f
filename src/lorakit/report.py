"""What a merge into quantised weights cost, and when it cost too much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorakit.errors import LossyMergeError, bullet_list

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMIT = 0.1
"""How much of an adapter's effect on a weight a merge may lose before it has to be asked for with `force=True`."""
SHOWN = 5


@dataclass(frozen=True)
class MergeReport:
    """What merging into quantised weights lost.

    Attributes:
        errors: by the path of each layer with a quantised weight, `|merged - (W + delta)| / |delta|` in the Frobenius
            norm, where `merged` is what the base computes with after rounding: 0 if nothing was lost, 1 if the whole
            effect was, and the weight was left as it is. Layers in full precision are not listed; nor are those merged
            into it.
    """

    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[tuple[str, float], ...]:
        """The layers that lost most, first."""
        return tuple(sorted(self.errors.items(), key=lambda item: -item[1])[:SHOWN])

    def __str__(self) -> str:
        if not self.errors:
            return "no quantised weight was merged into"
        lines = [f"{path or 'this layer'}: {error:.1%}" for path, error in self.worst]
        return bullet_list(
            f"lost of the adapters' effect, worst of {len(self.errors)} quantised layers", lines
        )

    def check(self) -> None:
        """Refuse what is over the limit.

        Raises:
            LossyMergeError: some layer loses more than `LIMIT`; lists the worst, and what to do.
        """
        lost = [path for path, error in self.errors.items() if error > LIMIT]
        if lost:
            raise LossyMergeError(self, len(lost), LIMIT)
