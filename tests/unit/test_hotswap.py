"""Another adapter in the place of a loaded one: as if it had been loaded afresh, in the same parameters, or not at all."""

from __future__ import annotations

import cProfile
import json
import sys
from dataclasses import fields
from functools import partial
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit import (
    PeftModel,
    get_peft_model_state_dict,
    hotswap_adapter,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    set_peft_model_state_dict,
)
from lorakit.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    KeyMismatchError,
    NonFiniteError,
    PlanError,
)
from models import another, bits, config, ids, logits, randomise, registry_of, tiny, tiny_llama, with_adapter
from zoo import KINDS, Picture, adapted_zoo, zoo, zoo_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*targeted convolutions are grouped:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.script_method.*:DeprecationWarning"
    ),  # inductor, of torch itself
]

FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTERS = {
    "same": {},
    "small": {"r": 2, "lora_alpha": 9},
    "large": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterned": {
        "rank_pattern": {"line": 2, "experts.weights": 6, "attention": 5},
        "alpha_pattern": {"image": 3.5},
    },
    "few": {"r": 2, "target_modules": ["line", "wave"], "target_parameters": None},
}
LARGEST = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each of the adapters as files, each with other numbers."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, changes) in enumerate(ADAPTERS.items(), 20):
        adapted_zoo(seed=seed, **changes).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def fresh(folders):
    """What a fresh load of each gives: the model."""
    return {name: PeftModel.from_pretrained(zoo(), folders / name) for name in ADAPTERS}


def identities(model):
    return {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}


