"""The config of an adapter that was combined from others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorakit.config.lora import LoraConfig


def combined_config(
    configs: Sequence[LoraConfig],
    ranks: Mapping[str, int],
    *,
    biased: bool,
    modules_to_save: list[str] | None,
    tokens: dict[str, list[int]],
) -> LoraConfig:
    """A config that says of the result what its tensors are; what it targets is the first one's.

    Args:
        configs: of the adapters that were combined.
        ranks: of the result, by the path of the module that a config names.
        biased: whether a B has a bias.
        modules_to_save: what the result holds whole.
        tokens: whose rows it holds, by module.
    """
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else configs[0].r
    patterns = {"^" + path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != r}
    trained = [config.bias for config in configs]
    return replace(
        configs[0],
        r=r,
        lora_alpha=r,  # the scalings are in the factors
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        use_rslora=False,
        lora_bias=biased,
        bias=next((value for value in ("all", "lora_only") if value in trained), "none"),
        modules_to_save=modules_to_save or None,
        trainable_token_indices=tokens or None,
        ensure_weight_tying=all(config.ensure_weight_tying for config in configs),
        init_lora_weights=True,
        inference_mode=True,
        # what such adapters add is in the factors too
        use_qalora=False,
        velora_config=None,
        monteclora_config=None,
        use_bdlora=None,
        kasa_config=None,
    )
