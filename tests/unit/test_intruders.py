"""`reduce_intruder_dimension`: against its definition in fp64, on every kind of layer; copies, refusals, all or nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import lorakit
from lorakit import (
    LoraConfig,
    get_peft_model,
    prepare_model_for_compiled_hotswap,
    reduce_intruder_dimension,
)
from lorakit.errors import AdapterNameError, AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from models import Snapshot, another, ids, logits, randomise, registry_of, tiny, tiny_llama, with_adapter
from quantised import KINDS, Pair, pieces
from zoo import adapted_zoo

F64 = torch.float64
QUIET = {"logging_sink": None, "show_progress": False}
REDUCED = "intruder_reduced"
pytestmark = pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning")


def by_definition(W, delta, rank, *, top_k=10, threshold=0.5, factor=0.75):
    """The new change of one matrix, its best approximation of a rank, and how many intruders there are."""
    base = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + delta, full_matrices=False)
    cosines = (U[:, :top_k].mT @ base).abs().amax(dim=1)
    alien = (cosines < threshold).nonzero().flatten()
    wanted = delta - (1 - factor) * (U[:, alien] * S[alien]) @ Vh[alien]
    u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], len(alien)


def change(layer, name):
    """(blocks, out, in) in fp64."""
    return torch.stack([block.delta(F64) for block in layer.blocks(name)])


def loud(model, scale=1.0, **names):
    randomise(model, scale=scale, **names)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"threshold": 0.9}, {"factor": 0.0}, {"threshold": 1.0, "factor": 0.3}],
    ids=str,
)
def test_the_definition_on_every_kind_of_layer(options):
    model = adapted_zoo(
        target_modules=["embed", "image", "line", "turned", "attention"],
        rank_pattern={"line": 2},
        use_rslora=True,
    )
    loud(model)
    names = {"top_k": "top_k", "threshold": "threshold_epsilon", "factor": "mitigation_lambda"}
    before = {path: change(layer, "default") for path, layer in registry_of(model).layers.items()}
    report = reduce_intruder_dimension(
        model, **{names[key]: value for key, value in options.items()}, **QUIET
    )
    kinds = set()
    for path, layer in registry_of(model).layers.items():
        weight = layer.read_weight(F64).view(layer.layout.blocks, *layer.layout.block_shape)
        pairs = [
            by_definition(W, delta, layer.r["default"], **options)
            for W, delta in zip(weight, before[path], strict=True)
        ]
        torch.testing.assert_close(
            change(layer, REDUCED), torch.stack([new for new, _ in pairs]), rtol=1e-8, atol=1e-9
        )
        assert report.intruders[path] == sum(count for _, count in pairs)
        assert (path in report.kept) == bool(report.intruders[path])
        torch.testing.assert_close(change(layer, "default"), before[path])
        kinds.add(type(layer).__name__)
    assert kinds == {"Linear", "Embedding", "Conv", "ParamWrapper"}
    assert sum(report.intruders.values())
    assert registry_of(model).active == (REDUCED,)


def decaying(rows, columns, dtype=torch.float32):
    """A linear layer whose singular values fall like those of trained ones."""
    layer = nn.Linear(columns, rows, bias=False)
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    layer.weight = nn.Parameter(((U * torch.arange(1, min(rows, columns) + 1) ** -0.7) @ Vh).to(dtype))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loudness", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("shape", [(500, 480), (480, 560)], ids=str)
def test_large_weights_agree_with_the_full_decompositions(shape, loudness, dtype, monkeypatch):
    """Also where the leading vectors of the base answer for all; then no full SVD of it is made."""
    model = get_peft_model(
        nn.Sequential(decaying(*shape, dtype)), LoraConfig(r=4, lora_alpha=4, target_modules=["0"])
    )
    loud(model, loudness)
    layer = registry_of(model).layers["0"]
    full, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda W, **kw: full.append(tuple(W.shape)) or svd(W, **kw))
    report = reduce_intruder_dimension(model, **QUIET)
    monkeypatch.undo()
    old = change(layer, "default")[0]
    wanted, count = by_definition(layer.read_weight(F64), old, 4)
    assert report.intruders == {"0": count}
    assert bool(count) == (loudness == 0.3)
    assert full.count(shape) == bool(count)
    error = torch.linalg.norm(change(layer, REDUCED)[0] - wanted)
    assert error <= 2e-5 * torch.linalg.norm(old)
    if loudness:
        assert report.kept.get("0", 1.0) == 1.0 or 0.5 < report.kept["0"] < 1.0


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in {"nf4", "int8", "torchao-int4", "hqq-4"}], ids=str
)
def test_quantised_bases(kind):
    """What the base multiplies by counts, not what it was quantised from."""
    model = loud(get_peft_model(Pair(kind), LoraConfig(r=4, target_modules=["up", "down"])))
    layers = registry_of(model).layers
    held = {path: pieces(layer.get_base_layer()) for path, layer in layers.items()}
    report = reduce_intruder_dimension(model, **QUIET)
    assert list(report.intruders) == ["up", "down"]
    assert min(report.intruders.values()) > 0
    for path, layer in layers.items():
        wanted, count = by_definition(layer.read_weight(F64), change(layer, "default")[0], 4)
        assert report.intruders[path] == count
        torch.testing.assert_close(change(layer, REDUCED)[0], wanted, rtol=1e-4, atol=1e-4)
        assert pieces(layer.get_base_layer()) == held[path]


def test_nothing_alien_is_copied_to_the_bit():
    model = loud(with_adapter(tiny(), lora_bias=True), 1e-4)
    report = reduce_intruder_dimension(model, top_k=1, threshold_epsilon=0.1, **QUIET)
    assert set(report.intruders.values()) == {0}
    assert not report.kept
    old, new = (
        {item.file_name: item.tensor for item in registry_of(model).tensors(name)}
        for name in ("default", REDUCED)
    )
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert torch.equal(tensor, new[key]), key
        assert tensor.data_ptr() != new[key].data_ptr()


def test_whole_modules_biases_and_token_rows_are_copied():
    model = with_adapter(
        tiny(),
        target_modules=["q_proj"],
        modules_to_save=["head"],
        bias="lora_only",
        trainable_token_indices={"embed": [2, 5]},
    )
    report = reduce_intruder_dimension(model, mitigation_lambda=1.0, threshold_epsilon=1.0, **QUIET)
    assert sum(report.intruders.values()) > 10
    reduced = logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(reduced, logits(model))  # with a factor of 1 it is the same adapter


def test_a_scaling_that_was_changed_is_folded_in():
    model = with_adapter(tiny(), lora_bias=True)
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 0.5)
    wanted = logits(model)
    reduce_intruder_dimension(model, mitigation_lambda=1.0, **QUIET)
    torch.testing.assert_close(logits(model), wanted)
    assert {layer.scaling[REDUCED] for layer in registry_of(model).layers.values()} == {2.0}


def test_dtypes_and_ranks_of_the_old_adapter():
    base = tiny(dtype=torch.bfloat16)
    model = get_peft_model(
        base,
        LoraConfig(r=4, target_modules=["q_proj", "down"], rank_pattern={"down": 2}),
        autocast_adapter_dtype=False,
    )
    model.add_adapter("wide", LoraConfig(r=3, target_modules=["q_proj"]))
    for name, dtype, ranks in (("default", torch.bfloat16, {4, 2}), ("wide", torch.float32, {3})):
        loud(model, name=name)
        reduce_intruder_dimension(model, name, f"{name}_reduced", **QUIET)
        stored = [item.tensor for item in registry_of(model).tensors(f"{name}_reduced")]
        assert {tensor.dtype for tensor in stored} == {dtype}
        layers = registry_of(model).layers.values()
        assert {layer.r[f"{name}_reduced"] for layer in layers if f"{name}_reduced" in layer.r} == ranks


def test_padded_ranks_are_no_part_of_it():
    model = loud(with_adapter(tiny()))
    wanted = {
        path: by_definition(layer.read_weight(F64), change(layer, "default")[0], 4)[0]
        for path, layer in registry_of(model).layers.items()
    }
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    reduce_intruder_dimension(model, **QUIET)
    for path, layer in registry_of(model).layers.items():
        assert layer.stored(REDUCED).A.shape[0] == 4
        torch.testing.assert_close(change(layer, REDUCED)[0], wanted[path], rtol=1e-4, atol=1e-5)


def test_tied_layers_follow():
    model = with_adapter(
        tiny_llama(tie=True), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    report = reduce_intruder_dimension(loud(model), **QUIET)
    assert list(report.intruders) == ["model.embed_tokens"]
    embedding, head = registry_of(model).layers["model.embed_tokens"], registry_of(model).layers["lm_head"]
    torch.testing.assert_close(change(head, REDUCED)[0], change(embedding, REDUCED)[0].mT)


def test_the_result_is_an_adapter_like_any_other(tmp_path):
    """Trainable, saved, loaded, deleted."""
    model = loud(with_adapter(tiny()))
    reduce_intruder_dimension(model, **QUIET)
    wanted = logits(model)
    assert all(item.tensor.requires_grad for item in registry_of(model).tensors(REDUCED))
    model.save_pretrained(tmp_path, selected_adapters=[REDUCED])
    loaded = lorakit.PeftModel.from_pretrained(tiny(), tmp_path / REDUCED)
    torch.testing.assert_close(logits(loaded), wanted)
    model.set_adapter("default")
    model.delete_adapter(REDUCED)
    model(ids()).sum().backward()


def test_what_it_says(capsys):
    model = loud(with_adapter(tiny(), target_modules=["q_proj"]))
    lines = []
    report = reduce_intruder_dimension(model, logging_sink=lines.append)
    assert lines == [
        *(
            f"{path}: {count} intruders" if count else f"{path}: no intruders"
            for path, count in report.intruders.items()
        ),
        f"enabling {REDUCED}",
    ]
    assert "reducing intruder dimensions: 100%" in capsys.readouterr().err
    reduce_intruder_dimension(model, "default", "again", show_progress=False)
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == "enabling again"
    assert not output.err


REFUSED = [
    ({"top_k": 0}, ConfigError, "top_k: got 0"),
    ({"top_k": 2.0}, ConfigError, "top_k: got 2.0"),
    ({"threshold_epsilon": 1.5}, ConfigError, "threshold_epsilon: got 1.5"),
    ({"threshold_epsilon": float("nan")}, ConfigError, "threshold_epsilon: got nan"),
    ({"mitigation_lambda": -0.1}, ConfigError, "mitigation_lambda: got -0.1"),
    ({"mitigation_lambda": "all"}, ConfigError, "mitigation_lambda: got 'all'"),
    ({"old_adapter_name": "nobody"}, AdapterNameError, "no adapter named"),
    ({"new_adapter_name": "default"}, AdapterNameError, "exists already"),
    ({"new_adapter_name": "a.b"}, AdapterNameError, "a.b"),
    ({"logging_sink": lambda _: 1 / 0}, ZeroDivisionError, "division"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refusals(changes, kind, message):
    model = loud(with_adapter(tiny()))
    another(model, "other")
    before = Snapshot(model)
    with pytest.raises(kind, match=message):
        reduce_intruder_dimension(model, **{**QUIET, **changes})
    before.assert_same(model)


def test_refuses_merged_adapters_and_models_without_any():
    model = with_adapter(tiny())
    model.merge_adapter()
    before = Snapshot(model)
    with pytest.raises(AdapterStateError, match=r"unmerge_adapter\(\) before reducing"):
        reduce_intruder_dimension(model, **QUIET)
    before.assert_same(model)
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        reduce_intruder_dimension(tiny(), **QUIET)


def test_grouped_convolutions_are_named_all_at_once():
    model = adapted_zoo()
    before = Snapshot(model)
    with pytest.raises(
        UnsupportedError, match=r"(?s)wave: a grouped convolution.*volume: a grouped convolution"
    ):
        reduce_intruder_dimension(model, **QUIET)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "also takes something off the base"),
        ({"alora_invocation_tokens": [3]}, "aLoRA is more than A and B"),
    ],
    ids=str,
)
def test_what_is_more_than_factors_is_named(changes, message):
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], **changes))
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match=rf"(?s)layers\.0\.q_proj: .*{message}.*layers\.1\.q_proj"):
        reduce_intruder_dimension(model, **QUIET)
    before.assert_same(model)


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_what_is_not_finite_is_named(part):
    model = with_adapter(tiny())
    layer = registry_of(model).layers["layers.1.q_proj"]
    with torch.no_grad():
        (layer.original_weight if part == "base" else layer.stored("default").B)[0, 0] = float("nan")
    before = Snapshot(model)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.q_proj: .*NaN"):
        reduce_intruder_dimension(model, **QUIET)
    before.assert_same(model)


def test_a_failure_while_it_is_put_on_leaves_nothing(monkeypatch):
    model = loud(with_adapter(tiny()))
    before = Snapshot(model)

    # the package's name for it is the function
    monkeypatch.setattr(sys.modules["lorakit.surgery.attach"], "_add_whole", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reduce_intruder_dimension(model, **QUIET)
    before.assert_same(model)
