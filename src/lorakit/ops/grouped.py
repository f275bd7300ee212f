"""`lora_grouped`: a batch in which every sample goes through its own adapter, or none.

Guarantees, against `lora_grouped_reference`:
- equal results and gradients, up to rounding;
- an adapter costs nothing while no sample goes through it, and what it holds, NaN included, reaches no sample of
  another (except where `lorakit.ops.grouped_compose` has to do);
- no work on the host grows with the samples: who gets which adapter is read once a forward (`Groups`), and stacked
  factors are made once for as long as the parameters stay (`Bank`).
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING

import torch

from lorakit.errors import UnsupportedError
from lorakit.ops.fused import _is_fresh, lora_add
from lorakit.ops.grouped_compose import compose_terms
from lorakit.ops.grouped_costs import choose
from lorakit.ops.grouped_node import Call, LoraGrouped, add_by_blocks, used_tensors
from lorakit.ops.grouped_paths import PATHS, Job, add_biases_, by_sample
from lorakit.ops.reference import PLAIN, must_compose
from lorakit.ops.terms import product_dtype, result_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.ops.bank import Bank
    from lorakit.ops.groups import Groups


def lora_grouped(y: Tensor, x: Tensor, bank: Bank, groups: Groups) -> Tensor:
    """`y[k] + s_i * (B_i A_i drop_i(x[k]) + bias_i)` for every sample k and its adapter i; y[k] where it has none.

    y is given away: where it is a fresh tensor the sum is written into it. Pass `y.view_as(y)` if someone else holds it.

    Args:
        y: (N, ..., out), the output of the base layer, any dtype.
        x: (N, ..., in), the input of the base layer, any dtype.
        bank: the adapters of this layer.
        groups: who of the N samples gets which.

    Returns:
        (N, ..., out) in the dtype of y; products are computed in the dtype of x, or in autocast's.

    Raises:
        UnsupportedError: the first dimension of x is not the N samples; or a second backward (`create_graph=True`) where
            every A in use is frozen.

    Source: Chen et al., 2023 (Punica), arXiv:2310.18547; Sheng et al., 2023 (S-LoRA), arXiv:2311.03285.
    """
    groups = groups.on(x.device)
    if x.dim() < 2 or x.shape[0] != groups.ids.shape[0]:
        raise UnsupportedError(
            f"mixed batch: a layer got an input of shape {tuple(x.shape)}, but the batch has {groups.ids.shape[0]} samples; "
            "the first dimension of every adapted layer's input must be the samples"
        )
    if must_compose(x, ()) or not bank.is_plain or type(y) not in PLAIN:
        return _composed(y, x, bank, groups)
    used = groups.used
    if not any(bank.ranks[i] for i in used):
        return y
    recorded = torch.is_grad_enabled() and _wants_gradient(y, x, bank, groups)
    if len(used) == 1 and not groups.has_base_only and (recorded or bank.has_dropout or x.is_cuda):
        # elsewhere the stacked factors save its casts: 262 us of base, 125 for `segments`, 170 for `lora_add`
        # (64 x 1024 by 1024 x 1024, bfloat16, float32 adapters)
        return lora_add(y, x, [term for term in bank.terms[used[0] : used[0] + 1] if term is not None])
    products = product_dtype(x, result_dtype(x))
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _add(y, x, bank, groups, products=products, recorded=recorded)
    return _add(y, x, bank, groups, products=products, recorded=recorded)


def _wants_gradient(y: Tensor, x: Tensor, bank: Bank, groups: Groups) -> bool:
    tensors = (y, x, *used_tensors(bank, groups))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _add(
    y: Tensor, x: Tensor, bank: Bank, groups: Groups, *, products: torch.dtype, recorded: bool
) -> Tensor:
    """`lora_grouped` outside autocast: with a node if somebody wants a gradient, else by the cheapest path."""
    tokens = prod(x.shape[1:-1])
    if recorded:
        call = Call.of(bank, groups, tokens, products)
        added: Tensor = LoraGrouped.apply(y, x, call, *used_tensors(bank, groups))  # type: ignore[no-untyped-call]
        return added
    out = y if _is_fresh(y, x) else y.clone(memory_format=torch.contiguous_format)
    if bank.has_dropout:
        add_by_blocks(out, x, Call.of(bank, groups, tokens, products))
    elif x.is_cuda and products != torch.float64 and _has_triton():
        from lorakit.ops.triton import add_grouped_

        add_grouped_(out, x, bank, groups, products)
    else:
        _add_by_path(out, by_sample(x, products), bank, groups)
    return out


def _add_by_path(out: Tensor, x: Tensor, bank: Bank, groups: Groups) -> None:
    """Add into `out`, (N, ..., out), by the path that the costs choose; x is (N, S, in)."""
    plan = choose(bank, groups, x.shape[1], x.dtype)
    out3 = out.view(*x.shape[:2], out.shape[-1])
    PATHS[plan.path](Job(out3, x, bank, groups), plan.size)
    add_biases_(out3, bank, groups)


def _composed(y: Tensor, x: Tensor, bank: Bank, groups: Groups) -> Tensor:
    delta = compose_terms(x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1]), groups.ids, bank.terms)
    return (y + delta.reshape(y.shape)).to(y.dtype)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
