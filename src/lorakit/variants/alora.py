"""Activated LoRA: the adapter acts from its invocation tokens on, and before them the model is its base.

What comes before the invocation is therefore what the base computes, and a cache that the base filled can be used.

Source: Greenewald et al., 2025, arXiv:2504.12397.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch.nn.functional import dropout

from lorakit.errors import ConfigError, UnsupportedError
from lorakit.variants.nothing import FactorsAlone, LeavesBase, NoPenalty, OnAnyWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorakit.config import LoraConfig
    from lorakit.layouts import Layout
    from lorakit.specs import PartName
    from lorakit.variants.variant import Call, Effect, Held

    Reader = Callable[[torch.dtype], Tensor]


def find_invocation(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where a sequence of tokens occurs last.

    Args:
        ids: (samples, length), token ids.
        tokens: the sequence, at least one.

    Returns:
        (samples,), int64: how many tokens there are from its first one to the end, 0 where it does not occur.
    """
    length = ids.shape[1]
    if length < len(tokens):
        return ids.new_zeros(ids.shape[0], dtype=torch.int64)
    wanted = torch.tensor(list(tokens), device=ids.device)
    starts = (ids.unfold(1, len(tokens), 1) == wanted).all(dim=2)
    places = torch.arange(length, length - starts.shape[1], -1, device=ids.device)
    return torch.where(starts, places, length + 1).amin(dim=1) % (length + 1)


@dataclass(frozen=True, eq=False)
class Activation:
    """From where on an adapter acts in one call, for each of its samples.

    Attributes:
        offsets: (samples,), int64 on the CPU: how many tokens at the end of the prompt it acts on; 0: on none at all.
        length: of a prompt that the call adds tokens to: on these it acts too. None: the call adds none.
        repeats: whether a layer may see each sample several times in a row, as beams and returned sequences are.
    """

    offsets: Tensor
    length: int | None = None
    repeats: bool = False
    _inside: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)

    def mask(self, samples: int, tokens: int) -> Tensor:
        """(samples, tokens), bool on the CPU: where the adapter acts.

        Args:
            samples: the leading dimension of a layer's input.
            tokens: its second one, the last of the prompt's tokens, or the prompt and what was added to it.

        Raises:
            ConfigError: the layer's input does not hold one row a sample.
        """
        count = len(self.offsets)
        times, rest = divmod(samples, count)
        if rest or not times or (times > 1 and not self.repeats):
            raise ConfigError(
                f"alora_offsets are known for {count} samples, but a layer got an input of leading size {samples}; "
                "give one for each sample of the batch"
            )
        end = tokens if self.length is None else min(tokens, self.length)
        starts = torch.where(self.offsets > 0, (end - self.offsets).clamp(min=0), tokens)
        inside = torch.arange(tokens) >= starts.unsqueeze(1)
        return inside.repeat_interleave(times, dim=0) if times > 1 else inside

    def inside(self, samples: int, tokens: int, device: torch.device) -> Tensor | None:
        """The places (sample * tokens + token) where the adapter acts, or None for all; made once for all layers."""
        key = (samples, tokens, device)
        if key not in self._inside:
            mask = self.mask(samples, tokens).flatten()
            self._inside[key] = None if bool(mask.all()) else mask.nonzero().squeeze(1).to(device)
        return self._inside[key]


@final
@dataclass(frozen=True)
class ALora(FactorsAlone, OnAnyWeight, LeavesBase, NoPenalty):
    """The adapter acts where its `Activation` says, which the call of the model carries; without one it does not act."""

    name: ClassVar[str] = "aLoRA"
    field: ClassVar[str] = "alora_invocation_tokens"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    parts: ClassVar[Mapping[str, PartName]] = {}
    frozen: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    finish: ClassVar[None] = None

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """Y with what the adapter adds inside; outside it is the base's, bit for bit.

        Raises:
            UnsupportedError: the layer's input is not (samples, tokens, features), so nothing says which token is which.
            ConfigError: see `Activation.mask`.
        """
        activation: Activation | None = call.chosen
        x, held = call.x, call.held
        if activation is not None and x.ndim != 3:
            raise UnsupportedError(
                f"aLoRA acts on some tokens of each sample, but a layer got an input of shape {tuple(x.shape)}, not "
                "(samples, tokens, features); leave layers that see tokens in another order out with exclude_modules"
            )
        if torch.compiler.is_compiling():  # how many places are inside would be part of the graph
            if activation is None:
                return y
            mask = activation.mask(*x.shape[:2]).to(y.device).unsqueeze(2)
            return torch.where(mask, call.add(y.clone(), dropout(x, call.rate), held), y)
        inside = _NOWHERE if activation is None else activation.inside(x.shape[0], x.shape[1], x.device)
        if inside is None:
            return call.add(y, dropout(x, call.rate) if call.rate else x, held)
        if not len(inside) and not torch.is_grad_enabled():
            return y
        inside = inside.to(x.device)  # nowhere at all still gives the adapter gradients, of zero
        rows = x.reshape(-1, x.shape[-1])[inside]
        nothing = y.new_zeros(len(inside), y.shape[-1])
        added = call.add(nothing, dropout(rows, call.rate) if call.rate else rows, held)
        flat = y.reshape(-1, y.shape[-1])
        # to read these rows of y and write them again costs more: 4.1 ms against 2.8, both ways (512 x 512, 112 inside)
        add = flat.index_add if torch.is_grad_enabled() else flat.index_add_
        return add(0, inside, added).view(y.shape)

    def effect(self, held: Held, layout: Layout, weight: Reader) -> Effect:  # noqa: ARG002
        """None that a weight could have.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "an aLoRA adapter acts from its invocation tokens on and not before, which no weight does; keep it "
            "unmerged, or train plain LoRA (alora_invocation_tokens=None) to merge"
        )


_NOWHERE = torch.empty(0, dtype=torch.int64)


def from_config(config: LoraConfig) -> ALora | None:
    """Activated LoRA where the config has invocation tokens."""
    return ALora() if config.alora_invocation_tokens else None
