"""A merge on disk beside the same merge in memory, for tests."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager

import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakit import PeftModel, get_peft_model, merge_checkpoint
from models import randomise


@contextmanager
def quiet():
    """Transformers says nothing of tiny configs meanwhile."""
    log = transformers.utils.logging
    log.disable_progress_bar()
    before = log.get_verbosity()
    log.set_verbosity_error()
    yield
    log.set_verbosity(before)


def save_base(model, folder, **options):
    """A model on disk: by transformers where it is one of its models, else its state in one file."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **options)
    else:
        folder.mkdir(parents=True)
        save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def read_files(folder):
    """Every tensor of a checkpoint by its name there."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def read_bytes(folder):
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_adapter(model, config, folder, *, seed=3, scale=0.1):
    """An adapter for a model in which no factor is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties and of biases, which are tested elsewhere
        peft = get_peft_model(model, config)
    randomise(peft, seed=seed, scale=scale)
    peft.save_pretrained(folder)
    return folder


def merged_in_memory(make, adapters, weights=None):
    """The state of a fresh model with adapters merged for good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are tied no more
        peft = None
        names = []
        for number, folder in enumerate(adapters):
            names.append(f"a{number}")
            if peft is None:
                peft = PeftModel.from_pretrained(make(), folder, adapter_name=names[-1])
            else:
                peft.load_adapter(folder, adapter_name=names[-1])
        for name, weight in zip(names, weights or (), strict=False):
            for layer in peft.base_model.registry.layers.values():
                layer.set_scale(name, weight)
        merged = peft.merge_and_unload(adapter_names=names)
    return merged.state_dict()


def loaded(model, folder):
    """The state that a model has when it is loaded from a merged checkpoint."""
    if not hasattr(model, "save_pretrained"):
        return read_files(folder)
    model, info = type(model).from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        **({"num_labels": 3} if hasattr(model, "num_labels") else {}),
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.state_dict()


def differences(mine, wanted):
    """Names of the tensors whose bits differ."""
    assert mine.keys() == wanted.keys()
    return [
        name
        for name in wanted
        if mine[name].dtype != wanted[name].dtype or not torch.equal(mine[name], wanted[name])
    ]


def compare(folder, make, configs, *, base=None, save=None, weights=None, **options):
    """Merge on disk and in memory; the report, after every bit was compared.

    Args:
        folder: to work in.
        make: gives the model, always the same.
        configs: of the adapters.
        base: what of the model is saved as the base; default the whole.
        save: options of `save_pretrained` for the base.
        weights: of the adapters.
        options: of `merge_checkpoint`.
    """
    model = make()
    save_base(model if base is None else base(model), folder / "base", **(save or {}))
    adapters = [
        save_adapter(make(), config, folder / f"adapter{number}", seed=number)
        for number, config in enumerate(configs)
    ]
    report = merge_checkpoint(folder / "base", adapters, folder / "out", weights=weights, **options)
    mine = loaded(make(), folder / "out")
    assert not differences(mine, merged_in_memory(make, adapters, weights))
    changed = differences(mine, make().state_dict())
    assert changed, "the adapter has no effect"
    return report


def config_of(folder):
    """The parsed config.json of a checkpoint."""
    return json.loads((folder / "config.json").read_text())