def assert_near(found, wanted):
    """Equal up to the order of a sum."""
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-6}[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def assert_is(model, wanted, name="default"):
    """The model computes what a freshly loaded one does, and says of itself what that one does."""
    assert_near(logits(model), logits(wanted))
    registry, other = registry_of(model), registry_of(wanted)
    mine, theirs = registry.configs[name].to_dict(), other.configs[name].to_dict()
    of_the_run = {"inference_mode": None, "auto_mapping": None}
    assert {**mine, **of_the_run} == {**theirs, **of_the_run}
    for path, layer in other.layers.items():
        mine = registry.layers[path]
        for attribute in ("r", "lora_alpha", "use_rslora", "lora_bias", "scaling"):
            values = getattr(layer, attribute)
            assert getattr(mine, attribute).get(name) == values.get(name), f"{path}.{attribute}"


# ---- what a swap gives --------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_swap_is_as_a_fresh_load(folders, fresh, tmp_path, name, ready):
    model = adapted_zoo(seed=9)
    if ready:
        prepare_model_for_compiled_hotswap(model, target_rank=LARGEST)
    before = identities(model)
    hotswap_adapter(model, folders / name, "default")
    assert_is(model, fresh[name])
    assert identities(model) == before
    model.save_pretrained(tmp_path)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (folders / name / file).read_bytes()
    Picture(model)  # the modules' sizes are those of their weights


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
def test_one_swap_after_another(folders, fresh, tmp_path, ready):
    model = adapted_zoo(seed=9)
    if ready:
        prepare_model_for_compiled_hotswap(model, target_rank=LARGEST)
    order = ["small", "few", "patterned", "large", "few", "few", "same", "small"]
    for number, name in enumerate(order):
        hotswap_adapter(model, folders / name, "default")
        assert_is(model, fresh[name])
        model.save_pretrained(tmp_path / str(number))
        assert_is(PeftModel.from_pretrained(zoo(), tmp_path / str(number)), fresh[name])


def test_the_zoo_tells_adapters_apart(fresh):
    outputs = [logits(model) for model in fresh.values()] + [logits(zoo())]
    for number, one in enumerate(outputs):
        assert all((one - other).abs().max() > 0.05 for other in outputs[number + 1 :])


def test_every_layer_counts(fresh):
    """Taking any one layer's adapter away shows, so no layer can be left out of a swap unseen."""
    model, output = fresh["same"], logits(fresh["same"])
    for path, layer in registry_of(model).layers.items():
        layer.set_scale("default", 0)
        assert (logits(model) - output).abs().max() > 1e-3, path
        layer.set_scale("default", 1)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_the_model_stay(folders, dtype):
    model = get_model(zoo(dtype=dtype), autocast=False)
    hotswap_adapter(model, folders / "small", "default")
    wanted = PeftModel.from_pretrained(zoo(dtype=dtype), folders / "small", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits(model), logits(wanted), rtol=tolerance, atol=tolerance)


def get_model(base, *, autocast=True):
    model = lorakit.get_peft_model(base, zoo_config(), autocast_adapter_dtype=autocast)
    randomise(model, seed=9)
    return model


def test_other_adapters_and_the_state_of_the_model_stay(folders, fresh):
    model = adapted_zoo(seed=9)
    model.add_adapter("other", zoo_config(r=2))
    randomise(model, "other", seed=5)
    model.set_adapter(["default", "other"])
    before = Picture(model)
    hotswap_adapter(model, folders / "small", "default")
    changed = before.differences(Picture(model))
    assert changed
    foreign = [key for key in changed if ".other" in key or key.endswith(" other")]
    assert not foreign
    assert model.active_adapters == ["default", "other"]
    hotswap_adapter(model, folders / "patterned", "other")
    model.set_adapter("default")
    assert_is(model, fresh["small"])
    model.set_adapter("other")
    assert_near(logits(model), logits(fresh["patterned"]))


def test_a_disabled_adapter_is_swapped(folders, fresh):
    model = adapted_zoo(seed=9)
    with model.disable_adapter():
        hotswap_adapter(model, folders / "large", "default")
        assert torch.equal(logits(model), logits(zoo()))
    assert_is(model, fresh["large"])


def test_scalings_that_were_changed_by_hand_are_the_new_ones(folders, fresh):
    model = adapted_zoo(seed=9)
    for layer in registry_of(model).layers.values():
        layer.set_scale("default", 0.3)
    hotswap_adapter(model, folders / "same", "default")
    assert_is(model, fresh["same"])


@pytest.mark.parametrize("kind", ["injected", "LoraModel", "compiled wrapper", "compiled in place"])
def test_models_of_every_kind(folders, fresh, kind):
    model = adapted_zoo(seed=9)
    taken = {
        "injected": model.get_base_model(),
        "LoraModel": model.base_model,
        "compiled wrapper": torch.compile(model, backend="eager"),
        "compiled in place": model,
    }[kind]
    if kind == "compiled in place":
        model.compile(backend="eager")
    hotswap_adapter(taken, str(folders / "small"), "default", torch_device="cpu")
    assert_is(model, fresh["small"])


def test_a_model_that_was_injected_into(folders, fresh):
    base = zoo()
    inject_adapter_in_model(zoo_config(), base)
    hotswap_adapter(base, folders / "patterned", "default")
    assert_near(logits(base), logits(fresh["patterned"]))


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode(folders, fresh, inside, ready):
    with torch.inference_mode(mode=not inside):
        model = PeftModel.from_pretrained(zoo(), folders / "same")
    with torch.inference_mode(mode=inside):
        prepare_model_for_compiled_hotswap(model, target_rank=LARGEST) if ready else None
    for name in ("small", "large", "few"):
        with torch.inference_mode(mode=inside):
            hotswap_adapter(model, folders / name, "default")
        with torch.inference_mode():
            assert_is(model, fresh[name])


@pytest.mark.parametrize("trains", [False, True])
def test_stacks_for_mixed_batches_hold_the_new_factors(tmp_path, trains):
    for r in (2, 4, 6):
        with_adapter(tiny(), seed=r, r=r, lora_alpha=3 + r).save_pretrained(tmp_path / str(r))
    model = with_adapter(tiny())
    another(model, "other")
    names = ["default", "other"]
    for r in (4, 2, 6, 4):
        with torch.set_grad_enabled(trains):
            before = model(ids(), adapter_names=names).detach()
            hotswap_adapter(model, tmp_path / str(r), "default")
            found = model(ids(), adapter_names=names).detach()
        assert (found[0] - before[0]).abs().max() > 1e-3
        assert_near(found[0], logits(PeftModel.from_pretrained(tiny(), tmp_path / str(r)))[0])
        assert_near(found[1], before[1])


def test_dropout_is_the_new_ones(tmp_path):
    for p in (0.0, 0.25, 0.5):
        with_adapter(tiny(), seed=8, lora_dropout=p).save_pretrained(tmp_path / str(p))
    for start in (0.0, 0.5):
        model = with_adapter(tiny(), lora_dropout=start).train()
        for p in (0.25, 0.0, 0.5, 0.0):
            hotswap_adapter(model, tmp_path / str(p), "default")
            layers = registry_of(model).layers.values()
            assert {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers} == {p}
            assert {layer.lora_dropout["default"].training for layer in layers} == {True}
            assert torch.equal(logits(model), logits(model)) == (p == 0.0)


# ---- training goes on ---------------------------------------------------------------------------------


def step(model, optimiser):
    model(ids()).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def test_the_optimiser_goes_on_and_padding_stays_zero(folders, tmp_path):
    model = adapted_zoo(seed=9, r=LARGEST)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    step(model, optimiser)
    hotswap_adapter(model, folders / "small", "default")
    before = logits(model)
    for _ in range(3):
        optimiser.state.clear()  # the moments of the former adapter would write into the zeros
        step(model, optimiser)
    assert (logits(model) - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILES[1])[f"{P}line.lora_A.weight"].shape == (2, 8)
    reloaded = PeftModel.from_pretrained(zoo(), tmp_path)
    assert_near(logits(reloaded), logits(model))


def test_numbers_in_the_padding_are_not_saved_in_silence(folders, tmp_path):
    model = adapted_zoo(seed=9)
    hotswap_adapter(model, folders / "small", "default")
    with torch.no_grad():
        registry_of(model).layers["line"].lora_A["default"].weight[3, 0] = 1
    for call in (lambda: model.save_pretrained(tmp_path), lambda: get_peft_model_state_dict(model)):
        with pytest.raises(AdapterStateError, match=r"line.lora_A.weight.*rank 2.*\(4, 8\)"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_layer_that_was_zero_all_along_is_saved(tmp_path):
    model = adapted_zoo(seed=9)
    with torch.no_grad():
        for item in registry_of(model).layers["line"].tensors("default"):
            item.tensor.zero_()
    model.save_pretrained(tmp_path)
    assert_is(PeftModel.from_pretrained(zoo(), tmp_path), model)


def test_a_layer_taken_off_and_trained_again_is_not_saved_in_silence(folders, tmp_path):
    """Its config does not target it, but it has an effect: the file says so, and a load refuses it by name."""
    model = adapted_zoo(seed=9, r=2)
    hotswap_adapter(model, folders / "few", "default")
    randomise(model, seed=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyMismatchError, match=r"unexpected: .*turned"):
        PeftModel.from_pretrained(zoo(), tmp_path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_state_dicts_are_of_the_adapters_own_rank(folders, fresh, name):
    model = adapted_zoo(seed=9, r=LARGEST)
    hotswap_adapter(model, folders / name, "default")
    mine, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(fresh[name])
    assert {key: bits(value) for key, value in mine.items()} == {
        key: bits(value) for key, value in wanted.items()
    }
    whole = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert {key: bits(value) for key, value in whole.items()} == {
        key: bits(value) for key, value in wanted.items()
    }
    doubled = {key: 2 * value for key, value in wanted.items()}
    assert set_peft_model_state_dict(model, doubled) == ([], [])
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, doubled[key]), key


# ---- refusals -----------------------------------------------------------------------------------------

P = "base_model.model."
LINE = P + "line."


def rewrite(folder, edit):
    path = folder / FILES[1]
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def reconfigure(folder, **changes):
    path = folder / FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put(key, *shape):
    return lambda tensors: tensors.update({key: torch.ones(*shape)})


def fill(key, value):
    return lambda tensors: tensors[key].fill_(value)


def nothing(_tensors):
    pass


class Fault(NamedTuple):
    error: type[Exception]
    words: str
    edit: object = nothing
    changes: dict | None = None
    loading: bool = True
    """Whether a fresh load refuses it too."""


FAULTS = {
    "missing": Fault(KeyMismatchError, "missing: .*line.lora_B", lambda t: t.pop(LINE + "lora_B.weight")),
    "layer missing": Fault(
        KeyMismatchError,
        "missing: .*wave.lora_A",
        lambda t: [t.pop(key) for key in list(t) if ".wave." in key],
    ),
    "all missing": Fault(KeyMismatchError, "missing", lambda t: [t.pop(key) for key in list(t)[1:]]),
    "unexpected": Fault(KeyMismatchError, "unexpected: .*head", put(P + "head.lora_A.weight", 4, 8)),
    "base norm": Fault(KeyMismatchError, "unexpected: .*norm.weight", put(P + "norm.weight", 8)),
    "base weight": Fault(KeyMismatchError, "unexpected: .*base_layer", put(LINE + "base_layer.weight", 8, 8)),
    "another adapter": Fault(
        KeyMismatchError, "unexpected: .*B.default", put(LINE + "lora_B.default.weight", 8, 4)
    ),
    "shape": Fault(KeyMismatchError, r"\(4, 9\), expected \(4, 8\)", put(LINE + "lora_A.weight", 4, 9)),
    "rank": Fault(KeyMismatchError, r"found \(4, 8\), expected \(6, 8\)", changes={"r": 6}),
    "huge rank": Fault(KeyMismatchError, "expected", changes={"r": 10**6}),
    "rank and groups": Fault(PlanError, "wave.*divisible by (the|its) 2 groups", changes={"r": 3}),
    "NaN": Fault(NonFiniteError, "line.lora_A", fill(LINE + "lora_A.weight", float("nan"))),
    "infinity": Fault(NonFiniteError, "experts.lora_B", fill(P + "experts.lora_B.weight", float("inf"))),
    "prefix": Fault(
        AdapterFormatError,
        "base_model.model.",
        lambda t: [t.update({"model." + key: t.pop(key)}) for key in list(t)],
    ),
    "alpha": Fault(ConfigError, "lora_alpha", changes={"lora_alpha": "16"}),
    "targets": Fault(AdapterError, "nope|unexpected", changes={"target_modules": ["nope"]}),
    "fewer targets": Fault(
        KeyMismatchError, "unexpected: .*wave", changes={"target_modules": [k for k in KINDS if k != "wave"]}
    ),
    "more targets": Fault(AdapterError, "head|attention", changes={"target_modules": [*KINDS, "head"]}),
    "dora": Fault(AdapterError, "use_dora", changes={"use_dora": True}, loading=False),
    "type": Fault(AdapterError, "IA3", changes={"peft_type": "IA3"}),
    "lora_bias": Fault(PlanError, "lora_bias", changes={"lora_bias": True}),
    "bias": Fault(AdapterError, "bias|missing", changes={"bias": "all"}),
    "whole module": Fault(PlanError, "modules_to_save", changes={"modules_to_save": ["head"]}, loading=False),
    "tokens": Fault(
        PlanError, "trainable_token_indices", changes={"trainable_token_indices": [1, 2]}, loading=False
    ),
    "replication": Fault(AdapterError, "layer_replication", changes={"layer_replication": [[0, 1]]}),
    "ties": Fault(PlanError, "ensure_weight_tying", changes={"ensure_weight_tying": True}, loading=False),
}


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of an adapter, without the digest that only an untouched file has."""
    tensors = load_file(folders / "same" / FILES[1])
    save_file(tensors, tmp_path / FILES[1])
    (tmp_path / FILES[0]).write_bytes((folders / "same" / FILES[0]).read_bytes())
    return tmp_path


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refused_swap_changes_nothing(damaged, fault, ready):
    error, words, edit, changes, loading = FAULTS[fault]
    rewrite(damaged, edit)
    reconfigure(damaged, **(changes or {}))
    model = adapted_zoo(seed=9)
    if ready:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    before, output = Picture(model), logits(model)
    with pytest.raises(error, match=f"(?s){words}"):
        hotswap_adapter(model, damaged, "default")
    before.assert_same(model)
    assert torch.equal(logits(model), output)
    if loading:
        with pytest.raises(AdapterError):
            PeftModel.from_pretrained(zoo(), damaged)


def test_a_swap_takes_what_a_load_takes(damaged, fresh):
    model = adapted_zoo(seed=9)
    hotswap_adapter(model, damaged, "default")
    assert_is(model, fresh["same"])


@pytest.mark.parametrize("changed", ["one bit", "cut", "empty", "no config", "no weights", "text"])
def test_damaged_files_change_nothing(folders, tmp_path, changed):
    for file in FILES:
        (tmp_path / file).write_bytes((folders / "same" / file).read_bytes())
    weights = tmp_path / FILES[1]
    data = weights.read_bytes()
    if changed == "no config":
        (tmp_path / FILES[0]).write_text("{")
    elif changed == "no weights":
        weights.unlink()
    else:
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        weights.write_bytes(
            {"one bit": flipped, "cut": data[:-8], "empty": b"", "text": b"version 1"}[changed]
        )
    model = adapted_zoo(seed=9)
    before = Picture(model)
    with pytest.raises((AdapterFormatError, AdapterNotFoundError)):
        hotswap_adapter(model, tmp_path, "default")
    before.assert_same(model)


def test_numbers_that_the_adapters_dtype_cannot_hold(damaged):
    rewrite(damaged, fill(LINE + "lora_A.weight", 1e30))
    model = get_model(zoo(dtype=torch.float16), autocast=False)
    before = Picture(model)
    with pytest.raises(NonFiniteError, match=r"line\.lora_A\.weight in torch\.float16"):
        hotswap_adapter(model, damaged, "default")
    before.assert_same(model)
    wide = adapted_zoo(seed=9)
    hotswap_adapter(wide, damaged, "default")  # their squares are infinite, they are not
    assert registry_of(wide).layers["line"].lora_A["default"].weight[0, 0] == 1e30


@pytest.mark.parametrize("name", ["nobody", "", "keys", "line", "a.b"])
def test_unknown_names(folders, name):
    model = adapted_zoo(seed=9)
    before = Picture(model)
    with pytest.raises(AdapterNameError, match="default"):
        hotswap_adapter(model, folders / "same", name)
    before.assert_same(model)
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        hotswap_adapter(zoo(), folders / "same", "default")


def test_merged_adapters_are_refused(folders):
    model = with_adapter(tiny())
    with_adapter(tiny(), seed=8).save_pretrained(folders / "tiny")
    model.merge_adapter()
    before = Picture(model)
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        hotswap_adapter(model, folders / "tiny", "default")
    before.assert_same(model)
    model.unmerge_adapter()
    hotswap_adapter(model, folders / "tiny", "default")
    model.merge_adapter()
    torch.testing.assert_close(
        logits(model), logits(PeftModel.from_pretrained(tiny(), folders / "tiny")), rtol=1e-5, atol=1e-6
    )


def test_arguments(folders, damaged, fresh):
    model = adapted_zoo(seed=9)
    before = Picture(model)
    with pytest.raises(TypeError, match=r"unknwon.*known are"):
        hotswap_adapter(model, folders / "same", "default", unknwon=1)
    with pytest.raises(TypeError, match="strict"):
        hotswap_adapter(model, folders / "same", "default", strict=False)
    before.assert_same(model)
    hotswap_adapter(model, folders, "default", subfolder="small")
    assert_is(model, fresh["small"])
    hotswap_adapter(model, folders / "same", "default", config=zoo_config(lora_alpha=16))
    assert registry_of(model).layers["line"].scaling["default"] == 4.0
    rewrite(damaged, lambda t: [t.update({key.replace(".line.", ".lime."): t.pop(key)}) for key in list(t)])
    with pytest.raises(KeyMismatchError, match="lime"):
        hotswap_adapter(model, damaged, "default")
    hotswap_adapter(model, damaged, "default", key_mapping={r"^lime\.": "line."})
    assert_is(model, fresh["same"])


def test_the_callers_config_is_never_changed(folders):
    mine = zoo_config()
    before = mine.to_dict()
    model = adapted_zoo(seed=9)
    hotswap_adapter(model, folders / "same", "default", config=mine)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert mine.to_dict() == before


def test_every_field_is_one_that_a_swap_follows_or_refuses():
    """A new field of the config is refused until somebody has decided what a swap does with it."""
    from lorakit.hotswap.newcomer import _MAY_DIFFER

    must_agree = {field.name for field in fields(lorakit.LoraConfig)} - _MAY_DIFFER
    assert must_agree == {
        *("lora_bias", "ensure_weight_tying", "layer_replication", "megatron_config"),
        *("use_dora", "velora_config", "alora_invocation_tokens", "use_qalora", "qalora_group_size"),
        *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    }


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_an_adapter_that_changed_the_base_stays(folders, scheme):
    model = adapted_zoo(seed=9)
    model.peft_config["default"].init_lora_weights = scheme
    before = Picture(model)
    with pytest.raises(PlanError, match="changed the base"):
        hotswap_adapter(model, folders / "same", "default")
    before.assert_same(model)


# ---- interrupts ---------------------------------------------------------------------------------------


class Interrupt(BaseException):
    """Stands for a KeyboardInterrupt that must not be mistaken for one of the user's."""


def interrupted_at(step, work):
    """Run `work` and raise at the n-th line that runs in the rooms of the swap; whether it came to that."""
    seen = 0
    rooms = ("/lorakit/hotswap/", "/lorakit/padding.py")

    def trace(frame, event, _argument):
        nonlocal seen
        if not any(room in frame.f_code.co_filename for room in rooms):
            return None
        if event == "line":
            seen += 1
            if seen == step:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def every_step(build, work, fresh_output):
    """Interrupt the work at step after step: each time the model is as before, or, at the very end, as after it."""
    model, step, done = build(), 1, 0
    before, output = Picture(model), logits(model)
    while interrupted_at(step, partial(work, model)):
        if before.differences(Picture(model)):  # the work is over, the function has not returned yet
            assert_near(logits(model), fresh_output)
            model, done = build(), done + 1
            before = Picture(model)
        else:
            assert not done
            assert torch.equal(logits(model), output)
        step += 1
    assert step > 50
    assert done <= 6


def small_pair(tmp_path, r):
    with_adapter(tiny(layers=1), seed=8, r=r, lora_dropout=0.1, use_rslora=True).save_pretrained(tmp_path)
    return logits(PeftModel.from_pretrained(tiny(layers=1), tmp_path))


@pytest.mark.parametrize(("r", "ready"), [(2, False), (4, True), (6, False)])
def test_an_interrupted_swap_changes_nothing(tmp_path, r, ready):
    wanted = small_pair(tmp_path, r)

    def build():
        model = with_adapter(tiny(layers=1))
        another(model, "other")
        if ready:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        return model

    every_step(build, lambda model: hotswap_adapter(model, tmp_path, "default"), wanted)


def test_interrupted_making_of_room_changes_nothing():
    coming = [config(), config(rank_pattern={"q_proj": 2})]

    def build():
        model = with_adapter(tiny(layers=1))
        another(model, "other")
        return model

    def work(model):
        prepare_model_for_compiled_hotswap(model, target_rank=8, config=dict(enumerate(coming)))

    every_step(build, work, logits(build()))


@pytest.mark.parametrize("failing", ["_foreach_copy_", "_foreach_zero_"])
def test_a_copy_that_fails_halfway_is_taken_back(folders, monkeypatch, failing):
    model = adapted_zoo(seed=9)
    before = Picture(model)
    real, calls = getattr(torch, failing), []

    def half(targets, *rest):
        calls.append(1)
        if len(calls) == 1:
            middle = len(targets) // 2
            real(targets[:middle], *(values[:middle] for values in rest))
            raise MemoryError
        return real(targets, *rest)

    monkeypatch.setattr(torch, failing, half)
    with pytest.raises(MemoryError):
        hotswap_adapter(model, folders / "small", "default")
    before.assert_same(model)


# ---- room, and compiled models ------------------------------------------------------------------------


def test_making_room_changes_nothing_that_is_computed_or_saved(folders, tmp_path):
    model = PeftModel.from_pretrained(zoo(), folders / "patterned")
    model.add_adapter("other", zoo_config(r=2))
    before, kept = logits(model), identities(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert_near(logits(model), before)
    assert identities(model) == kept
    for layer in registry_of(model).layers.values():
        for name in ("default", "other"):
            scaling = layer.scaling[name]
            assert (scaling.ndim, scaling.dtype, scaling.requires_grad) == (0, torch.float64, False)
            assert layer.stored(name).A.shape[0] == 8 * max(layer.layout.experts, 1)
    model.save_pretrained(tmp_path)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (folders / "patterned" / file).read_bytes()
    prepare_model_for_compiled_hotswap(model, target_rank=8)  # once more is nothing new
    assert identities(model) == kept


def test_room_while_merged():
    model = with_adapter(tiny())
    wanted = logits(model)
    model.merge_adapter()
    merged = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert_near(logits(model), wanted)


def test_replacing_a_prepared_adapter_makes_it_an_ordinary_one(folders, fresh):
    model = adapted_zoo(seed=9)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.load_adapter(folders / "small", "default", replace=True)
    assert_is(model, fresh["small"])
    layer = registry_of(model).layers["line"]
    assert type(layer.scaling["default"]) is float
    assert layer.stored("default").A.shape == (2, 8)
    hotswap_adapter(model, folders / "large", "default")
    assert_is(model, fresh["large"])


def test_scalings_alone():
    model = with_adapter(tiny())
    before = logits(model)
    prepare_model_for_compiled_hotswap(model)
    assert torch.equal(logits(model), before)
    assert registry_of(model).layers["layers.0.q_proj"].stored("default").A.shape == (4, 8)


ROOM_FAULTS = {
    "rank": ({"target_rank": 3}, AdapterStateError, "line: adapter 'default' has rank 4"),
    "groups": ({"target_rank": 7}, AdapterStateError, "wave: a rank must be divisible by the 2 groups"),
    "type": ({"target_rank": "8"}, ConfigError, "target_rank"),
    "bool": ({"target_rank": True}, ConfigError, "target_rank"),
    "zero": ({"target_rank": 0}, ConfigError, "target_rank"),
    "config": ({"target_rank": 8, "config": {"a": 3}}, ConfigError, "LoraConfig"),
    "check": ({"check_compiled": "never"}, ConfigError, "'error', 'warn' or 'ignore'"),
}


@pytest.mark.parametrize("fault", ROOM_FAULTS)
def test_room_refused(fault):
    arguments, error, words = ROOM_FAULTS[fault]
    model = adapted_zoo(seed=9)
    before = Picture(model)
    with pytest.raises(error, match=words):
        prepare_model_for_compiled_hotswap(model, **arguments)
    before.assert_same(model)
    with pytest.raises(AdapterNameError, match="carries no adapter"):
        prepare_model_for_compiled_hotswap(zoo(), target_rank=8)


@pytest.mark.parametrize("in_place", [True, False])
def test_room_on_a_compiled_model(in_place):
    model = with_adapter(tiny())
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.get_base_model().compile(backend="eager")
    before = Picture(model)
    with pytest.raises(AdapterStateError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    before.assert_same(model)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=16, check_compiled="ignore")
    assert registry_of(model).layers["layers.0.q_proj"].stored("default").A.shape == (16, 8)


def test_configs_of_adapters_to_come_get_the_room():
    model = with_adapter(tiny())
    to_come = config(r=2, rank_pattern={"q_proj": 3, "c_fc": 1})
    own = model.peft_config["default"]
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"default": own, "coming": to_come})
    assert (to_come.r, to_come.rank_pattern) == (8, {"q_proj": 8, "c_fc": 8})
    assert own.r == 4  # it says what the adapter is, and what is saved
    prepare_model_for_compiled_hotswap(model, config=config())


@pytest.mark.parametrize("kind", ["prepared", "compiled", "compiled inside"])
def test_no_room_on_a_compiled_model(folders, kind):
    model = PeftModel.from_pretrained(zoo(), folders / "same")
    given = model
    if kind == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    elif kind == "compiled":
        given = torch.compile(model, backend="eager")
    else:
        model.get_base_model().compile(backend="eager")
    before = Picture(model)
    with pytest.raises(
        AdapterStateError, match=r"prepare_model_for_compiled_hotswap\(model, target_rank=6\)"
    ):
        hotswap_adapter(given, folders / "large", "default")
    before.assert_same(model)
    if kind == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        hotswap_adapter(model, folders / "large", "default")


@pytest.fixture
def no_recompiling():
    torch._dynamo.reset()

    def start():
        torch._dynamo.config.error_on_recompile = True

    yield start
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def compiled_files(tmp_path):
    targets = ["q_proj", "v_proj", "c_fc"]
    changes = {
        "large": {"r": 8, "lora_alpha": 3, "use_rslora": True},
        "small": {"r": 2, "lora_alpha": 9, "lora_dropout": 0.1},
        "few": {"r": 3, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.q_proj": 5}},
    }
    for seed, (name, values) in enumerate(changes.items()):
        values = {"target_modules": targets, **values}
        with_adapter(tiny(), seed=seed, **values).save_pretrained(tmp_path / name)
    return with_adapter(tiny(), target_modules=targets), list(changes)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_swaps_on_a_compiled_model_compile_nothing(tmp_path, no_recompiling, backend):
    model, names = compiled_files(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(ids())
    no_recompiling()
    torch._dynamo.utils.counters.clear()
    for name in [*names, *names]:
        hotswap_adapter(compiled, tmp_path / name, "default")
        with torch.no_grad():
            found = compiled(ids())
        wanted = logits(PeftModel.from_pretrained(tiny(), tmp_path / name))
        assert_near(found, wanted)
        with lorakit.rescale_adapter_scale(compiled, 0.0), torch.no_grad():
            assert_near(compiled(ids()), logits(tiny()))
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_without_room_a_compiled_model_is_compiled_again(tmp_path, no_recompiling):
    """What the test above would see if preparing did nothing."""
    model, _ = compiled_files(tmp_path)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids())
        no_recompiling()
        hotswap_adapter(compiled, tmp_path / "small", "default")
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(ids())


def test_compiled_training_goes_on(tmp_path, no_recompiling):
    model, names = compiled_files(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids()).square().mean().backward()
    model.zero_grad(set_to_none=True)
    no_recompiling()
    for name in names:
        hotswap_adapter(compiled, tmp_path / name, "default")
        compiled(ids()).square().mean().backward()
        wanted = PeftModel.from_pretrained(tiny(), tmp_path / name, is_trainable=True)
        wanted(ids()).square().mean().backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        for key, parameter in wanted.named_parameters():
            if parameter.grad is not None:
                room = grads[key]
                own = room[tuple(slice(size) for size in parameter.shape)]
                torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-6)
                assert room.count_nonzero() == own.count_nonzero()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_layers_of_every_kind_under_compile(folders, fresh, no_recompiling, backend):
    kinds = {"target_modules": KINDS, "target_parameters": None}
    model = adapted_zoo(seed=9, **kinds)
    for name in ("small", "large"):
        adapted_zoo(seed=3, **kinds, **ADAPTERS[name]).save_pretrained(folders / f"{name} kinds")
    prepare_model_for_compiled_hotswap(model, target_rank=LARGEST)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(ids())
        no_recompiling()
        for name in ("small", "large", "few"):
            place = folders / (name if name == "few" else f"{name} kinds")
            hotswap_adapter(compiled, place, "default")
            wanted = logits(PeftModel.from_pretrained(zoo(), place))
            assert_near(compiled(ids()), wanted)


# ---- what else an adapter owns ------------------------------------------------------------------------


def test_whole_modules_and_trained_biases(tmp_path):
    owned = {"modules_to_save": ["head"], "bias": "all"}
    with_adapter(tiny(), seed=8, r=2, **owned).save_pretrained(tmp_path)
    model = with_adapter(tiny(), seed=9, **owned)
    before = identities(model)
    hotswap_adapter(model, tmp_path, "default")
    assert identities(model) == before
    assert_is(model, PeftModel.from_pretrained(tiny(), tmp_path))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))


