"""Files that must be refused, cheaply, each with its own reason."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from lorakit.checkpoint.reading import open_adapter, read_config_dict
from lorakit.errors import AdapterError, AdapterFormatError, AdapterNotFoundError, NonFiniteError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def text(value):
    return json.dumps(value).encode()


ONE = text(entry())

# header, data, what the message says
HEADERS = {
    "not_json": (b"{nonsense", b"", "not valid JSON"),
    "a_list": (b"[1, 2]", b"", "not a JSON object"),
    "utf16": ("{}".encode("utf-16"), b"", "not a JSON object"),
    "deep": (b'{"a":' + b"[" * 200_000, b"", "nested more than"),
    "twice_the_same_key": (b'{"a":' + ONE + b',"a":' + ONE + b"}", b"\0" * 8, "more than once"),
    "twice_a_field": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"\0" * 8,
        "more than",
    ),
    "metadata_numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata_list": ({"__metadata__": []}, b"", "__metadata__"),
    "entry_is_a_number": ({"a": 3}, b"", "must have dtype"),
    "entry_lacks_a_field": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "must have dtype"),
    "entry_with_another_field": ({"a": entry() | {"x": 1}}, b"\0" * 8, "nothing else"),
    "dtype_unknown": ({"a": entry("F33")}, b"\0" * 8, "dtype 'F33'"),
    "dtype_is_a_list": ({"a": entry(["F32"])}, b"\0" * 8, "dtype"),
    **{
        f"dtype_{code}": ({"a": entry(code)}, b"\0" * 8, "wanted one of F64")
        for code in ("I8", "I64", "BOOL", "F8_E4M3", "C64", "U8")
    },
    "shape_negative": ({"a": entry(shape=(-1, -2))}, b"\0" * 8, "shape"),
    "shape_true": ({"a": entry(shape=(True, 2))}, b"\0" * 8, "shape"),
    "shape_fraction": ({"a": entry(shape=(2.0,))}, b"\0" * 8, "shape"),
    "shape_text": ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, b"\0" * 8, "shape"),
    "shape_too_long": ({"a": entry(shape=(1,) * 17, offsets=(0, 4))}, b"\0" * 4, "at most 16"),
    "shape_overflows": ({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8, "takes"),
    "shape_beyond_64_bits": ({"a": entry(shape=(10**40,))}, b"\0" * 8, "64 bits"),
    "huge_rank": ({"a": entry(shape=(10**9, 4096), offsets=(0, 8))}, b"\0" * 8, "takes"),
    "size_differs": ({"a": entry(shape=(3,))}, b"\0" * 8, "takes 12 bytes"),
    "offsets_reversed": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "takes"),
    "offsets_negative": ({"a": entry(offsets=(-8, 0))}, b"\0" * 8, "data_offsets"),
    "offsets_three": ({"a": entry(offsets=(0, 8, 8))}, b"\0" * 8, "data_offsets"),
    "gap_at_start": ({"a": entry(offsets=(8, 16))}, b"\0" * 16, "gap"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, "gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "overlap"),
    "same_place": ({"a": entry(), "b": entry()}, b"\0" * 8, "overlap"),
    "data_cut_off": ({"a": entry()}, b"\0" * 7, "cut off"),
    "data_missing": ({"a": entry()}, b"", "cut off|8 and the file"),
    "data_too_long": ({"a": entry()}, b"\0" * 9, "no tensor"),
    "beyond_the_file": ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"\0" * 8, "cut off"),
}

FILES = {
    "empty": (b"", "0 bytes, empty"),
    "seven_bytes": (b"\2\0\0\0\0\0\0", "7 bytes"),
    "length_only": (b"\2\0\0\0\0\0\0\0", "cut off"),
    "length_zero": (b"\0" * 64, "claims 0 bytes"),
    "length_beyond": (b"\xff\0\0\0\0\0\0\0{}", "cut off"),
    "length_huge": (b"\xff" * 16, "at most 33,554,432"),
    "lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git-lfs pointer",
    ),
    "html": (b"<!doctype html><html></html>", "header"),
    "zip": (b"PK\3\4" + b"\0" * 60, "header"),
}


def expect(folder, says, error=AdapterFormatError, **options):
    with pytest.raises(AdapterError, match=says) as caught:
        open_adapter(folder, **options)
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("case", HEADERS)
def test_headers(saved, raw, case):
    header, data, says = HEADERS[case]
    (saved / WEIGHTS).write_bytes(raw(header, data))
    expect(saved, says)


@pytest.mark.parametrize("case", FILES)
def test_files(saved, case):
    data, says = FILES[case]
    (saved / WEIGHTS).write_bytes(data)
    expect(saved, says)


def test_cut_anywhere(saved):
    whole = (saved / WEIGHTS).read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (saved / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError):
            open_adapter(saved)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "holds a list"),
        (b'{"r": 1, "r": 2}', "more than once"),
        (b'{"r": NaN}', "NaN"),
        (b"[" * 100_000, "nested"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b" " * (1 << 20) + b"{}", "at most 1,048,576"),
    ],
)
@pytest.mark.parametrize("read", [open_adapter, read_config_dict])
def test_configs(saved, data, says, read):
    (saved / CONFIG).write_bytes(data)
    with pytest.raises(AdapterFormatError, match=says) as caught:
        read(saved)
    assert CONFIG in str(caught.value)


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def million_tensors(path):
    one = b',"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    with path.open("wb") as file:
        length = 2 - 1 + 1_000_000 * len(one % 0)
        file.write(length.to_bytes(8, "little") + b"{")
        for block in range(0, 1_000_000, 10_000):
            file.write(b"".join(one % index for index in range(block, block + 10_000)))
        file.write(b"}")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        (WEIGHTS, million_tensors),
        (WEIGHTS, lambda path: sparse(path, 1 << 40)),
        (CONFIG, lambda path: sparse(path, 300_000_000)),
        (CONFIG, lambda path: path.write_bytes(b"[" * (1 << 20))),
        (WEIGHTS, lambda path: path.write_bytes((1 << 24).to_bytes(8, "little") + b'{"a":' + b"[" * 100)),
    ],
    ids=["million_tensors", "sparse_1TB", "config_300MB", "config_deep", "header_longer_than_file"],
)
def test_rejections_are_cheap(saved, name, build):
    build(saved / name)
    tracemalloc.start()
    with pytest.raises(AdapterFormatError):
        open_adapter(saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_too_many_tensors_in_a_short_header(saved, raw):
    body = b",".join(b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_001))
    (saved / WEIGHTS).write_bytes(raw(b"{" + body + b"}"))
    expect(saved, "more than 200,000 tensors")


def test_a_message_lists_ten_problems_at_most(saved, raw):
    (saved / WEIGHTS).write_bytes(raw({f"t{i}": 3 for i in range(500)}))
    expect(saved, r"(\n  - 't\d': .*){10}\n  - and maybe more\n")


# kinds of files


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file|cannot be opened|cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "outside"),
        (lambda path: path.symlink_to("/etc/passwd"), "outside"),
        (lambda path: path.symlink_to("../elsewhere"), "outside"),
        (lambda path: path.symlink_to(path.name), "cannot be opened"),
    ],
    ids=["fifo", "folder", "device", "absolute_link", "relative_link", "ring"],
)
def test_only_regular_files_inside(saved, name, make, says):
    (saved.parent / "elsewhere").write_bytes((saved / name).read_bytes())
    (saved / name).unlink()
    make(saved / name)
    expect(saved, says)


@pytest.mark.parametrize("depth", ["", "sub/"])
def test_links_of_the_hub_cache_and_inside_the_folder(tmp_path, saved, tensors, depth):
    repo = tmp_path / "models--u--n"
    snapshot = repo / "snapshots" / "abc" / depth
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in (WEIGHTS, CONFIG):
        (repo / "blobs" / name[8:]).write_bytes((saved / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(repo / "blobs" / name[8:], snapshot))
        (saved / name).rename(saved / f"real-{name}")
        (saved / name).symlink_to(f"real-{name}")
    for folder in (snapshot, saved):
        loaded = open_adapter(folder).load()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_a_link_to_another_repositorys_blobs_is_refused(tmp_path, saved):
    for repo in ("models--u--n", "models--other--n"):
        (tmp_path / repo / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "models--u--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (saved / WEIGHTS).rename(tmp_path / "models--other--n" / "blobs" / "x")
    (snapshot / WEIGHTS).symlink_to("../../../models--other--n/blobs/x")
    expect(snapshot, "outside")


@pytest.mark.parametrize("missing", ["folder", "weights", "a file instead"])
def test_not_found(saved, missing):
    folder = saved / "nowhere"
    if missing == "weights":
        (saved / WEIGHTS).unlink()
        folder = saved
    if missing == "a file instead":
        folder = saved / CONFIG
    expect(folder, "no such folder|no adapter_model|not a folder", AdapterNotFoundError)


# contents


def test_every_flipped_bit_of_the_data_is_noticed(saved):
    whole = bytearray((saved / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 3):
        flipped = whole.copy()
        flipped[place] ^= 1 << (place % 8)
        (saved / WEIGHTS).write_bytes(flipped)
        with pytest.raises(AdapterFormatError, match="damaged or changed after it was saved"):
            open_adapter(saved).load()


def test_non_finite_numbers_are_counted(saved, raw):
    data = torch.tensor([float("nan"), 1.0, float("inf"), float("-inf")])
    (saved / WEIGHTS).write_bytes(raw({"a": entry(shape=(4,), offsets=(0, 16))}, data.numpy().tobytes()))
    adapter = open_adapter(saved)
    with pytest.raises(NonFiniteError, match="a: 1 NaN and 2 infinite of 4"):
        adapter.load()
    assert torch.equal(adapter.load(check_finite=False)["a"], data) is False  # NaN differs from itself


def test_a_file_replaced_after_it_was_opened(saved, config, make_tensors):
    from lorakit.checkpoint.writing import write_adapter

    adapter = open_adapter(saved)
    write_adapter(saved, config, make_tensors(1))
    with pytest.raises(AdapterFormatError, match="changed since it was opened"):
        adapter.load()


# pickles


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def zipped(path, value):
    torch.save(value, path)


def legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def bare(path, value):
    path.write_bytes(pickle.dumps(value))


def as_pickle(saved, build, value):
    (saved / WEIGHTS).unlink()
    build(saved / "adapter_model.bin", value)


def test_pickle_is_refused_by_default(saved, tensors):
    as_pickle(saved, zipped, tensors)
    expect(saved, "allow_pickle_bin=True")


@pytest.mark.parametrize("build", [zipped, legacy])
def test_a_plain_pickle_is_read_if_allowed(saved, tensors, build):
    as_pickle(saved, build, tensors)
    adapter = open_adapter(saved, allow_pickle_bin=True)
    assert {key: info.shape for key, info in adapter.tensors.items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }
    loaded = adapter.load()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("build", [zipped, legacy, bare])
@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize(
    "value",
    [{"a": Evil()}, [torch.zeros(1)], {"a": 3}, {3: torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.int8)}],
    ids=["code", "list", "number", "key", "int8"],
)
def test_other_pickles_are_refused_and_run_nothing(saved, monkeypatch, build, force, value):
    monkeypatch.chdir(saved)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    as_pickle(saved, build, value)
    expect(saved, "adapter_model.bin", allow_pickle_bin=True)
    with pytest.raises(AdapterFormatError) as caught:
        open_adapter(saved, allow_pickle_bin=True)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not (saved / "pwned").exists()


def test_a_pickle_whose_tensors_claim_more_than_the_file(saved):
    as_pickle(saved, zipped, {"a": torch.zeros(1).expand(10**12)})
    expect(saved, "claim more bytes", allow_pickle_bin=True)


def test_cut_pickles(saved, tensors):
    as_pickle(saved, zipped, tensors)
    whole = (saved / "adapter_model.bin").read_bytes()
    for length in range(0, len(whole), 97):
        (saved / "adapter_model.bin").write_bytes(whole[:length])
        expect(saved, "not a pickled dict", allow_pickle_bin=True)
    with zipfile.ZipFile(saved / "adapter_model.bin", "w") as file:
        file.writestr("x", "y")
    expect(saved, "not a pickled dict", allow_pickle_bin=True)
