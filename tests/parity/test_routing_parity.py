"""Arrow, GenKnowSub and VeLoRA: outputs, gradients and files equal PEFT's."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from parity.models import NAMED_WARNINGS, adapter_parameters, batch, build, peft, randomize

pytestmark = NAMED_WARNINGS

ROUTER = "arrow_router"
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
each = pytest.mark.parametrize("kind", TARGETS)


def output(model, kind):
    with torch.no_grad():
        return model(**batch(kind)).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- Arrow ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TARGETS)
def experts(request, tmp_path_factory):
    """Four experts and two general adapters, written by PEFT, each with one direction well ahead of the others.

    PEFT looks for it by fifteen steps of the power method, which find no other.
    """
    kind, root = request.param, tmp_path_factory.mktemp("experts")
    for seed in range(6):
        config = peft.LoraConfig(
            target_modules=TARGETS[kind], r=4, lora_alpha=8 + seed, fan_in_fan_out=kind == "gpt2"
        )
        model = peft.get_peft_model(build(kind), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(adapter_parameters(model).items()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                (parameter[:1] if "lora_A" in name else parameter[:, :1]).mul_(6)
        model.save_pretrained(root / str(seed))
    return kind, [str(root / str(seed)) for seed in range(6)]


def arrows(kind, paths, *, gks, top_k=2):
    made = []
    for library in (lorakit, peft):
        config = library.ArrowConfig(top_k=top_k, router_temperature=0.7, use_gks=gks, rng_seed=0)
        general = paths[4:] if gks else None
        made.append(library.create_arrow_model(build(kind), paths[:4], config, general).eval())
    return made


@pytest.mark.parametrize("gks", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_routed_outputs(experts, gks, top_k):
    kind, paths = experts
    ours, theirs = arrows(kind, paths, gks=gks, top_k=top_k)
    wanted = output(theirs, kind)
    close(output(ours, kind), wanted)
    assert (wanted - output(build(kind), kind)).abs().max() > 1e-2
    assert ours.active_adapter == theirs.active_adapter == ROUTER
    for model in (ours, theirs):  # one that comes later is chosen from too
        model.load_adapter(paths[5], "later")
        model.set_adapter(ROUTER)
        model.eval()
    close(output(ours, kind), output(theirs, kind))


def test_a_router_written_by_peft_loads(experts, tmp_path):
    """PEFT cannot load one, its own included: it drops the names of the adapters and then misses them."""
    kind, paths = experts
    ours, theirs = arrows(kind, paths, gks=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = [load_file(tmp_path / who / ROUTER / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {key: value.shape for key, value in written[0].items()} == {
        key: value.shape for key, value in written[1].items()
    }
    for who in ("ours", "theirs"):
        loaded = lorakit.PeftModel.from_pretrained(build(kind), tmp_path / who / "task_0", "task_0")
        for name in ("task_1", "task_2", "task_3", ROUTER):
            loaded.load_adapter(tmp_path / who / name, name)
        loaded.set_adapter(ROUTER)
        assert torch.equal(output(loaded, kind), output(ours, kind))
        again = peft.PeftModel.from_pretrained(build(kind), tmp_path / who / "task_0", "task_0")
        with pytest.raises(AttributeError):
            again.load_adapter(tmp_path / who / ROUTER, ROUTER)


def test_general_knowledge_leaves_the_experts_alone(experts):
    """PEFT writes the difference into the experts' parameters, where a save then finds it."""
    kind, paths = experts
    ours, theirs = arrows(kind, paths, gks=True)
    alone = peft.PeftModel.from_pretrained(build(kind), paths[0])
    wanted = output(alone, kind)
    for model in (ours, theirs):
        output(model, kind)
        model.set_adapter("task_0")
    close(output(ours, kind), wanted)
    assert (output(theirs, kind) - wanted).abs().max() > 1e-2


# ---- VeLoRA ---------------------------------------------------------------------------------------------

VELORA = [
    {"num_groups": groups, "init_type": init, "scale": scale}
    for groups, init, scale in [
        (5, "batch_average", 1.5),
        (4, "batch_average_once", 1.0),
        (64, "random", 0.5),
    ]
]


def veloras(kind, options, **changes):
    fields = {"r": 4, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **changes}
    theirs = peft.get_peft_model(
        build(kind), peft.LoraConfig(**fields, velora_config=peft.VeloraConfig(**options))
    )
    randomize(theirs)
    ours = lorakit.get_peft_model(build(kind), lorakit.LoraConfig(**fields, velora_config=options))
    ours.load_state_dict(theirs.state_dict())
    return ours.train(), theirs.train()


@pytest.mark.parametrize("options", VELORA, ids=lambda options: options["init_type"])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("gpt2", {}), ("gpt2", {"lora_bias": True})])
def test_velora_steps(kind, options, changes):
    ours, theirs = veloras(kind, options, **changes)
    given = batch(kind)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            model(**given).loss.backward()
        found, wanted = adapter_parameters(ours), adapter_parameters(theirs)
        assert found.keys() == wanted.keys()
        for name, parameter in wanted.items():
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter -= 0.5 * parameter.grad
                found[name].copy_(parameter)
        given["input_ids"] = given["input_ids"].flip(1)
    close(output(ours.eval(), kind), output(theirs.eval(), kind))


@each
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_velora_files(kind, writer, tmp_path):
    models = dict(zip(("ours", "theirs"), veloras(kind, VELORA[0]), strict=True))
    for model in models.values():
        model(**batch(kind))
        model.eval()
    wanted = output(models[writer], kind)
    models[writer].save_pretrained(tmp_path)
    library, other = (peft, lorakit) if writer == "ours" else (lorakit, peft)
    loaded = library.PeftModel.from_pretrained(build(kind), tmp_path)
    close(output(loaded, kind), wanted)
    found, kept = library.get_peft_model_state_dict(loaded), other.get_peft_model_state_dict(models[writer])
    assert found.keys() == kept.keys()
    assert any("lora_velora_embed" in key for key in found)
    assert all(torch.equal(found[key], kept[key]) for key in found)
    close(output(loaded.merge_and_unload(), kind), wanted)
    shutil.rmtree(tmp_path)