OWNED = {
    "no head": ({"modules_to_save": ["head"]}, {}, "modules_to_save: means nothing here"),
    "a head more": ({}, {"modules_to_save": ["head"]}, "modules_to_save: means .*head"),
    "no biases": ({"bias": "all"}, {}, "bias: means nothing here"),
    "fewer biases": ({"bias": "all"}, {"bias": "lora_only"}, "bias: means"),
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias: got False"),
    "tokens": (
        {"trainable_token_indices": {"embed": [1, 2]}},
        {"trainable_token_indices": {"embed": [1, 3]}},
        r"trainable_token_indices: means .*3",
    ),
    "no tokens": (
        {"trainable_token_indices": {"embed": [1, 2]}},
        {},
        "trainable_token_indices: means nothing",
    ),
}


@pytest.mark.parametrize("case", OWNED)
def test_what_a_swap_cannot_give_or_take_is_refused(tmp_path, case):
    old, new, words = OWNED[case]
    with_adapter(tiny(), seed=8, **new).save_pretrained(tmp_path)
    model = with_adapter(tiny(), seed=9, **old)
    before = Picture(model)
    with pytest.raises(PlanError, match=f"(?s){words}.*load_adapter"):
        hotswap_adapter(model, tmp_path, "default")
    before.assert_same(model)


