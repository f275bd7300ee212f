"""Mutated headers and configs: an `AdapterError`, or the same adapter; nothing else."""

from __future__ import annotations

import json
import os
import random
import warnings

import pytest
import torch

from lorakit.checkpoint.header import parse_header
from lorakit.checkpoint.reading import open_adapter
from lorakit.checkpoint.writing import write_adapter
from lorakit.config import strict_json
from lorakit.errors import AdapterError

NIGHTLY = os.environ.get("LORAKIT_NIGHTLY") == "1"
MUTATIONS = 2_000_000 if NIGHTLY else 20_000
LOADS = 50_000 if NIGHTLY else 1_500
VALUES = [
    None, True, False, 0, -1, 1, 8, 2**31, 2**53, 2**63, -(2**63), 10**30, 1.5, 1e308, "", "F32", "BF16", "F16", "I8",
    "\ud800", "x" * 300, [], {}, [0], [0, 0], [[0]], [2**62, 2**62], {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
]  # fmt: skip
SNIPPETS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"NaN",
    b"Infinity",
    b"1e999",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"-",
]
SNIPPETS += [b"9" * 25, b"[" * 2000, b'"r":1,', b"\xef\xbb\xbf", b"\xff\xfe"]


def nodes(value, found):
    if isinstance(value, dict):
        for key, inner in value.items():
            found.append((value, key))
            nodes(inner, found)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found.append((value, index))
            nodes(inner, found)
    return found


def mutate_tree(raw, chance):
    """Change one or two places of the parsed JSON: a value, a number, a key, a copy, a removal, a swap."""
    value = json.loads(raw)
    for _ in range(chance.choice((1, 1, 2))):
        places = nodes(value, [])
        if not places:
            break
        parent, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind == 0:
            parent[key] = json.loads(json.dumps(chance.choice(VALUES)))
        elif kind == 1 and type(parent[key]) is int:
            parent[key] += chance.choice((-8, -1, 1, 8, 2**32))
        elif kind == 2 and isinstance(parent, dict):
            parent[chance.choice(("r", "dtype", "x", str(key) + "x", "__metadata__"))] = parent.pop(key)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other, name = chance.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                parent[key] = json.loads(json.dumps(other[name]))
        else:
            other, name = chance.choice(places)
            if type(parent) is type(other) is dict and name in other:
                parent[key], other[name] = json.loads(json.dumps([other[name], parent[key]]))
    return json.dumps(value).encode()


def mutate_bytes(raw, chance):
    data = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 3))):
        place = chance.randrange(len(data) or 1)
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place:place] = chance.choice(SNIPPETS)
        elif kind == 2:
            del data[place : place + chance.choice((1, 2, 8, 40))]
        elif kind == 3:
            end = place + chance.choice((1, 10, 60))
            data[place:place] = data[place:end]
        else:
            del data[place:]
    return bytes(data)


def mutate(raw, chance):
    return (mutate_tree if chance.random() < 0.5 else mutate_bytes)(raw, chance)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    tensors = {
        "base_model.model.q.lora_A.weight": torch.randn(2, 3),
        "base_model.model.q.lora_B.weight": torch.randn(3, 2),
        "base_model.model.v.lora_A.weight": torch.randn(2, 3, dtype=torch.bfloat16),
        "base_model.model.v.lora_B.weight": torch.zeros(0, dtype=torch.float16),
    }
    write_adapter(
        folder, {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "x": {"a": [1, 2.5]}}, tensors
    )
    whole = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return folder, tensors, whole[8 : 8 + length], whole[8 + length :]


def reader(data):
    places = [0]

    def read(count):
        part = data[places[0] : places[0] + count]
        places[0] += count
        return part

    return read


def refused(call):
    """What an AdapterError says, or None; every other exception passes."""
    caught = None
    try:
        call()
    except AdapterError as error:
        caught = error
    assert type(caught) is not AdapterError
    return None if caught is None else str(caught).encode().decode()


def test_headers(adapter):
    _, _, header, data = adapter
    chance = random.Random(1)
    accepted = 0
    for _ in range(MUTATIONS):
        raw = mutate(header, chance)
        length = len(raw) if chance.random() < 0.95 else chance.choice((0, 1, len(raw) + 9, 2**63, 2**25))
        whole = length.to_bytes(8, "little") + raw + data
        says = refused(lambda whole=whole: check_header(whole, len(data)))
        assert says is None or says.startswith("FILE")
        accepted += says is None
    assert 0 < accepted < MUTATIONS / 2


def check_header(whole, size):
    found = parse_header(reader(whole), len(whole), "FILE")
    assert sum(info.nbytes for info in found.tensors.values()) <= len(whole)
    assert all(isinstance(text, str) for text in found.metadata.values())


def test_configs(adapter):
    folder = adapter[0]
    raw = (folder / "adapter_config.json").read_bytes()
    chance = random.Random(2)
    accepted = 0
    for _ in range(MUTATIONS):
        data = mutate(raw, chance)
        says = refused(lambda data=data: strict_json.dumps(strict_json.loads(data, where="FILE")))
        assert says is None or says.startswith("FILE")
        accepted += says is None
    assert 0 < accepted < MUTATIONS


def test_whole_loads(adapter):
    """With a digest, a changed file is refused or its tensors are the very same."""
    folder, tensors, header, data = adapter
    chance = random.Random(3)
    path = folder / "adapter_model.safetensors"
    loaded = 0
    for _ in range(LOADS):
        raw, values = header, data
        if chance.random() < 0.8:
            raw = mutate(header, chance)
        else:
            values = mutate_bytes(data, chance)
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + values)
        found = []

        def load(found=found):
            found.append(open_adapter(folder))
            found.append(found[0].load())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            says = refused(load)
        assert says is None or str(folder) in says
        if says is None and "lorakit.digest" in found[0].metadata:
            assert found[0].config["r"] == 2
            assert found[1].keys() == tensors.keys()
            assert all(torch.equal(found[1][key], tensors[key]) for key in tensors)
            loaded += 1
    assert loaded > 0
