"""The rival: a linear head on the frozen model, trained as well as a linear head can be.

Multinomial logistic regression on standardised embeddings, solved to convergence by L-BFGS in fp64, its L2 penalty
chosen on a fifth of the training texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor, nn

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 5  # every fifth text


class Head(NamedTuple):
    """A linear head: weight (labels, width) and bias (labels,), for embeddings as the model gives them."""

    weight: Tensor
    bias: Tensor

    def logits(self, embeddings: Tensor) -> Tensor:
        """(texts, width) -> (texts, labels)."""
        return functional.linear(embeddings, self.weight, self.bias)

    def install(self, layer: nn.Linear) -> None:
        """Make a model's head begin as this one."""
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)


def fit_head(embeddings: Tensor, labels: Tensor, count: int) -> Head:
    """Train a head on (texts, width) embeddings and (texts,) labels.

    Args:
        embeddings: of the training texts, any floating dtype.
        labels: indices below `count`.
        count: how many labels there are.

    Returns:
        The head with the penalty that did best on held-out training texts, fitted to all of them.
    """
    held = torch.arange(len(labels)) % _HELD_OUT == 0
    scores = {}
    for penalty in PENALTIES:
        head = _solve(embeddings[~held], labels[~held], count, penalty)
        scores[penalty] = (head.logits(embeddings[held]).argmax(dim=1) == labels[held]).float().mean().item()
    return _solve(embeddings, labels, count, max(scores, key=scores.__getitem__))


def _solve(embeddings: Tensor, labels: Tensor, count: int, penalty: float) -> Head:
    """The minimum of mean cross entropy + penalty/2 · ||weight||², on standardised embeddings."""
    wide = embeddings.double()
    mean, deviation = wide.mean(dim=0), wide.std(dim=0) + 1e-8
    standard = (wide - mean) / deviation
    weight = torch.zeros(count, wide.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(functional.linear(standard, weight, bias), labels)
        value = value + penalty / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    solver.step(loss)
    scaled = weight.detach() / deviation
    return Head(scaled.float(), (bias.detach() - scaled @ mean).float())