def test_token_rows(tmp_path):
    rows = {"trainable_token_indices": {"embed": [3, 1]}}
    with_adapter(tiny(), seed=8, r=2, **rows).save_pretrained(tmp_path)
    model = with_adapter(tiny(), seed=9, **rows)
    hotswap_adapter(model, tmp_path, "default")
    assert_is(model, PeftModel.from_pretrained(tiny(), tmp_path))


def test_token_rows_beside_factors_on_one_layer(tmp_path):
    rows = {"trainable_token_indices": {"embed": [3, 1]}, "target_modules": ["embed", "q_proj"]}
    with_adapter(tiny(), seed=8, r=2, **rows).save_pretrained(tmp_path / "both")
    with_adapter(tiny(), seed=8, **{**rows, "target_modules": ["q_proj"]}).save_pretrained(tmp_path / "rows")
    model = with_adapter(tiny(), seed=9, **rows)
    hotswap_adapter(model, tmp_path / "both", "default")
    assert_is(model, PeftModel.from_pretrained(tiny(), tmp_path / "both"))
    before = Picture(model)
    with pytest.raises(PlanError, match="embed: the new adapter is not on this layer"):
        hotswap_adapter(model, tmp_path / "rows", "default")
    before.assert_same(model)


TIED = {
    "factors": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows": {"trainable_token_indices": [1, 4]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("what", TIED)
def test_tied_modules(tmp_path, what, ready):
    changes = {"target_modules": ["q_proj"], "ensure_weight_tying": True, **TIED[what]}
    for name, r in (("small", 2), ("large", 8)):
        with_adapter(tiny_llama(tie=True), seed=r, r=r, **changes).save_pretrained(tmp_path / name)
    model = with_adapter(tiny_llama(tie=True), seed=9, **changes)
    if ready:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    for number, name in enumerate(("small", "large", "small")):
        hotswap_adapter(model, tmp_path / name, "default")
        wanted = PeftModel.from_pretrained(tiny_llama(tie=True), tmp_path / name)
        assert_is(model, wanted)
        model.save_pretrained(tmp_path / str(number))
        assert_is(PeftModel.from_pretrained(tiny_llama(tie=True), tmp_path / str(number)), wanted)


@pytest.mark.parametrize("what", ["factors", "whole"])
def test_a_file_in_which_tied_modules_differ(tmp_path, what):
    changes = {"target_modules": ["q_proj"], "ensure_weight_tying": True, **TIED[what]}
    with_adapter(tiny_llama(tie=True), seed=2, **changes).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[next(k for k in tensors if "lm_head" in k)].add_(1))
    model = with_adapter(tiny_llama(tie=True), seed=9, **changes)
    before = Picture(model)
    with pytest.raises(AdapterFormatError, match="tied modules differ"):
        hotswap_adapter(model, tmp_path, "default")
    before.assert_same(model)


