"""Hot-swapping against PEFT's: the same outputs from the same files, and files that PEFT reads."""

from __future__ import annotations

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as swap_theirs
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as prepare_theirs
from torch import nn

import lorakit
from lorakit.errors import AdapterError, AdapterStateError
from parity.models import NAMED_WARNINGS, adapter_parameters, build, output_of, peft, randomize

pytestmark = [
    *NAMED_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]


class Pictures(nn.Module):
    """Convolutions, one of them grouped, and a linear."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, groups=2, stride=2)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))).mean(dim=(2, 3)))


def pictures():
    torch.manual_seed(0)
    return Pictures().eval()


def out(model, kind):
    if kind == "pictures":
        x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        return model(x).detach()
    return output_of(model, kind).detach()


def base(kind):
    return pictures() if kind == "pictures" else build(kind)


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


KINDS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "llama_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "pictures": {"target_modules": ["first", "second", "last"]},
}
NEW = {
    "same": {"r": 4, "lora_alpha": 8},
    "alpha": {"r": 4, "lora_alpha": 20},
    "smaller": {"r": 2, "lora_alpha": 3},
    "larger": {"r": 8, "lora_alpha": 3},
}


def save(kind, folder, seed, **changes):
    """An adapter that PEFT made and wrote."""
    model = peft.get_peft_model(base(kind), peft.LoraConfig(**{**KINDS[kind], **changes})).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("kind", KINDS)
def test_swaps_alike(kind, ready, tmp_path):
    save(kind, tmp_path / "old", 1, r=4, lora_alpha=8)
    for seed, (name, changes) in enumerate(NEW.items(), 2):
        save(kind, tmp_path / name, seed, **changes)
    ours = lorakit.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    if ready:
        lorakit.prepare_model_for_compiled_hotswap(ours, target_rank=8)
        prepare_theirs(theirs, target_rank=8)
        assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
            k: tuple(v.shape) for k, v in theirs.state_dict().items()
        }
        close(out(ours, kind), out(theirs, kind))
    for name in NEW:
        lorakit.hotswap_adapter(ours, tmp_path / name, "default")
        swap_theirs(theirs, str(tmp_path / name), "default", torch_device="cpu")
        close(out(ours, kind), out(theirs, kind))
        close(out(ours, kind), out(peft.PeftModel.from_pretrained(base(kind), tmp_path / name), kind))
        assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
            k: tuple(v.shape) for k, v in theirs.state_dict().items()
        }


@pytest.mark.parametrize("kind", ["llama", "pictures"])
def test_layers_that_only_the_old_adapter_has(kind, tmp_path):
    targets = KINDS[kind]["target_modules"]
    save(kind, tmp_path / "old", 1, r=4)
    save(kind, tmp_path / "new", 2, r=2, target_modules=targets[:1])
    ours = lorakit.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    lorakit.hotswap_adapter(ours, tmp_path / "new", "default")
    swap_theirs(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    close(out(ours, kind), out(theirs, kind))
    with pytest.raises(RuntimeError, match="unexpected keys"):
        swap_theirs(
            peft.PeftModel.from_pretrained(base(kind), tmp_path / "new"), str(tmp_path / "old"), "default"
        )
    with pytest.raises(AdapterError, match="not on this layer"):
        lorakit.hotswap_adapter(
            lorakit.PeftModel.from_pretrained(base(kind), tmp_path / "new"), tmp_path / "old", "default"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
def test_what_is_saved_after_a_swap_is_the_new_adapter(kind, ready, tmp_path):
    """PEFT keeps the old config, so its own file no longer says what its model computes; ours does, to PEFT too."""
    save(kind, tmp_path / "old", 1, r=8, lora_alpha=8)
    save(kind, tmp_path / "new", 2, r=4, lora_alpha=20)
    ours = lorakit.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(base(kind), tmp_path / "old")
    if ready:
        lorakit.prepare_model_for_compiled_hotswap(ours, target_rank=16)
    lorakit.hotswap_adapter(ours, tmp_path / "new", "default")
    swap_theirs(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    ours.save_pretrained(tmp_path / "ours")
    close(out(peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours"), kind), out(ours, kind))
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = peft.PeftModel.from_pretrained(base(kind), tmp_path / "theirs")
    assert (out(reloaded, kind) - out(theirs, kind)).abs().max() > 1e-3


def test_what_both_refuse(tmp_path):
    save("llama", tmp_path / "old", 1, r=4)
    save("llama", tmp_path / "large", 2, r=8)
    for library, prepare in (
        (lorakit, lorakit.prepare_model_for_compiled_hotswap),
        (peft, prepare_theirs),
    ):
        model = library.PeftModel.from_pretrained(build("llama"), tmp_path / "large")
        with pytest.raises((ValueError, AdapterStateError), match="rank"):
            prepare(model, target_rank=4)
        with pytest.raises(ValueError, match=r"[Nn]o adapter"):
            prepare(build("llama"), target_rank=4)
        with pytest.raises((ValueError, AdapterStateError), match=r"compil(ing|ed)"):
            prepare(torch.compile(model, backend="eager"), target_rank=16)
    merged = lorakit.PeftModel.from_pretrained(build("llama"), tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "old")
    for model, swap in ((merged, lorakit.hotswap_adapter), (theirs, swap_theirs)):
        model.merge_adapter()
        with pytest.raises((ValueError, AdapterStateError), match="merged"):
            swap(model, str(tmp_path / "large"), "default")


def test_files_without_a_check_there_and_with_one_here(tmp_path):
    """A missing key is silent with PEFT: the swap leaves the old adapter's factor out, and half of the new one in."""
    from safetensors.torch import load_file, save_file

    save("llama", tmp_path / "old", 1, r=4)
    save("llama", tmp_path / "new", 2, r=4)
    path = tmp_path / "new" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "old")
    swap_theirs(theirs, str(tmp_path / "new"), "default", torch_device="cpu")
    ours = lorakit.PeftModel.from_pretrained(build("llama"), tmp_path / "old")
    with pytest.raises(AdapterError, match="missing"):
        lorakit.hotswap_adapter(ours, tmp_path / "new", "default")
    assert adapter_parameters(ours) == {}
