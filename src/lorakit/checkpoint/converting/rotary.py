"""The two orders in which the rows of a query or key projection are stored.

Rotary embeddings turn pairs of numbers. transformers pairs the first half of a head with its second half, others
pair neighbours (Su et al., 2021, arXiv:2104.09864); who computes with neighbours stores the rows in another order.
Of an adapter only B and a magnitude of DoRA have such rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch import Tensor


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, ...) of halves as rows of neighbours."""
    _check(rows, heads)
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, ...) of neighbours as rows of halves: what `neighbours` undoes."""
    _check(rows, heads)
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _check(rows: Tensor, heads: int) -> None:
    if rows.shape[0] % (2 * heads):
        raise AdapterFormatError(
            f"{rows.shape[0]} rows, and the base's config says {heads} heads of an even size; is it the right base?"
        )