def test_a_tied_layer_cannot_be_taken_off(tmp_path):
    changes = {"ensure_weight_tying": True}
    with_adapter(tiny_llama(tie=True), target_modules=["q_proj"], modules_to_save=None).save_pretrained(
        tmp_path
    )
    model = with_adapter(tiny_llama(tie=True), target_modules=["q_proj", "lm_head"], **changes)
    before = Picture(model)
    with pytest.raises(PlanError, match=r"ensure_weight_tying|cannot be taken off"):
        hotswap_adapter(model, tmp_path, "default")
    before.assert_same(model)


def test_embeddings_that_other_writers_put_beside_the_adapter(tmp_path):
    """A copy of the base's own embedding is passed over as at a load; one that differs is refused."""
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    peft = with_adapter(tiny_llama(), seed=8, **targets)
    peft.save_pretrained(tmp_path, save_embedding_layers=True)
    model = with_adapter(tiny_llama(), seed=9, **targets)
    hotswap_adapter(model, tmp_path, "default")
    assert_is(model, PeftModel.from_pretrained(tiny_llama(), tmp_path))
    other = with_adapter(tiny_llama(seed=4), seed=9, **targets)
    before = Picture(other)
    with pytest.raises(KeyMismatchError, match=r"unexpected: .*embed_tokens"):
        hotswap_adapter(other, tmp_path, "default")
    before.assert_same(other)


