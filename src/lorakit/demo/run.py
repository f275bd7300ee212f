"""The demo from end to end. Every number of its result is measured in the run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lorakit.configs import LoraConfig
from lorakit.demo import model as minilm
from lorakit.demo.head import Head, fit_head
from lorakit.demo.task import Task, build_task
from lorakit.tasks import PeftModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    Progress = Callable[[str, int, int], None]

LEARNING_RATE = 2e-3
BATCH = 32
WARMUP = 0.1
EVALUATIONS_PER_EPOCH = 2


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        labels, train_texts, test_texts: the size of the task.
        example: one text and its label.
        base_parameters, trainable_parameters, head_parameters: numbers of parameters.
        head_accuracy: of the frozen model with its best linear head, on held-out texts, in 0..1.
        lora_accuracy: of the LoRA model, on the same texts.
        losses: training loss of each step.
        accuracies: (step, held-out accuracy), beginning with the head that training starts from.
        base_bytes, adapter_bytes: sizes on disk.
        load_difference: largest difference of a logit between the trained model and the adapter loaded into a
            fresh base.
        merge_difference: the same between unmerged and merged.
        bits_restored: whether every base weight had its former bits after unmerging.
        seconds: wall time by part.
    """

    labels: tuple[str, ...]
    train_texts: int
    test_texts: int
    example: tuple[str, str]
    base_parameters: int
    trainable_parameters: int
    head_parameters: int
    head_accuracy: float
    lora_accuracy: float
    losses: tuple[float, ...]
    accuracies: tuple[tuple[int, float], ...]
    base_bytes: int
    adapter_bytes: int
    load_difference: float
    merge_difference: float
    bits_restored: bool
    seconds: dict[str, float]


class _Data:
    """The task as token ids, with labels."""

    def __init__(self, task: Task) -> None:
        tokenizer = minilm.load_tokenizer()
        self.train = minilm.encode(tokenizer, task.train.texts)
        self.test = minilm.encode(tokenizer, task.test.texts)
        self.train_labels, self.test_labels = task.train.labels, task.test.labels


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    epochs: int = 2,
    task: Task | None = None,
    progress: Progress = lambda what, done, total: None,  # noqa: ARG005
) -> DemoResult:
    """Train a LoRA classifier on MiniLM, save it to `output`/adapter, load, merge and unmerge it.

    Args:
        output: a folder, made if it is not there; an adapter in it is replaced.
        seed: of the adapter's initialisation and of the order of the texts.
        epochs: passes over the training texts.
        task: the texts; default `build_task()`.
        progress: called with what is being done, how many steps of it are done, and of how many.

    Raises:
        UnsupportedError: the packages of the demo are not installed, or Python came without its sources.
        OSError: `output` cannot be written.
    """
    clock = _Clock()
    torch.manual_seed(seed)
    task = task or build_task()
    data = _Data(task)
    base = minilm.load_classifier(len(task.label_names))
    clock.mark("prepare")
    head, head_accuracy = _train_head(base, data, len(task.label_names), progress)
    clock.mark("head")
    head.install(base.classifier)
    base_parameters = sum(parameter.numel() for parameter in base.encoder.parameters())
    model = PeftModel(
        base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["classifier"])
    )
    losses, accuracies = _train_lora(model, data, (seed, epochs), head_accuracy, progress)
    clock.mark("train")
    folder = output / "adapter"
    model.save_pretrained(folder)
    trained = minilm.predict(model, data.test)
    checks = _round_trip(folder, trained, data, len(task.label_names), head)
    clock.mark("save, load, merge")
    return DemoResult(
        labels=task.label_names,
        train_texts=len(data.train),
        test_texts=len(data.test),
        example=(task.train.texts[0], task.label_names[task.train.labels[0]]),
        base_parameters=base_parameters,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        head_parameters=head.weight.numel() + head.bias.numel(),
        head_accuracy=head_accuracy,
        lora_accuracy=minilm.accuracy(trained, data.test_labels),
        losses=tuple(losses),
        accuracies=tuple(accuracies),
        base_bytes=(minilm.model_folder() / "model.safetensors").stat().st_size,
        adapter_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        load_difference=checks[0],
        merge_difference=checks[1],
        bits_restored=checks[2],
        seconds=clock.parts,
    )


class _Clock:
    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = now - self._last
        self._last = now


@torch.no_grad()
def _train_head(base: minilm.Classifier, data: _Data, labels: int, progress: Progress) -> tuple[Head, float]:
    embedded = []
    for texts in (data.train, data.test):
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        rows = list(minilm.batches([texts[index] for index in order], [0] * len(texts), 64))
        parts = []
        for done, batch in enumerate(rows, 1):
            parts.append(base.embed(batch.input_ids, batch.attention_mask))
            progress("embed with the frozen model", done, len(rows))
        vectors = torch.cat(parts)
        embedded.append(torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors))
    train, test = embedded
    with torch.enable_grad():
        head = fit_head(train, torch.tensor(data.train_labels), labels)
    return head, minilm.accuracy(head.logits(test), data.test_labels)


def _train_lora(
    model: PeftModel, data: _Data, seed_and_epochs: tuple[int, int], start: float, progress: Progress
) -> tuple[list[float], list[tuple[int, float]]]:
    """AdamW, warm-up, then linear decay to zero. Returns the losses and the held-out accuracies on the way."""
    seed, epochs = seed_and_epochs
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    per_epoch = -(-len(data.train) // BATCH)
    total = per_epoch * epochs
    evaluate_at = {
        round(per_epoch * k / EVALUATIONS_PER_EPOCH) for k in range(1, EVALUATIONS_PER_EPOCH * epochs)
    }
    losses: list[float] = []
    accuracies = [(0, start)]
    passes = (
        minilm.batches(data.train, data.train_labels, BATCH, shuffle_seed=seed * 1000 + epoch)
        for epoch in range(epochs)
    )
    for done, batch in enumerate(chain.from_iterable(passes), 1):
        model.train()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(
            done / max(1.0, WARMUP * total), (total - done + 1) / max(1.0, (1 - WARMUP) * total)
        )
        loss = functional.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if done in evaluate_at or done == total:
            accuracies.append((done, minilm.accuracy(minilm.predict(model, data.test), data.test_labels)))
        progress("train the adapter", done, total)
    return losses, accuracies


def _round_trip(
    folder: Path, trained: Tensor, data: _Data, labels: int, head: Head
) -> tuple[float, float, bool]:
    """Load into a fresh base, merge, unmerge: two largest differences of a logit, and whether the bits are back."""
    fresh = minilm.load_classifier(labels)
    head.install(fresh.classifier)
    before = _bits(fresh)
    model = PeftModel.from_pretrained(fresh, folder)
    loaded = minilm.predict(model, data.test)
    model.merge_adapter()
    merged = minilm.predict(model, data.test)
    model.unmerge_adapter()
    base = model.unload()
    restored = all(torch.equal(bits, before[name]) for name, bits in _bits(base).items())
    return (
        (loaded - trained).abs().max().item(),
        (merged - loaded).abs().max().item(),
        restored and before.keys() == base.state_dict().keys(),
    )


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items()}
