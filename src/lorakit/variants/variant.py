"""The contract of a variant: what an adapter has beside A and B, how it begins, acts and merges.

A variant is a frozen dataclass of its settings, made from a config when an adapter is planned. It keeps no tensor and
never sees a module: what it computes with is handed to it, so that it acts alike in every layer, and merges alike in
memory and on files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lorakit.specs import PlannedVariant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

    from lorakit.layouts import Layout
    from lorakit.specs import AdapterSpec
    from lorakit.types import Factors


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one adapter on one weight.

    Attributes:
        A, B: as they are stored; of the layout's shapes unless the variant has others.
        bias: (out,) or None, the bias of B.
        scaling: a number, or a 0-d tensor.
        parts: the variant's own tensors, by part.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    parts: Mapping[str, Tensor]


class Effect(NamedTuple):
    """What an adapter makes of the weight: `W -> diag(rows) W + scaling * B A`, and of the bias, which no rows touch.

    Attributes:
        A, B: of the layout's shapes; differentiable functions of the adapter's tensors.
        rows: (out,), or None for ones.
    """

    A: Tensor
    B: Tensor
    rows: Tensor | None = None


class Start(NamedTuple):
    """What a new adapter begins from.

    Attributes:
        spec: what was planned.
        A, B: the initialiser's, of the layout's shapes.
        read_weight: gives the base weight, (out, in), of experts (experts, out, in); not to be written into.
    """

    spec: AdapterSpec
    A: Tensor
    B: Tensor
    read_weight: Callable[[torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer, as an adapter's variant sees it.

    Attributes:
        x: the layer's input.
        base_y: the base's output for x. It may be the very tensor that `forward` is given as y.
        bias: the base's, or None.
        layout: of the weight.
        held: the adapter's tensors.
        rate: probability of dropout on the adapter's input now; 0.0 in eval mode.
        dropped: gives x after the adapter's dropout.
        training: whether the layer is in training mode.
        base: gives the base's output, with its bias, for another input.
        add: gives y plus `scaling * (B A x + bias)` for (y, x, held), as a layer without variant computes it, but for
            dropout. y is given away.
        weight: gives the unmerged base weight as a fresh (out, in) tensor.
        stored: the base's unmerged weight as it is stored, to tell whether it is the one of an earlier call (`Stamp`).
        kept: what the variant wants to keep on this layer for this adapter; lost when the adapter is deleted, never
            saved. Threads share it, so an entry is replaced whole, never changed.
        peer: gives the tensors of another adapter on the layer by name.
        peers: gives the names of the adapters on the layer that are plain LoRA and take nothing off the base.
        chosen: what the call of the model carries for this variant (see `carrying`), or None.
    """

    x: Tensor
    base_y: Tensor
    bias: Tensor | None
    layout: Layout
    held: Held
    rate: float
    dropped: Callable[[], Tensor]
    training: bool
    base: Callable[[Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Held], Tensor]
    weight: Callable[[torch.dtype], Tensor]
    stored: Tensor
    kept: dict[str, Any]
    peer: Callable[[str], Held]
    peers: Callable[[], tuple[str, ...]]
    chosen: Any


class Variant(PlannedVariant, Protocol):
    """One way for an adapter to be more than plain LoRA; a frozen dataclass with its settings.

    Attributes:
        name: as messages show it.
        field: the config's field that asks for it.
        kinds: names of the layer kinds that it is defined on.
        parts: its own tensors: what they are called.
        frozen: which of "A", "B" and its parts are never trained.
        shapes: for a path, layout and rank the shapes of its parts, and of "A" and "B" where they are not the layout's.
        merges: whether `effect` describes it, so that it can be merged; otherwise `effect` raises.
        reads: whether it needs to know the base weight, which not every quantised layer lets it.
        finish: what it makes of the base's output plus the plain product when it acts alone and without dropout, in the
            same form as `forward` does; a layer may compute that sum in one step. `base_y` of the call is the sum
            itself. None where it needs another product.
    """

    @property
    def field(self) -> str: ...  # noqa: D102

    @property
    def kinds(self) -> frozenset[str]: ...  # noqa: D102

    @property
    def merges(self) -> bool: ...  # noqa: D102

    @property
    def reads(self) -> bool: ...  # noqa: D102

    @property
    def finish(self) -> Callable[[Tensor, Call], Tensor] | None: ...  # noqa: D102

    def why_not(self, path: str, layout: Layout, r: int) -> str:
        """Why it cannot be on this weight with this rank, or an empty text."""

    def start(self, start: Start) -> Mapping[str, Tensor]:
        """The tensors of a new adapter: "A", "B" and its parts, in the adapter's dtype and of the shapes of `shapes`.

        Draws from torch's generator of the device, if at all.
        """

    def offset(
        self, spec: AdapterSpec, weight: Callable[[torch.dtype], Tensor]
    ) -> tuple[Factors, ...] | None:
        """What is taken off the base for this adapter alone, for each block of the layout; None takes nothing.

        Asked for a new adapter and for a loaded one, since no file holds it: the same base must give the same answer.
        See `InitResult.offset`.
        """

    def forward(self, y: Tensor, call: Call) -> Tensor:
        """Y with what the adapter adds to it, in the dtype of y.

        Args:
            y: the base's output plus what other adapters added. It is given away: it may be written into, and
                returned. What `offset` says is taken off afterwards.
            call: see `Call`.
        """

    def penalty(self, held: Held, kept: Mapping[str, Any], count: int, *, training: bool) -> Tensor | None:
        """What a training loop should add to its loss for this adapter on this weight; None: nothing.

        Differentiable, a 0-d tensor; added up over the layers and adapters that are asked about.

        Args:
            held: the adapter's tensors.
            kept: what `forward` kept of its last call (`Call.kept`).
            count: how many penalties of this kind of variant are added up.
            training: whether the layer is in training mode.
        """

    def effect(self, held: Held, layout: Layout, weight: Callable[[torch.dtype], Tensor]) -> Effect:
        """What the adapter makes of the weight, in eval mode.

        Raises:
            UnsupportedError: no weight does what the adapter does; says what to do instead.
        """