def test_embeddings_that_came_with_the_adapter(tmp_path):
    for seed in (5, 6):
        grown = with_adapter(tiny_llama(), seed=seed, target_modules=["q_proj"])
        with torch.no_grad():
            grown.get_base_model().model.embed_tokens.weight.add_(seed)
        grown.save_pretrained(tmp_path / str(seed), save_embedding_layers=True)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "5", allow_base_weights=True)
    hotswap_adapter(model, tmp_path / "6", "default")
    wanted = PeftModel.from_pretrained(tiny_llama(), tmp_path / "6", allow_base_weights=True)
    assert_near(logits(model), logits(wanted))


def test_nested_parameters_of_which_one_is_taken_off(tmp_path):
    """Names in a file depend on which parameters of a module carry the adapter."""
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Parameter(torch.randn(2, 8, 8)) for _ in range(2))

        def forward(self, x):
            return ((x @ self.up[0]) @ self.down[1]).tanh()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.two = torch.nn.Embedding(11, 8), Two()

        def forward(self, ids):
            return self.two(self.embed(ids))

    def build():
        torch.manual_seed(1)
        return Model().eval()

    def adapted(seed, *names, **changes):
        model = lorakit.get_peft_model(
            build(),
            config(target_modules=None, target_parameters=[f"two.{name}" for name in names], **changes),
        )
        randomise(model, seed=seed)
        return model

    adapted(5, "up", "down").save_pretrained(tmp_path / "both")
    adapted(6, "up", r=2).save_pretrained(tmp_path / "up")
    adapted(7, "down").save_pretrained(tmp_path / "down")
    model = adapted(8, "up", "down")
    for number, name in enumerate(("up", "both", "down", "up")):
        hotswap_adapter(model, tmp_path / name, "default")
        wanted = PeftModel.from_pretrained(build(), tmp_path / name)
        assert_near(logits(model), logits(wanted))
        model.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / FILES[1]).read_bytes() == (tmp_path / name / FILES[1]).read_bytes()


