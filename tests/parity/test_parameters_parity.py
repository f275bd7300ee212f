"""`target_parameters`: experts and other bare parameters, with PEFT as the judge.

PEFT wants equal targets of all adapters, and multiplies by the dense sum in the base's own dtype; numbers are compared
where both do the same.
"""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lorakit
from lorakit.layers.factored import FactoredWeight
from parity.models import NAMED_WARNINGS, VOCABULARY, adapter_parameters, copy_trained, peft, randomize

pytestmark = [
    *NAMED_WARNINGS,
    # PEFT, of keys that name parameters: it looks for modules of that name, and applies them all the same
    pytest.mark.filterwarnings(
        r"ignore:The following \w+_pattern keys did not match any targeted module:RuntimeWarning"
    ),
]

EAGER, BATCHED, GROUPED = "eager", "batched_mm", "grouped_mm"
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_num_experts": 4, "moe_topk": 2,
    "moe_num_shared_experts": 1, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8,
    "q_lora_rank": 8, "kv_channels": 8,
}  # fmt: skip
OTHER = {
    "llama4_text": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "layer_types": ["full_attention"] * 2},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


class Stack(nn.Module):
    """Experts of nobody's library: weights by einsum, one 2-D parameter, a Linear with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 8))
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) / 3)

    def forward(self, x):
        inner = torch.tanh(torch.einsum("efd,...d->...ef", self.up, x))
        outer = torch.einsum("edf,...ef->...ed", self.down, inner)
        return torch.einsum("...ed,...e->...d", outer, (x @ self.mix.T).softmax(-1))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.experts = Stack()
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids):
        x = nn.functional.one_hot(input_ids % 5, 5).to(self.head.weight.dtype)
        return self.head(self.experts(self.first(x)))


class Case(NamedTuple):
    kind: str
    targets: tuple[str, ...]
    implementation: str | None = None
    fields: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        fields = ",".join(f"{key}={value}" for key, value in self.fields)
        return "-".join(
            part for part in (self.kind, self.implementation, ",".join(self.targets), fields) if part
        )


BOTH = ("experts.gate_up_proj", "experts.down_proj")
CASES = [
    Case("llama4_text", BOTH),
    *(Case("qwen3_moe", BOTH, way) for way in (EAGER, BATCHED, GROUPED)),
    *(Case("gpt_oss", BOTH, way) for way in (EAGER, BATCHED, GROUPED)),
    Case("mixtral", BOTH, GROUPED),
    Case("qwen2_moe", ("experts.down_proj",), EAGER),
    Case("olmoe", ("experts.gate_up_proj",), GROUPED),
    Case("deepseek_v2", BOTH, GROUPED),
    Case("deepseek_v3", BOTH, EAGER),
    Case("aria_text", BOTH, GROUPED),
    Case("jetmoe", ("mlp.input_linear.weight", "mlp.output_linear.weight")),
    Case("qwen3_moe", (*BOTH, "mlp.gate.weight", "q_proj.weight", "lm_head.weight"), EAGER),
    Case("gpt_oss", ("router.weight", "experts.gate_up_proj_bias", "experts.down_proj"), EAGER),
    Case("qwen3_moe", BOTH, GROUPED, (("target_modules", ("q_proj", "v_proj")), ("rank_pattern", (("experts.down_proj", 2),)))),
    Case("qwen3_moe", BOTH, GROUPED, (("use_rslora", True), ("alpha_pattern", (("layers.0.mlp.experts.gate_up_proj", 3),)))),
    Case("plain", ("experts.up", "experts.down", "experts.mix")),
    Case("plain", ("first.weight", "head.weight")),
]  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES, ids=str)
_BUILT: dict[tuple[str, str | None], nn.Module] = {}


def build(case, dtype=torch.float32):
    """A fresh model, the same for every call, with weights large enough that experts differ."""
    key = (case.kind, case.implementation)
    if key not in _BUILT:
        torch.manual_seed(0)
        model = Plain() if case.kind == "plain" else from_transformers(case.kind)
        if case.implementation:
            model.set_experts_implementation(case.implementation)
        _BUILT[key] = model.eval()
    return copy.deepcopy(_BUILT[key]).to(dtype)


def from_transformers(kind):
    default = transformers.AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that a kind lacks
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **OTHER.get(kind, {})})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    return model


def fields_of(case, **changes):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": list(case.targets)}
    given = {key: dict(value) if "pattern" in key else value for key, value in case.fields}
    return {**fields, **{k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}, **changes}


def pair(case, dtype=torch.float32, seed=0, **options):
    """Our adapter and PEFT's, random and equal, on equal bases; eval mode."""
    theirs = peft.get_peft_model(build(case, dtype), peft.LoraConfig(**fields_of(case)), **options)
    randomize(theirs, seed)
    ours = lorakit.get_peft_model(build(case, dtype), lorakit.LoraConfig(**fields_of(case)), **options)
    copy_trained(theirs, ours)
    return ours.eval(), theirs.eval()


def ids():
    return torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))


def output_of(model):
    out = model(input_ids=ids())
    return out if isinstance(out, torch.Tensor) else out.logits


