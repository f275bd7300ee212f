"""What a call of a model carries for aLoRA adapters: from which token on each of its samples is theirs.

It is read off the tokens once, before the model runs. A call of the model that does not come through here carries
nothing, and there aLoRA adapters do not act.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import ConfigError, UnsupportedError
from lorakit.layers.chosen import chosen_by, handing
from lorakit.surgery.choice import carry_checkpoints
from lorakit.variants.alora import Activation, find_invocation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from lorakit.surgery.registry import AdapterRegistry

    Offsets = Sequence[int | None] | Tensor

_HOW = "alora_offsets=[...], for each sample how many tokens at its end the adapter acts on, or None"
_SEVERAL_AT_ONCE = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "prefill_chunk_size",
)
"""What makes `generate` run several tokens at once beside the prompt; a layer cannot tell where they belong."""


class Prompt(NamedTuple):
    """What a call is given, as far as it matters here.

    Attributes:
        ids: (samples, tokens) or None.
        embeds: (samples, tokens, features) or None.
        cached: whether it continues what was computed before.
        adds: whether the call adds tokens to it.
    """

    ids: Tensor | None
    embeds: Tensor | None
    cached: bool
    adds: bool

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any], *, adds: bool = False) -> Prompt:
        """Read off the arguments of a model's `forward` or `generate`."""
        given = (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
        ids = next((each for each in given if isinstance(each, torch.Tensor)), None)
        embeds = kwargs.get("inputs_embeds")
        if ids is not None and ids.is_floating_point():
            ids, embeds = None, ids
        cache = kwargs.get("past_key_values")
        cached = cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0)
        return Prompt(ids.unsqueeze(0) if ids is not None and ids.ndim == 1 else ids, embeds, cached, adds)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Samples and tokens, if anything says so."""
        known = self.embeds if self.ids is None else self.ids
        return None if known is None or known.ndim < 2 else (known.shape[0], known.shape[1])


def invoked(registry: AdapterRegistry) -> tuple[str, ...]:
    """The aLoRA adapters among those that act in the running call."""
    if not registry.enabled:
        return ()
    chosen = chosen_by(registry.owner)
    names = registry.active if chosen is None else chosen.names
    return tuple([name for name in names if registry.configs[name].alora_invocation_tokens])


@contextmanager
def invoking(
    registry: AdapterRegistry,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    offsets: Offsets | None,
    *,
    adds: bool = False,
) -> Iterator[None]:
    """Within this context the aLoRA adapters act from their invocation tokens on.

    Args:
        registry: the model's adapters.
        names: of the aLoRA adapters that act.
        args: of the call.
        kwargs: of the call.
        offsets: for each sample how many tokens at its end are the adapter's, None or 0 for none of them; None looks
            for the last occurrence of the invocation tokens.
        adds: whether the call is one of `generate`.

    Raises:
        ConfigError: nothing says where to begin, or the offsets do not fit the batch, or no adapter here needs them.
        UnsupportedError: the model has an encoder and a decoder, or `generate` is to run in a way that does not go.
    """
    if not names:
        if offsets is not None and registry.enabled:
            raise ConfigError(
                "alora_offsets: given, but none of the adapters that act has alora_invocation_tokens; leave it out"
            )
        yield
        return
    _check_model(registry, kwargs, adds=adds)
    prompt = Prompt.of(args, kwargs, adds=adds)
    given = None if offsets is None else _checked(offsets, prompt)
    items = {name: _activation(registry, name, prompt, given) for name in names}
    carry_checkpoints(registry)
    with handing(registry.owner, items):
        yield


def _check_model(registry: AdapterRegistry, kwargs: Mapping[str, Any], *, adds: bool) -> None:
    config = getattr(registry.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            "aLoRA needs one sequence of tokens that every layer sees; this model has an encoder and a decoder. "
            "Train plain LoRA (alora_invocation_tokens=None)"
        )
    if not adds:
        return
    usual = kwargs.get("generation_config") or getattr(registry.model, "generation_config", None)
    found = [name for name in _SEVERAL_AT_ONCE if kwargs.get(name, getattr(usual, name, None))]
    if found:
        raise UnsupportedError(
            f"generate() with {found} runs several tokens at once, and where they belong an aLoRA adapter cannot "
            "tell; leave it out"
        )


def _checked(offsets: Offsets, prompt: Prompt) -> Tensor:
    """The offsets as int64 on the CPU.

    Raises:
        ConfigError: one is no count, or there is not one for each sample.
    """
    given = offsets.tolist() if isinstance(offsets, torch.Tensor) else list(offsets)
    counts = [0 if each is None else each for each in given]
    if not counts or any(not isinstance(each, int) or isinstance(each, bool) or each < 0 for each in counts):
        raise ConfigError(f"alora_offsets: got {given!r}, wanted {_HOW}")
    if prompt.shape is not None and prompt.shape[0] != len(counts):
        raise ConfigError(
            f"alora_offsets: got {len(counts)} for {prompt.shape[0]} samples; wanted one for each sample"
        )
    return torch.tensor(counts)


def _activation(registry: AdapterRegistry, name: str, prompt: Prompt, given: Tensor | None) -> Activation:
    """Where one adapter acts on its own samples."""
    rows = _rows_of(registry, name, prompt.shape if given is None else given.shape)
    tokens = registry.configs[name].alora_invocation_tokens
    assert tokens
    if given is None:
        if prompt.ids is None or prompt.ids.ndim != 2:
            raise ConfigError(
                f"{name!r} acts from its invocation tokens on, and this call has no token ids (samples, tokens) to "
                f"find them in; pass input_ids, or {_HOW}"
            )
        ids = prompt.ids
        offsets = find_invocation(ids if rows is None else ids[rows.to(ids.device)], tokens).cpu()
        if prompt.cached and not prompt.adds and not bool((offsets > 0).all()):
            raise ConfigError(
                f"{name!r}: the invocation tokens are not among the input_ids of every sample, and what "
                f"past_key_values hold of it cannot be searched; pass {_HOW}"
            )
    else:
        offsets = given if rows is None else given[rows]
    shape = prompt.shape
    return Activation(offsets, shape[1] if prompt.adds and shape else None, repeats=prompt.adds)


def _rows_of(registry: AdapterRegistry, name: str, batch: Sequence[int] | None) -> Tensor | None:
    """Which samples of a batch of this shape are an adapter's in the running call; None: all.

    Raises:
        ConfigError: the call does not name an adapter for each sample.
    """
    chosen = chosen_by(registry.owner)
    if chosen is None or chosen.ids is None:
        return None
    if batch is not None and batch[0] != len(chosen.ids):
        raise ConfigError(
            f"adapter_names holds {len(chosen.ids)} names for {batch[0]} samples; give one name for each sample"
        )
    place = chosen.names.index(name)
    return torch.tensor([row for row, number in enumerate(chosen.ids) if number == place])
