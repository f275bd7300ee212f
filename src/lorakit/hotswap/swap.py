"""From a file into the place of a loaded adapter. Everything is checked before anything is written."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lorakit.checkpoint.keys import apply_key_mapping, from_file_key, to_file_key
from lorakit.errors import AdapterStateError, KeyMismatchError, NonFiniteError, UnsupportedError, bullet_list
from lorakit.fitting import check_ties, file_keys, without_base_copies, wrong_shapes
from lorakit.hotswap.exchange import Exchange, quietly
from lorakit.hotswap.newcomer import Newcomer
from lorakit.hotswap.room import is_compiled
from lorakit.loading import HubOptions, LoadOptions, read_adapter
from lorakit.ops import is_finite
from lorakit.padding import Entry, first_ranks, rank_of
from lorakit.state_dict import registry_of
from lorakit.surgery import make_plan
from lorakit.surgery.naming import tied_names

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from lorakit.checkpoint.reading import AdapterFile


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Put the adapter of a file into the place of a loaded one, whose name, flags and parameters it takes over.

    The config of the adapter becomes the new one's. Scalings that were changed by hand become those of the new config.

    Args:
        model: a `PeftModel`, a model that adapters were injected into, or either compiled.
        model_name_or_path: a folder, or a hub repository where no such path exists.
        adapter_name: the adapter to replace.
        torch_device: where to bring the file's tensors before they are copied; the default does not go a long way round.
        **kwargs: `config`, `key_mapping`, `allow_pickle_bin` (see `lorakit.loading.LoadOptions`); `subfolder`,
            `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` (as in huggingface_hub).

    Raises:
        AdapterNameError: the model has no adapter of that name.
        AdapterStateError: adapters are merged, or a rank is larger than a compiled model has room for.
        PlanError: the two adapters differ in what a swap cannot change.
        AdapterNotFoundError, AdapterFormatError, ConfigError, KeyMismatchError, NonFiniteError, UnsupportedError: as
            `PeftModel.load_adapter`. Whatever is raised, also an interrupt, everything is as it was.
    """
    registry, _ = registry_of(model)
    registry.check_known([adapter_name])
    registry.check_unmerged("hot-swapping an adapter")
    options, hub = _options(kwargs)
    file, config = read_adapter(model_name_or_path, options, hub)
    with quietly():
        new = Newcomer.of(registry, adapter_name, config)
        exchange = _exchange(new, _loaded(new, file, options, torch_device))
        if exchange.larger and (is_compiled(model) or _is_prepared(new)):
            raise _no_room(new, exchange.larger)
        for note in new.plan.notes if new.plan is not None else ():
            warnings.warn(note, stacklevel=2)
        former = registry.configs[adapter_name]
        with exchange.written() as undo:
            undo(registry.configs.__setitem__, adapter_name, former)
            registry.configs[adapter_name] = replace(new.config, inference_mode=former.inference_mode)


def _options(given: Mapping[str, Any]) -> tuple[LoadOptions, HubOptions]:
    """Sort keyword arguments.

    Raises:
        TypeError: an unknown one.
    """
    hub = {name: value for name, value in given.items() if name in HubOptions.__dataclass_fields__}
    load = {name: value for name, value in given.items() if name in _LOAD_OPTIONS}
    unknown = sorted(given.keys() - hub.keys() - load.keys())
    if unknown:
        known = sorted({*HubOptions.__dataclass_fields__, *_LOAD_OPTIONS})
        raise TypeError(f"hotswap_adapter: unknown arguments {unknown}; known are {known}")
    return LoadOptions(**load), HubOptions(**hub)


_LOAD_OPTIONS = ("config", "key_mapping", "allow_pickle_bin")


def _loaded(
    new: Newcomer, file: AdapterFile, options: LoadOptions, device: str | torch.device | None
) -> list[tuple[Entry, Tensor]]:
    """What the file has for each tensor of the model, in the dtype and on the device of that.

    Raises:
        KeyMismatchError, AdapterFormatError, NonFiniteError: as a load.
    """
    wanted = {entry.file_name: entry for entry in new.entries()}
    keys = _keys(new, file, options, wanted)
    found = file.load(keys.values(), device=device or "cpu")
    tensors = {name: found[key] for name, key in keys.items()}
    if new.plan is not None:
        check_ties(new.plan, tensors, str(file.weights_path))
    values, bad = [], []
    for name, entry in wanted.items():
        given = tensors.get(name)
        if given is None or not entry.state_name:  # another tensor's, seen from a tied module
            continue
        value = given.to(entry.tensor.device, entry.tensor.dtype)
        if value.dtype != given.dtype and not is_finite(value):
            bad.append(f"{name} in {value.dtype}")
        values.append((entry, value))
    if bad:
        hint = "The numbers of the file are too large for the dtype of the loaded adapter."
        raise NonFiniteError(bullet_list(f"{file.weights_path}: not finite", bad, hint))
    return values


