"""EVA on MiniLM, the same batches for both sides; a row of `benchmarks.init`.

What EVA maximises is the sum over layers of the share of its input's variance that a layer's components explain, for a
given sum of ranks. The error is what the components lack of the best such sum, over all batches that there are.
Both sides stop once their components have settled (tau 0.99); lorakit after one pass at the latest, PEFT begins again.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import peft
import torch

import lorakit
from lorakit.demo import model as minilm
from lorakit.demo.task import build_task
from lorakit.init.eva import DenseScatter, spread_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
R, SIZE, COUNT = 16, 64, 24


@cache
def texts() -> list[dict[str, Tensor]]:
    """Batches of the demo's texts."""
    encoded = minilm.encode(minilm.load_tokenizer(), build_task().train.texts)
    found = minilm.batches(encoded, [0] * len(encoded), SIZE, shuffle_seed=0)
    return [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch, _ in zip(found, range(COUNT), strict=False)
    ]


def adapted(library: Any) -> nn.Module:
    config = library.LoraConfig(
        r=R, target_modules=TARGETS, init_lora_weights="eva", eva_config=library.EvaConfig(rho=2.0, tau=0.99)
    )
    encoder = minilm.load_classifier(2).encoder
    return library.get_peft_model(encoder, config, low_cpu_mem_usage=True)


def sides() -> tuple[Callable[[], object], Callable[[], object], Callable[[], dict[str, float]]]:
    """What is timed, ours and theirs, and their errors."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    data = texts()
    ours, theirs = adapted(lorakit), adapted(peft)

    def mine() -> dict[str, Tensor]:
        return lorakit.get_eva_state_dict(ours, data, show_progress_bar=False)

    def other() -> dict[str, Tensor]:
        return peft.get_eva_state_dict(theirs, data, show_progress_bar=False)

    def errors() -> dict[str, float]:
        scatters = scatters_of(data)
        ratios = {name: scatter.components(2 * R).ratios for name, scatter in scatters.items()}
        ranks = spread_ranks(ratios, R * len(ratios))
        best = sum(float(shares[: ranks[name]].sum()) for name, shares in ratios.items())
        found = {
            side: 1 - explained(scatters, run()) / best for side, run in (("lorakit", mine), ("PEFT", other))
        }
        assert 0 <= found["lorakit"] <= found["PEFT"] + 1e-3, found
        assert found["lorakit"] < 0.02, found
        return found

    return mine, other, errors


def scatters_of(data: list[dict[str, Tensor]]) -> dict[str, DenseScatter]:
    """Of each layer's inputs in all batches."""
    model = minilm.load_classifier(2).encoder
    scatters: dict[str, DenseScatter] = {}
    about: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            scatter = scatters.setdefault(name, DenseScatter(x.shape[-1], x.device))
            scatter.add(x[about[-1]].clone())

        return see

    for name, module in model.named_modules():
        if any(name.endswith(target) for target in TARGETS):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in data:
            about.append(batch["attention_mask"].bool())
            model(**batch)
    return scatters


def explained(scatters: dict[str, DenseScatter], found: dict[str, Tensor]) -> float:
    """The sum over layers of the share of variance in the span of A's rows."""
    total = 0.0
    for name, A in found.items():
        scatter = scatters[name.removeprefix("base_model.model.")]
        rows = A.float()
        total += float(((rows @ scatter.matrix) * rows).sum() / scatter.matrix.diagonal().sum())
    return total
