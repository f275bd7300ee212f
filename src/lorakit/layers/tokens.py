"""Rows of an embedding, or of a head that is tied to one, that an adapter replaces by its own.

The rows stand for themselves, not for a difference: a base whose new rows are random again gives the same model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from lorakit.errors import AdapterStateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from lorakit.weights import WeightState


class TokenRows(nn.Module):
    """The replaced rows of one weight, (tokens, dim) for each adapter.

    Attributes:
        trainable_tokens_delta: the rows by adapter name. (The name is that of the files; they are no difference.)
        token_indices: which tokens, by adapter name, in the order of the rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}
        self._tied: dict[str, TokenRows] = {}

    def add(self, name: str, indices: Sequence[int], rows: Tensor) -> None:
        """Make the rows of an adapter out of this very tensor."""
        assert name not in self.token_indices, f"{name!r} replaces rows already"
        self.trainable_tokens_delta[name] = nn.Parameter(rows, requires_grad=False)
        self.token_indices[name] = list(indices)
        # on the device, so that no forward waits for a copy; the config says the same, so no file holds it
        tokens = torch.tensor(self.token_indices[name], device=rows.device)
        self.register_buffer(f"tokens_{name}", tokens, persistent=False)

    def tie(self, name: str, source: TokenRows) -> None:
        """Use the rows that another layer holds."""
        assert name not in self.token_indices, f"{name!r} replaces rows already"
        self._tied[name] = source
        self.token_indices[name] = source.token_indices[name]

    def remove(self, name: str) -> None:
        """Let an adapter's rows go, if it has some."""
        self.token_indices.pop(name, None)
        if self._tied.pop(name, None) is None and name in self.trainable_tokens_delta:
            del self.trainable_tokens_delta[name]
            delattr(self, f"tokens_{name}")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that replace rows."""
        return tuple(self.token_indices)

    def check_apart(self, names: Iterable[str]) -> None:
        """Refuse adapters that replace the same token: which row would it be?

        Raises:
            AdapterStateError: two of them do.
        """
        owners: dict[int, str] = {}
        for name in dict.fromkeys(names):
            for token in self.token_indices.get(name, ()):
                if token in owners:
                    raise AdapterStateError(
                        f"adapters {owners[token]!r} and {name!r} each replace the row of token {token}; only one of "
                        "them can be active or merged at a time"
                    )
                owners[token] = name

    def rows(self, name: str) -> Tensor:
        """The rows of an adapter, (tokens, dim); differentiable."""
        if name in self._tied:
            return self._tied[name].rows(name)
        rows: Tensor = self.trainable_tokens_delta[name]
        return rows

    def _tokens(self, name: str) -> Tensor:
        return self._tied[name]._tokens(name) if name in self._tied else self.get_buffer(f"tokens_{name}")

    def in_embedding(
        self,
        y: Tensor,
        ids: Tensor,
        names: Iterable[str],
        base: nn.Embedding,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The output of an embedding with the rows of these adapters in place.

        Args:
            y: (..., dim), what the base gave.
            ids: (...), the tokens.
            names: adapters; their tokens are distinct.
            base: whose way of counting gradients holds for the rows too: `padding_idx` gets none.
            scale: what the embedding multiplies its output by.
        """
        for name in names:
            if name not in self.token_indices:
                continue
            tokens, rows = self._tokens(name).to(ids.device), self.rows(name).to(y)
            ordered, order = tokens.sort()
            place = order[torch.searchsorted(ordered, ids.contiguous()).clamp_(max=len(tokens) - 1)]
            is_mine = tokens[place] == ids
            if base.scale_grad_by_freq:  # a row apart for other tokens, which must not count as one of these
                place = torch.where(is_mine, place, len(tokens))
                rows = torch.cat([rows, torch.zeros_like(rows[:1])])
            mine = self.token_indices[name]
            padding = mine.index(base.padding_idx) if base.padding_idx in mine else None
            own = embedding(place, rows, padding, scale_grad_by_freq=base.scale_grad_by_freq) * scale
            y = torch.where(is_mine.unsqueeze(-1), own.to(y), y)
        return y

    def in_head(self, y: Tensor, x: Tensor, names: Iterable[str], bias: Tensor | None) -> Tensor:
        """The output of a linear head with the rows of these adapters in place.

        Args:
            y: (..., vocabulary), what the base gave; not changed.
            x: (..., dim), its input.
            names: adapters; their tokens are distinct.
            bias: (vocabulary,) of the head, or None.
        """
        for name in names:
            if name in self.token_indices:
                tokens = self._tokens(name).to(y.device)
                own = linear(x, self.rows(name).to(x), None if bias is None else bias[tokens].to(x.dtype))
                y = y.index_copy(-1, tokens, own.to(y.dtype))
        return y

    def in_weight(self, weight: Tensor, names: Iterable[str]) -> Tensor:
        """A weight (vocabulary, dim) with the rows of these adapters in place, a copy if there are any."""
        for name in names:
            if name in self.token_indices:
                weight = weight.index_copy(
                    0, self._tokens(name).to(weight.device), self.rows(name).to(weight)
                )
        return weight

    @torch.no_grad()
    def merged(self, state: WeightState, names: Iterable[str]) -> WeightState:
        """`state` with the rows of these adapters in a copy of its weight."""
        new = self.in_weight(state.weight.detach(), names)
        if set(names).isdisjoint(self.token_indices):
            return state
        return state._replace(weight=nn.Parameter(new, requires_grad=state.weight.requires_grad))
