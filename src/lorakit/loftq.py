"""LoftQ on a base that is quantised already: its adapter makes up for what quantisation took from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm.auto import tqdm

from lorakit.checkpoint.model_files import in_hub_cache, open_model_files
from lorakit.errors import (
    AdapterFormatError,
    AdapterStateError,
    KeyMismatchError,
    UnsupportedError,
    at_path,
    bullet_list,
)
from lorakit.init.context import Misfit, check_finite
from lorakit.init.loftq import fit, norm_of
from lorakit.state_dict import registry_of
from lorakit.weights.opaque import OpaqueCodec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor, nn

    from lorakit.checkpoint.model_files import ModelFiles
    from lorakit.layers import LoraLayer
    from lorakit.surgery import AdapterRegistry


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Misfit]:
    """Give an adapter on a quantised base the factors that fit best what quantisation took from each weight.

    One layer after another: the original weight W is read, and A and B become the best rank-r fit of W - Q, where Q is
    what the base holds, dequantised, whatever the adapter's scaling. That is the last half step of LoftQ (Li et al.,
    2023, arXiv:2310.08659), which would choose Q as well. Layers whose base is not quantised keep what they have.

    A progress bar runs, and a line for each layer is written beside it (by `tqdm.write`, to the standard output).

    Args:
        peft_model: a `PeftModel`, or a model that adapters were injected into, whose base was quantised by
            bitsandbytes, torchao or HQQ.
        model_path: the original weights: a safetensors file, an index (`*.index.json`), a folder with one of either,
            or the tensors themselves by name. They are named as in the base model, with or without its
            `base_model_prefix`. None: the place that the base's config names, a folder or a model in the hub's cache.
        adapter_name: which adapter.
        callback: is called with the model and the layer's path after each layer; unless it gives a true value, the
            layer gets back what it had. With it one may keep what makes the model's outputs better.
        show_progress_bar: False shows neither the bar nor the lines.

    Returns:
        By path, for each layer that has new factors: the Frobenius norms of W, of W - Q, and of what the adapter leaves
        of that.

    Raises:
        AdapterNameError: no such adapter.
        AdapterStateError: adapters are merged; none of the adapter's weights is quantised.
        UnsupportedError: a weight cannot be dequantised; the adapter is more than plain LoRA; layers are replicated.
        AdapterNotFoundError, AdapterFormatError: the original weights are not there, or damaged.
        KeyMismatchError: some of them are missing, or of another shape; all are listed.
        NonFiniteError: one of them holds NaN or infinity. After any exception, also one that `callback` raises, the
            adapter is as it was.
    """
    registry, _ = registry_of(peft_model)
    registry.check_known([adapter_name])
    registry.check_unmerged("replacing its weights")
    layers = _quantised_layers(registry, adapter_name)
    originals = _originals(registry, layers, model_path)
    errors: dict[str, Misfit] = {}
    with ExitStack() as undo, torch.no_grad():
        for path in tqdm(layers, desc="LoftQ", unit="layer", disable=not show_progress_bar):
            former = Pair.of(layers[path], adapter_name)
            kept = former.copied()
            undo.callback(former.take, kept)
            with at_path(path):
                misfit = _refit(layers[path], adapter_name, originals.read(path))
            if callback is None or _asked(callback, peft_model, path):
                errors[path] = misfit
                told = str(misfit)
            else:
                former.take(kept)
                told = "not wanted, left as it was"
            if show_progress_bar:
                tqdm.write(f"{path}: {told}")
        undo.pop_all()
    return errors


def _asked(callback: Callable[[nn.Module, str], bool], model: nn.Module, path: str) -> bool:
    with torch.enable_grad():  # the caller's function runs as the caller would run it
        return bool(callback(model, path))


class Pair(NamedTuple):
    """The factors of an adapter on one layer, the parameters themselves."""

    A: Tensor
    B: Tensor

    @staticmethod
    def of(layer: LoraLayer, name: str) -> Pair:
        """Without the room that hot-swapping may keep beyond the rank."""
        A, B, _ = layer.stored(name)
        return Pair(A[: layer.r[name]], B[:, : layer.r[name]])

    def copied(self) -> Pair:
        """The same numbers in memory of their own."""
        return Pair(self.A.clone(), self.B.clone())

    def take(self, other: Pair) -> None:
        """Copy the numbers of another pair."""
        with torch.no_grad():
            self.A.copy_(other.A)
            self.B.copy_(other.B)


def _refit(layer: LoraLayer, name: str, original: Tensor) -> Misfit:
    """Fit the factors of a layer to its original weight."""
    if not original.is_floating_point():
        raise AdapterFormatError(f"the original weight is {original.dtype}, quantised itself")
    own = Pair.of(layer, name)
    W = original.to(own.A.device, torch.float32)
    check_finite("the original weight", W)
    found = fit(W - layer.read_weight(torch.float32), layer.r[name], float(layer.scaling[name]), own.A.dtype)
    own.take(Pair(found.factors.A, found.factors.B))
    return Misfit(norm_of(W), found.before, found.after)


def _quantised_layers(registry: AdapterRegistry, name: str) -> dict[str, LoraLayer]:
    """The layers whose factors are to be fitted, by path."""
    layers = {
        path: layer
        for path, layer in registry.layers.items()
        if name in layer.r and name not in layer.tied and layer.codec.on_grid
    }
    if not layers:
        raise AdapterStateError(
            f"none of the weights under adapter {name!r} is quantised; load the base quantised, or let LoftQ quantise "
            "it with init_lora_weights='loftq'"
        )
    problems = [f"{path}: {reason}" for path, layer in layers.items() if (reason := _why_not(layer, name))]
    if registry.replication is not None:
        problems.append("layer_replication: the layers are not those of the original weights")
    if problems:
        raise UnsupportedError(bullet_list(f"adapter {name!r} cannot be fitted", problems))
    return layers


def _why_not(layer: LoraLayer, name: str) -> str:
    if isinstance(layer.codec, OpaqueCodec):
        return "its weight cannot be dequantised here; train the adapter from where it begins"
    if name in layer.variants:
        return f"{layer.variants[name].name} is more than B @ A; use plain LoRA"
    if name in layer.frozen:
        return f"its {sorted(layer.frozen[name])} is never trained and would lose its meaning; use plain LoRA"
    if layer.lora_offset is not None and name in layer.lora_offset:
        return (
            "something is taken off the base for it; use an adapter that begins with init_lora_weights=True"
        )
    return "" if float(layer.scaling[name]) else "its scaling is 0; set it before"


class _Originals(NamedTuple):
    """The original weights by the paths of their layers."""

    source: ModelFiles | Mapping[str, Tensor]
    names: Mapping[str, str]
    transposed: frozenset[str]

    def read(self, path: str) -> Tensor:
        """(out, in)."""
        name = self.names[path]
        tensor = self.source[name] if isinstance(self.source, Mapping) else self.source.read(name)
        return tensor.detach().T if path in self.transposed else tensor.detach()


def _originals(
    registry: AdapterRegistry,
    layers: Mapping[str, LoraLayer],
    given: str | os.PathLike[str] | Mapping[str, Tensor] | None,
) -> _Originals:
    """Find all of them before anything is computed."""
    if isinstance(given, Mapping):
        source: ModelFiles | Mapping[str, Tensor] = given
        known, where = set(given), "the tensors"
    else:
        files = open_model_files(_place(registry.model) if given is None else given)
        source, known, where = files, set(files.files), str(files.place)
    prefix = getattr(registry.model, "base_model_prefix", "")
    names, missing, wrong, turned = {}, [], [], set()
    for path, layer in layers.items():
        wanted = f"{path}.weight"  # whatever the quantised layer calls its own (HQQ: W_q)
        name = next((name for name in _spellings(wanted, prefix) if name in known), None)
        if name is None:
            missing.append(wanted)
            continue
        names[path] = name
        if _is_turned(layer):
            turned.add(path)
        shape = tuple(source[name].shape) if isinstance(source, Mapping) else source.shape(name)
        expected = layer.layout.shape[::-1] if path in turned else layer.layout.shape
        if shape != expected:
            wrong.append(f"{name}: found {shape}, expected {expected}")
    if missing or wrong:
        hint = "Wanted are the weights of the base model before it was quantised."
        raise KeyMismatchError(where, "the model", missing=missing, mismatched=wrong, hint=hint)
    return _Originals(source, names, frozenset(turned))


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A weight's name; a file may be that of the model without its head, or the model that without one."""
    return (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)


def _is_turned(layer: LoraLayer) -> bool:
    """Whether transformers made the quantised layer of a `Conv1D`, whose weight is stored as (in, out)."""
    return getattr(getattr(layer.get_base_layer(), "source_cls", None), "__name__", "") == "Conv1D"


def _place(model: nn.Module) -> str | Path:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise AdapterStateError("the base's config names no place of its weights; pass model_path")
    return name if Path(name).is_dir() else in_hub_cache(name)
