"""The combiners as their papers define them, dense, in float64, without a thought for time or memory."""

from __future__ import annotations

import math

import torch

from lorakit.types import Factors

F64 = torch.float64


def parts_of(shape, ranks, dtype=F64, *, bias=False, seed=0):
    """Random factors with scalings of different sizes and signs."""
    generator = torch.Generator().manual_seed(seed)
    out, features = shape

    def draw(*dims):
        return torch.randn(dims, generator=generator, dtype=F64).to(dtype)

    return [
        Factors(draw(r, features), draw(out, r), (1.5, 0.4, -0.7, 1.0)[n % 4], draw(out) if bias else None)
        for n, r in enumerate(ranks)
    ]


def delta(part):
    return part.delta(F64)


def weighted(parts, weights):
    return sum(weight * delta(part) for part, weight in zip(parts, weights, strict=True))


def best(W, rank):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def pruned(x, density):
    """The largest in size, the first of equals."""
    k = int(density * x.numel())
    order = sorted(range(x.numel()), key=lambda n: (-abs(x.flatten()[n].item()), n))
    kept = torch.zeros(x.numel(), dtype=x.dtype)
    kept[order[:k]] = x.flatten()[order[:k]]
    return kept.view(x.shape)


def elected(tensors, weights, majority):
    """Mean of w x over the x with the elected sign, one element at a time."""
    result = torch.zeros_like(tensors[0])
    for place in range(result.numel()):
        values = [tensor.flatten()[place].item() for tensor in tensors]
        votes = values if majority == "total" else [math.copysign(1, v) if v else 0 for v in values]
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [w * v for v, w in zip(values, weights, strict=True) if v * sign > 0]
        result.view(-1)[place] = sum(agreeing) / max(1, len(agreeing))
    return result


def summed(tensors, weights, majority):
    return sum(weight * tensor for tensor, weight in zip(tensors, weights, strict=True))


def on_factors(parts, weights, prune, merge, majority):
    products = [weight * part.scaling for part, weight in zip(parts, weights, strict=True)]
    A = merge(
        [prune(part.A) for part in parts], [math.copysign(abs(p) ** 0.5, p) for p in products], majority
    )
    B = merge([prune(part.B) for part in parts], [abs(p) ** 0.5 for p in products], majority)
    return B @ A


def sce(parts, weights, density):
    stack = torch.stack([weight * delta(part) for part, weight in zip(parts, weights, strict=True)])
    variance = stack.var(dim=0, unbiased=False)
    stack = stack * (pruned(variance, density) > 0)
    energies = stack.square().sum(dim=(1, 2))
    coefficients = energies / energies.sum()
    sign = torch.where(stack.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = coefficients[:, None, None] * (stack.sign() == sign)
    share = agreeing.sum(dim=0)
    return (stack * agreeing).sum(dim=0) / torch.where(share == 0, 1.0, share)


def slerp(parts, weights, t):
    first, second = (weight * delta(part) for part, weight in zip(parts, weights, strict=True))
    angle = torch.arccos((first * second).sum() / (first.norm() * second.norm()))
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)
