"""What vLLM would say of an adapter; facts of its `lora/peft_helper.py` and its option `max_lora_rank`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.diagnosis.finding import Finding, some

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorakit.config import LoraConfig

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` takes; 16 is its default."""
_DEFAULT = 16
_MERGE = "Merge it into the base instead: lorakit merge."


def serving_findings(config: LoraConfig, ranks: Mapping[str, int]) -> Iterator[Finding]:
    """What vLLM cannot serve, or not without an option.

    Args:
        config: of the adapter.
        ranks: of its factors, by path.
    """
    yield from _rank_findings(config, ranks)
    whole = set(config.modules_to_save or ()) - {"classifier", "score"}
    for check, reason in (
        ("vllm-dora", "use_dora: vLLM has no DoRA" if config.use_dora else ""),
        (
            "vllm-modules",
            f"modules_to_save {sorted(whole)}: vLLM takes none, but for a classifier's head" if whole else "",
        ),
        ("vllm-bias", f"bias={config.bias!r}: vLLM takes no biases" if config.bias != "none" else ""),
        ("vllm-bias", "lora_bias: vLLM takes no biases" if config.lora_bias else ""),
        (
            "vllm-tokens",
            "trainable_token_indices: vLLM does not read them" if config.trainable_token_indices else "",
        ),
    ):
        if reason:
            yield Finding("note", check, "vLLM", reason, _MERGE)


def _rank_findings(config: LoraConfig, ranks: Mapping[str, int]) -> Iterator[Finding]:
    largest = max([config.r, *ranks.values()])
    if largest > RANKS[-1]:
        yield Finding(
            "note",
            "vllm-rank",
            "vLLM",
            f"rank {largest}: vLLM serves adapters of rank {RANKS[-1]} at most",
            f"Reduce it: lorakit resize --rank {RANKS[-1]}. Or merge it into the base.",
        )
    elif largest > _DEFAULT:
        least = next(rank for rank in RANKS if rank >= largest)
        yield Finding(
            "note",
            "vllm-rank",
            "vLLM",
            f"rank {largest} is over vLLM's default of {_DEFAULT}",
            f"Start vLLM with --max-lora-rank {least}.",
        )
    if config.rank_pattern or config.alpha_pattern:
        patterns = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
        yield Finding(
            "note",
            "vllm-patterns",
            "vLLM",
            f"{some(patterns)}: vLLM scales every layer by the one alpha and rank of the config, so layers with others would "
            "act too strongly or too weakly",
            _MERGE,
        )