def _keys(
    new: Newcomer, file: AdapterFile, options: LoadOptions, wanted: Mapping[str, Entry]
) -> dict[str, str]:
    """The file's keys by name.

    Raises:
        KeyMismatchError: they, or the shapes, are not those of the adapter.
    """
    mapping = options.key_mapping or {}
    if new.plan is not None:
        keys = file_keys(file, mapping, new.plan)
    else:
        own = {from_file_key(key): key for key in file.tensors}
        keys = {name: own[old] for old, name in apply_key_mapping(own, mapping).items()}
    if keys.keys() - wanted.keys():  # they may be what another writer puts into a file beside the adapter
        plan = new.plan or make_plan(new.registry.model, new.config, source="file")
        keys = file_keys(file, mapping, plan)
        rest = {name: key for name, key in keys.items() if name not in wanted}
        kept, _ = without_base_copies(file, plan, rest)
        keys = {name: key for name, key in keys.items() if name in wanted or name in kept}
    tied = {} if new.plan is None else tied_names(new.plan)
    missing = [
        name for name, entry in wanted.items() if name not in keys and entry.state_name and name not in tied
    ]
    unexpected = [key for name, key in keys.items() if name not in wanted]
    shapes = {name: tuple(file.tensors[key].shape) for name, key in keys.items()}
    wrong = wrong_shapes({name: new.shape(entry) for name, entry in wanted.items()}, shapes, keys)
    if missing or unexpected or wrong:
        hint = "A swap writes into the tensors of the loaded adapter; load_adapter() takes any others."
        raise KeyMismatchError(
            str(file.weights_path),
            missing=map(to_file_key, missing),
            unexpected=unexpected,
            mismatched=wrong,
            hint=hint,
        )
    return keys


def _exchange(new: Newcomer, values: Sequence[tuple[Entry, Tensor]]) -> Exchange:
    """Which tensor takes which numbers, and in what shape.

    Raises:
        UnsupportedError: a factor is not held as one tensor.
    """
    found = Exchange(new.name)
    for entry, value in values:
        if entry.spot is None or value.shape == entry.tensor.shape:
            found.copies.append((entry.tensor, value))
            continue
        path, layout, factor, _ = entry.spot
        room = rank_of(layout, factor, entry.tensor)
        if not room:
            raise UnsupportedError(
                f"{entry.file_name}: held as {tuple(entry.tensor.shape)}, flattened or sharded; hot-swap before the "
                "model is distributed"
            )
        rank = new.settings[path].r
        if rank > room:
            found.larger.append((entry.tensor, value))
        else:
            part = first_ranks(layout, factor, entry.tensor, rank)
            found.zeros.append(entry.tensor)
            found.parts.append((part, value.view(part.shape)))
    for path in new.layers.keys() - new.settings.keys():
        if new.name in new.layers[path].r:
            found.zeros += [item.tensor for item in new.layers[path].tensors(new.name)]
    found.settings = [(new.layers[path], setting) for path, setting in new.settings.items()]
    return found


def _is_prepared(new: Newcomer) -> bool:
    scalings = (layer.scaling.get(new.name) for layer in new.layers.values())
    return any(isinstance(scaling, torch.Tensor) for scaling in scalings)


def _no_room(new: Newcomer, larger: Sequence[tuple[Tensor, Tensor]]) -> AdapterStateError:
    wanted = max(setting.r for setting in new.settings.values())
    return AdapterStateError(
        f"{len(larger)} tensors of adapter {new.name!r} would have to grow for rank {wanted}, "
        f"({tuple(larger[0][0].shape)} to {tuple(larger[0][1].shape)} first), and a compiled model would be compiled "
        f"again. Call prepare_model_for_compiled_hotswap(model, target_rank={wanted}) before compiling"
    )