def loss_of(model):
    return output_of(model).float().square().mean()


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def shapes(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@EACH
def test_same_names_and_shapes(case):
    ours, theirs = pair(case)
    assert list(adapter_parameters(ours)) == list(adapter_parameters(theirs))
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    mine, wanted = lorakit.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert shapes(mine) == shapes(wanted)
    assert all(torch.equal(mine[key], value) for key, value in wanted.items())
    theirs.load_state_dict(ours.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@EACH
def test_same_logits_and_gradients(case):
    ours, theirs = pair(case)
    with torch.no_grad():
        close(output_of(ours), output_of(theirs))
        assert (output_of(ours) - output_of(build(case))).abs().max() > 1e-2, "the adapter has an effect"
    ours.train()
    theirs.train()
    loss_of(ours).backward()
    loss_of(theirs).backward()
    wanted = adapter_parameters(theirs)
    for name, parameter in adapter_parameters(ours).items():
        assert wanted[name].grad.any(), name
        close(parameter.grad, wanted[name].grad, 1e-5)


STAYS_FACTORED = [case for case in CASES if case.implementation or case.kind in {"llama4_text", "jetmoe"}]


@pytest.mark.parametrize("case", [case for case in STAYS_FACTORED if case.targets == BOTH], ids=str)
def test_experts_never_get_a_dense_change(case, monkeypatch):
    ours, _ = pair(case)

    def refuse(_):
        raise AssertionError("a dense sum of experts was built")

    monkeypatch.setattr(FactoredWeight, "dense", refuse)
    loss_of(ours).backward()


@EACH
def test_training_gives_the_same_losses(case):
    losses = []
    for model in pair(case):
        model.train()
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
    assert losses[0][-1] < losses[0][0]


@EACH
def test_each_loads_the_other(case, tmp_path):
    ours, theirs = pair(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, wanted = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[key], value) for key, value in wanted.items())
    with torch.no_grad():
        expected = output_of(theirs)
        close(output_of(lorakit.PeftModel.from_pretrained(build(case), tmp_path / "theirs")), expected)
        close(output_of(peft.PeftModel.from_pretrained(build(case), tmp_path / "ours")), expected)


@EACH
@torch.no_grad()
def test_merged_alike_and_unmerged_bit_for_bit(case):
    ours, theirs = pair(case)
    base, before = output_of(build(case)), output_of(ours)
    start = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with ours.disable_adapter():
        assert torch.equal(output_of(ours), base)
    ours.merge_adapter()
    close(output_of(ours), before, 1e-5)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in start.items())
    with ours.disable_adapter():
        assert torch.equal(output_of(ours), base)
    ours.unmerge_adapter()
    assert torch.equal(output_of(ours), before)
    own = {name for name in start if "lora_" not in name}
    assert all(torch.equal(tensor, start[name]) for name, tensor in ours.state_dict().items() if name in own)
    mine, wanted = ours.merge_and_unload(), theirs.merge_and_unload()
    assert shapes(mine.state_dict()) == shapes(wanted.state_dict()) == shapes(build(case).state_dict())
    for name, tensor in wanted.state_dict().items():
        close(mine.state_dict()[name], tensor)
    close(output_of(mine), before, 1e-5)


HALF = [case for case in CASES[:9] if case.kind != "llama4_text"] + [CASES[0]]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_bf16_is_no_worse(case, autocast):
    ours, theirs = pair(case, torch.bfloat16, autocast_adapter_dtype=autocast)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    losses = [loss_of(ours), loss_of(theirs)]
    for loss in losses:
        loss.backward()
    exact = build(case, torch.bfloat16).float()
    exact = lorakit.get_peft_model(exact, lorakit.LoraConfig(**fields_of(case))).eval()
    with torch.no_grad():
        for mine, other in zip(
            adapter_parameters(exact).values(), adapter_parameters(theirs).values(), strict=True
        ):
            mine.copy_(other)
    truth = loss_of(exact)
    truth.backward()
    right = {name: parameter.grad for name, parameter in adapter_parameters(exact).items()}

    def error(model):
        grads = {name: parameter.grad.float() for name, parameter in adapter_parameters(model).items()}
        return sum(((grads[name] - right[name]).norm() / right[name].norm()).item() for name in right) / len(
            right
        )

    assert error(ours) <= 1.25 * error(theirs) + 2.0**-8
    assert abs(losses[0] - truth) <= 1.5 * abs(losses[1] - truth) + 2.0**-8 * truth


SAME_TARGETS = [CASES[3], CASES[4], CASES[0]]


@pytest.mark.parametrize("case", SAME_TARGETS, ids=str)
@torch.no_grad()
def test_two_adapters_with_the_same_targets_act_alike(case):
    ours, theirs = pair(case)
    for library, model in ((lorakit, ours), (peft, theirs)):
        model.add_adapter("other", library.LoraConfig(**fields_of(case, r=2, lora_alpha=5)))
        generator = torch.Generator().manual_seed(4)
        for name, parameter in sorted(model.named_parameters()):
            if ".other." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for names in ("other", "default", ["default", "other"]):
        ours.base_model.set_adapter(names)
        theirs.base_model.set_adapter(names)
        close(output_of(ours), output_of(theirs))
    theirs.delete_adapter("default")
    ours.delete_adapter("default")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.set_adapter("other")
    theirs.set_adapter("other")
    close(output_of(ours), output_of(theirs))


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_adapters_with_different_targets_have_files_of_their_own(first, tmp_path):
    """PEFT keeps one set of targets a model; each of our files is what PEFT writes of that adapter alone."""
    case = CASES[3]
    targets = {"gate": ["experts.gate_up_proj"], "down": ["experts.down_proj"]}
    names = list(targets)[:: -1 if first else 1]
    ours = None
    for number, name in enumerate(names):
        config = lorakit.LoraConfig(**fields_of(case, target_parameters=targets[name]))
        if ours is None:
            ours = lorakit.get_peft_model(build(case), config, name)
        else:
            ours.add_adapter(name, config)
        ours.set_adapter(name)
        randomize(ours, seed=number)
    ours.eval()
    ours.save_pretrained(tmp_path)
    for name in names:
        ours.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(build(case), tmp_path / name)
        close(output_of(ours), output_of(theirs))
        wanted = set(peft.get_peft_model_state_dict(theirs))
        assert set(load_file(tmp_path / name / "adapter_model.safetensors")) == wanted
