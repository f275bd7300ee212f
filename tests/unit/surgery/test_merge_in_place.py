"""`merge_and_unload` writes into the weights where they lie, unless somebody else would notice; interrupts lose nothing."""

from __future__ import annotations

import pytest
import torch
from tests.models import bits
from torch import nn

import lorakit
from lorakit.errors import NonFiniteError
from lorakit.ops import merge

WIDTH = 24
PAIRS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Embedding(7, WIDTH, dtype=dtype))


def adapted(base, **fields):
    config = lorakit.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False, **fields)
    return lorakit.get_peft_model(base, config)


def merged_beside(model):
    """What `merge_adapter` gives, which computes beside the weight."""
    model.merge_adapter()
    found = [layer.base_layer.weight.detach().clone() for layer in model.base_model.model]
    model.unmerge_adapter()
    return found


def same(weights, wanted):
    return [bits(weight) for weight in weights] == [bits(weight) for weight in wanted]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", PAIRS, ids=str)
def test_the_weight_stays_where_it_lies_and_holds_the_same_bits(dtype, fields, monkeypatch):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 5 * WIDTH)
    model = adapted(plain(dtype), **fields)
    parameters = [layer.base_layer.weight for layer in model.base_model.model]
    places = [parameter.data_ptr() for parameter in parameters]
    wanted = merged_beside(model)
    done = model.merge_and_unload()
    assert [layer.weight for layer in done] == parameters
    assert [layer.weight.data_ptr() for layer in done] == places
    assert same([layer.weight for layer in done], wanted)


def a_state_dict(base):
    return base.state_dict()


def an_array(base):
    return {f"{n}.weight": torch.from_numpy(layer.weight.detach().numpy()) for n, layer in enumerate(base)}


def a_buffer(base):
    kept = {}
    for n, layer in enumerate(base):
        buffer = torch.stack([layer.weight.detach(), torch.ones_like(layer.weight)])
        layer.weight = nn.Parameter(buffer[0])
        kept[f"{n}.weight"] = buffer[0]
    return kept


def shared_memory(base):
    base.share_memory()
    return {}


def the_same_parameter(base):
    base.append(nn.Linear(WIDTH, WIDTH))
    base[2].weight = base[0].weight
    base.append(nn.Linear(WIDTH, 7))
    base[3].weight = base[1].weight
    return {"0.weight": base[2].weight, "1.weight": base[3].weight}


@pytest.mark.parametrize("noticed", [a_state_dict, an_array, a_buffer, shared_memory, the_same_parameter])
@pytest.mark.filterwarnings("ignore:.*tied modules.*:UserWarning", "ignore:.*shared a weight.*:UserWarning")
def test_memory_that_somebody_else_looks_at_is_not_written_into(noticed):
    base = plain()
    elsewhere = noticed(base)
    before = {name: bits(value) for name, value in elsewhere.items()}
    parameters = [layer.weight for layer in base[:2]]
    held = [bits(parameter) for parameter in parameters]
    model = adapted(base)
    wanted = merged_beside(model)[:2] if len(base) == 2 else None
    done = model.merge_and_unload()
    assert {name: bits(value) for name, value in elsewhere.items()} == before
    assert [bits(parameter) for parameter in parameters] == held
    assert [bits(layer.weight) for layer in done[:2]] != held
    assert wanted is None or same([layer.weight for layer in done], wanted)


def test_a_file_that_the_weights_are_mapped_from_stays_as_it_is(tmp_path):
    base, path = plain(), tmp_path / "base.pt"
    torch.save(base.state_dict(), path)
    base.load_state_dict(torch.load(path, mmap=True), assign=True)
    before = path.read_bytes()
    model = adapted(base)
    wanted = merged_beside(model)
    assert same([layer.weight for layer in model.merge_and_unload()], wanted)
    assert path.read_bytes() == before


def test_weights_made_in_inference_mode_are_merged():
    with torch.inference_mode():
        base = plain()
    model = adapted(base)
    wanted = merged_beside(model)
    assert same([layer.weight for layer in model.merge_and_unload()], wanted)


class Experts(nn.Module):
    """A stack of matrices, as mixtures of experts hold them."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.stack)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupt_between_two_writes_leaves_no_weight_half_merged(dtype, number, when, monkeypatch):
    monkeypatch.setattr(merge, "TILE_ELEMENTS", 6 * WIDTH)
    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": Experts().to(dtype), "last": nn.Linear(WIDTH, WIDTH, dtype=dtype)})
    fields = {"r": 2, "init_lora_weights": False, "target_modules": ["last"]}
    model = lorakit.get_peft_model(
        base, lorakit.LoraConfig(**fields, target_parameters=["experts.stack"]), adapter_name="one"
    )
    model.add_adapter("two", lorakit.LoraConfig(**fields))
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter()
    wanted = [
        parameter.detach().clone() for name, parameter in base.named_parameters() if "lora_" not in name
    ]
    model.unmerge_adapter()
    before = [bits(parameter) for name, parameter in base.named_parameters() if "lora_" not in name]
    real, seen = merge._writes, []

    def writes(*args, **kwargs):
        for write in real(*args, **kwargs):

            def interrupted(write=write):
                seen.append(1)
                if len(seen) - 1 == number and when == "before":
                    raise KeyboardInterrupt
                write()
                if len(seen) - 1 == number and when == "after":
                    raise KeyboardInterrupt

            yield interrupted

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_writes", writes)
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
    now = [parameter for name, parameter in base.named_parameters() if "lora_" not in name]
    for was, is_now, whole in zip(before, now, wanted, strict=True):
        assert bits(is_now) in {was, bits(whole)}
    assert same(model.merge_and_unload().parameters(), wanted)


def test_what_is_not_finite_is_refused_before_anything_is_written():
    model = adapted(plain(torch.float16))
    last = model.base_model.model[1]
    with torch.no_grad():
        last.lora_embedding_B["default"].fill_(3e4)
        last.lora_embedding_A["default"].fill_(3e4)
    before = [bits(layer.base_layer.weight) for layer in model.base_model.model]
    with pytest.raises(NonFiniteError):
        model.merge_and_unload()
    assert [bits(layer.base_layer.weight) for layer in model.base_model.model] == before
