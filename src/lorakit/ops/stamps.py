"""Whether tensors are still what they were, for whatever was computed from them and is kept.

Torch's fused optimizers write parameters without counting a version (2.13, `_fused_adamw_` and its like). While this
module is loaded, every step of one is counted as the write that it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer


class Stamp(NamedTuple):
    """By what tensors are taken to be as they were: their versions, and their addresses, which `.data =` changes.

    Not seen are writes through `.data`, and into inference tensors, which torch does not count.
    """

    tensors: tuple[Tensor, ...]
    versioned: tuple[Tensor, ...]  # those that count their versions: inference tensors do not
    addresses: list[int]
    versions: list[int]
    memory: list[Tensor]  # held, so that nothing else can come to lie at these addresses

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Stamp:
        """The present state of tensors."""
        versioned = tuple([t for t in tensors if not t.is_inference()])
        return Stamp(
            tuple(tensors),
            versioned,
            [t.data_ptr() for t in tensors],
            [t._version for t in versioned],
            [t.detach() for t in tensors],
        )

    def holds(self) -> bool:
        """Whether nothing was written to the tensors: 0.1 us for each."""
        return [t._version for t in self.versioned] == self.versions and [
            t.data_ptr() for t in self.tensors
        ] == self.addresses


def _count_fused_writes(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([parameter for parameter in group["params"] if parameter.grad is not None])


_count_fused_writes._torchdynamo_disable = True  # type: ignore[attr-defined]  # a compiled step would leave it out
register_optimizer_step_post_hook(_count_fused_writes)
