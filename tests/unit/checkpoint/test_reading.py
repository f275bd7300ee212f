"""Which config counts, what is loaded, and what PEFT makes of our files."""

from __future__ import annotations

import copy
import io
import json
import tracemalloc
import warnings
from collections import Counter

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.checkpoint.layout import pending_config_name
from lorakit.checkpoint.reading import open_adapter, read_config_dict
from lorakit.checkpoint.writing import write_adapter
from lorakit.errors import AdapterFormatError, AdapterNotFoundError, NonFiniteError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def test_round_trip(saved, config, tensors):
    adapter = open_adapter(saved)
    assert adapter.config == config | {"target_modules": ["q", "v"]} == read_config_dict(saved)
    assert adapter.metadata["format"] == "pt"
    assert not adapter.repaired
    assert (adapter.weights_path, adapter.config_path) == (saved / WEIGHTS, saved / CONFIG)
    loaded = adapter.load()
    assert loaded.keys() == tensors.keys() == adapter.tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype == adapter.tensors[key].dtype
        assert loaded[key].shape == tensor.shape == adapter.tensors[key].shape
        assert adapter.tensors[key].nbytes == tensor.nbytes
        assert torch.equal(loaded[key], tensor)


def test_some_keys(saved, tensors):
    keys = list(tensors)[2:0:-1]
    for checked in (True, False):
        loaded = open_adapter(saved).load(keys, check_digest=checked, device=torch.device("cpu"))
        assert list(loaded) == keys
        assert all(torch.equal(loaded[key], tensors[key]) for key in keys)
    with pytest.raises(AdapterFormatError, match="nope"):
        open_adapter(saved).load(["nope"])


@pytest.mark.parametrize(
    ("count", "size"),
    [(40, 64), (3, 300_000), (40, 20_000), (1, 5)],
    ids=["small", "large", "several runs", "one"],
)
def test_every_tensor_owns_its_memory(count, size, tmp_path, config):
    torch.manual_seed(0)
    tensors = {f"base_model.model.{number}.lora_A.weight": torch.randn(1, size) for number in range(count)}
    tensors["base_model.model.empty.lora_A.weight"] = torch.empty(0, 3)
    write_adapter(tmp_path, config, tensors)
    loaded = open_adapter(tmp_path).load()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in loaded.values())
    first, *others = (tensor for tensor in loaded.values() if tensor.numel())
    first.add_(1)
    assert not any(tensor._version for tensor in others)


def many_small(tmp_path, config, count=400, size=2_000):
    """A folder whose tensors are read in four runs of a mebibyte at most."""
    torch.manual_seed(0)
    tensors = {f"base_model.model.{n:03}.lora_A.weight": torch.randn(1, size) for n in range(count)}
    write_adapter(tmp_path, config, tensors)
    return open_adapter(tmp_path)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_small_tensors_are_looked_at_together_and_not_copied(tmp_path, config):
    adapter = many_small(tmp_path, config)
    with Operations() as operations:
        adapter.load()
    assert operations.counts.pop("aminmax") == 4
    assert not operations.counts.keys() & {"clone", "cat", "copy_", "_to_copy", "split", "isfinite"}


def test_small_tensors_are_independent(tmp_path, config):
    first, second, *_ = many_small(tmp_path, config).load().values()
    square = (torch.nn.Parameter(second) ** 2).sum()
    first.add_(1)  # another counter of versions: what was computed with the neighbour still holds
    square.backward()
    file = io.BytesIO()
    torch.save(first, file)
    assert file.tell() < 2 * first.nbytes
    assert copy.deepcopy(first).untyped_storage().nbytes() == first.nbytes
    assert first.data_ptr() % 64 == 0
    assert torch.equal(first.clone().share_memory_(), first.share_memory_())