@pytest.mark.filterwarnings("ignore:.*changed after the adapter was saved:UserWarning")
def test_shorthands_for_targets(tmp_path):
    with_adapter(tiny(), seed=8, target_modules="all-linear").save_pretrained(tmp_path)
    reconfigure(tmp_path, target_modules="all-linear")
    model = with_adapter(tiny(), seed=9, target_modules="all-linear")
    hotswap_adapter(model, tmp_path, "default")
    assert_is(model, PeftModel.from_pretrained(tiny(), tmp_path))
    hotswap_adapter(model, tmp_path, "default", config=config(target_modules=r".*(proj|c_fc|down|head)"))


FIRST = r"layers\.0\.(q_proj|c_fc)"


def test_more_layers_than_the_loaded_adapter_has(tmp_path):
    with_adapter(tiny(), seed=8).save_pretrained(tmp_path)
    model = with_adapter(tiny(), seed=9, target_modules=FIRST)
    before = Picture(model)
    with pytest.raises(PlanError, match=r"layers.1.q_proj: the loaded adapter is not on this layer"):
        hotswap_adapter(model, tmp_path, "default")
    before.assert_same(model)


# ---- cost ---------------------------------------------------------------------------------------------


def calls_of(work):
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(row.callcount for row in profile.getstats())


def test_the_cost_does_not_depend_on_the_rest_of_the_model(tmp_path, monkeypatch):
    """Counted in calls, which no busy machine can move; and nothing walks the model."""
    with_adapter(tiny(), seed=8, r=2, target_modules=FIRST).save_pretrained(tmp_path)
    counts = []
    for layers in (2, 20):
        model = with_adapter(tiny(layers=layers), seed=9, target_modules=FIRST)
        for name in ("one", "two") if layers > 2 else ():
            another(model, name, target_modules=FIRST)
        hotswap_adapter(model, tmp_path, "default")
        for walk in ("modules", "named_modules", "parameters", "named_parameters", "state_dict"):
            monkeypatch.setattr(torch.nn.Module, walk, None)
        monkeypatch.setattr("lorakit.surgery.plan.describe", None)
        counts.append(calls_of(lambda model=model: hotswap_adapter(model, tmp_path, "default")))
        monkeypatch.undo()
    assert counts[1] <= 1.05 * counts[0]