def test_the_memory_of_small_tensors_goes_with_them(tmp_path, config):
    adapter = many_small(tmp_path, config)
    tracemalloc.start()
    try:
        loaded = adapter.load()
        assert tracemalloc.get_traced_memory()[0] > 400 * 2_000 * 4
        kept = loaded.popitem()
        del loaded
        assert tracemalloc.get_traced_memory()[0] < 3 << 19  # one run, of a mebibyte
        del kept
        assert tracemalloc.get_traced_memory()[0] < 1 << 17
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, tmp_path, config):
    tensors = {
        f"base_model.model.{number}.lora_A.weight": torch.ones(2, 3, dtype=dtype) for number in range(9)
    }
    write_adapter(tmp_path, config, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loaded = open_adapter(tmp_path).load()
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_among_many_small_tensors_is_named(value, tmp_path, config):
    tensors = {f"base_model.model.{number}.lora_A.weight": torch.ones(2, 3) for number in range(30)}
    tensors["base_model.model.17.lora_A.weight"][1, 2] = value
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"target_modules": ["q", "v"]}))
    with pytest.raises(NonFiniteError, match=r"17\.lora_A.*of 6") as caught:
        open_adapter(tmp_path).load()
    assert str(caught.value).count("lora_A") == 1


def test_loaded_tensors_do_not_follow_the_file(saved, tensors):
    loaded = open_adapter(saved).load()
    with (saved / WEIGHTS).open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\1" * 64)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_safetensors_reads_ours_and_we_read_its(saved, config, tensors, tmp_path):
    theirs = safetensors.torch.load_file(saved / WEIGHTS)
    assert all(torch.equal(theirs[key], tensors[key]) for key in tensors)
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    ours = open_adapter(saved).load()
    assert all(torch.equal(ours[key], tensors[key]) for key in tensors)


def test_an_edited_config_counts_and_is_told(saved, config):
    edited = config | {"target_modules": ["q", "v"], "r": 99, "new": 1}
    (saved / CONFIG).write_text(json.dumps(edited))
    with pytest.warns(UserWarning, match="changed after the adapter was saved .*'new', 'r'"):
        adapter = open_adapter(saved)
    assert adapter.config == edited
    assert not adapter.repaired
    adapter.load()


def test_another_layout_of_the_same_config_is_no_change(saved, config):
    (saved / CONFIG).write_text(json.dumps(config | {"target_modules": ["q", "v"]}))
    assert open_adapter(saved).config["r"] == 4


def test_a_config_broken_by_hand_is_an_error(saved):
    (saved / CONFIG).write_text('{"r": ')
    with pytest.raises(AdapterFormatError, match="not valid JSON"):
        open_adapter(saved)


@pytest.mark.parametrize("read", [read_config_dict, lambda folder: open_adapter(folder).config])
@pytest.mark.parametrize("state", ["missing", "old", "empty"])
def test_a_cut_save_is_repaired(saved, config, state, read):
    digest = open_adapter(saved).metadata["lorakit.digest"]
    (saved / CONFIG).rename(saved / pending_config_name(digest))
    if state != "missing":
        (saved / CONFIG).write_text('{"r": 1}' if state == "old" else "")
        with pytest.warns(UserWarning, match="a save was cut"):
            found = read(saved)
    else:
        found = read(saved)
    assert found == config | {"target_modules": ["q", "v"]}
    write_adapter(saved, config, {})
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_a_temporary_config_of_other_weights_does_not_count(saved):
    (saved / pending_config_name("sha256:" + "0" * 64)).write_text('{"r": 1}')
    (saved / CONFIG).write_text('{"r": 7}')
    with pytest.warns(UserWarning, match="changed after"):
        assert open_adapter(saved).config == {"r": 7}


def test_no_config_anywhere(saved, tensors):
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    (saved / CONFIG).unlink()
    with pytest.raises(AdapterNotFoundError, match="carries no copy"):
        open_adapter(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        read_config_dict(saved)


def test_a_config_without_weights_is_readable(saved):
    (saved / WEIGHTS).unlink()
    assert read_config_dict(saved)["r"] == 4


def test_peft_loads_our_folder(tmp_path):
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    theirs = peft.get_peft_model(
        base(), peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    )
    tensors = peft.get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"].to_dict() | {"peft_type": "LORA", "inference_mode": True}
    write_adapter(tmp_path / "a", config, tensors)
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "a"))
    assert torch.equal(again(x), theirs(x))
    theirs.save_pretrained(tmp_path / "b")
    loaded = open_adapter(tmp_path / "b").load()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
