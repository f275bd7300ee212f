"""Adapters on nn.MultiheadAttention: every way it is called, alone and inside torch's transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.errors import PlanError, UnsupportedError
from models import Snapshot, randomise

WIDTH, HEADS, BATCH, TOKENS, OTHERS = 8, 2, 3, 5, 4


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def build(**options):
    torch.manual_seed(0)
    model = Model(**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model.eval()


def adapted(name="default", **options):
    model = get_peft_model(build(**options), LoraConfig(r=2, lora_alpha=3, target_modules=["attn"]), name)
    randomise(model, name)
    return model.eval()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(*, batch_first=False, kdim=WIDTH, vdim=WIDTH, batched=True):
    """Query, key and value."""
    shapes = (TOKENS, WIDTH), (OTHERS, kdim), (OTHERS, vdim)
    tensors = [draw(BATCH, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    if not batched:
        return [t[0] for t in tensors]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def composed(model, names=("default",)):
    """The base's attention with weights summed from leaves, and those leaves by adapter and path."""
    registry, base = model.base_model.registry, build_like(model)
    state, leaves = dict(base.named_parameters()), {}
    for path, layer in registry.layers.items():
        weight = path if path in state else f"{path}.weight"
        for name in names:
            A, B, _ = (None if t is None else t.detach().clone().requires_grad_() for t in layer.stored(name))
            leaves[path, name] = A, B
            state[weight] = state[weight] + 1.5 * B @ A
    return base, state, leaves


def build_like(model):
    base = copy.deepcopy(model).unload()
    return base.requires_grad_(False)


def close(found, wanted, tolerance=1e-11):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


KEPT = torch.ones(BATCH, OTHERS, dtype=torch.bool)
KEPT[1, 2:] = False
OPTIONS = {
    "packed": {},
    "batch first": {"batch_first": True},
    "separate": {"kdim": 6, "vdim": 10},
    "separate, batch first": {"kdim": 6, "vdim": 10, "batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
}
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "key mask": {"key_padding_mask": ~KEPT},
    "attention mask": {"attn_mask": torch.ones(TOKENS, OTHERS, dtype=torch.bool).triu(2)},
    "float mask": {"attn_mask": draw(BATCH * HEADS, TOKENS, OTHERS, seed=9)},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_summed_weights(options, call):
    options = OPTIONS[options]
    sides = {key: value for key, value in options.items() if key in {"batch_first", "kdim", "vdim"}}
    given, kwargs = inputs(**sides), CALLS[call]
    model = adapted(**options)
    base, state, leaves = composed(model)
    found, wanted = model(*given, **kwargs), functional_call(base, state, tuple(given), kwargs)
    plain = base(*given, **kwargs)
    close(found, wanted)
    assert (found[0] - plain[0]).abs().max() > 1e-2
    for output in (found, wanted):
        sum(part.square().sum() for part in output if part is not None).backward()
    for (path, name), (A, B) in leaves.items():
        mine = model.base_model.registry.layers[path].stored(name)
        close(mine.A.grad, A.grad, 1e-10)
        close(mine.B.grad, B.grad, 1e-10)


@pytest.mark.parametrize("options", ["packed", "separate", "no bias"])
def test_one_sample_alone(options):
    options = OPTIONS[options]
    given = inputs(**{key: value for key, value in options.items() if key in {"kdim", "vdim"}}, batched=False)
    model = adapted(**options)
    base, state, _ = composed(model)
    close(model(*given), functional_call(base, state, tuple(given)))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_merging_changes_no_output_and_unmerging_no_bit(options):
    options = OPTIONS[options]
    given = inputs(**{key: value for key, value in options.items() if key in {"batch_first", "kdim", "vdim"}})
    model = adapted(**options)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    before, plain = (
        model(*given),
        build(**options).requires_grad_(False)(*given),
    )  # torch's kernels ask for the flag
    with model.disable_adapter():
        assert torch.equal(model(*given)[0], plain[0])
    model.merge_adapter()
    close(model(*given), before)
    with model.disable_adapter():
        assert torch.equal(model(*given)[0], plain[0])
    model.unmerge_adapter()
    assert torch.equal(model(*given)[0], before[0])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in start.items())
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    close(merged(*given), before)
    restored = model.unload()
    for (name, parameter), (_, wanted) in zip(
        restored.named_parameters(), build(**options).named_parameters(), strict=True
    ):
        assert torch.equal(parameter, wanted), name
        assert parameter.requires_grad


@pytest.mark.parametrize("options", ["packed", "separate"])
def test_several_adapters(options, tmp_path):
    options = OPTIONS[options]
    given = inputs(**{key: value for key, value in options.items() if key in {"kdim", "vdim"}})
    model = adapted("a", **options)
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=4.5, target_modules=["attn"]))
    bare = "attn.in_proj_weight" if "kdim" not in options else "attn.v_proj_weight"
    model.add_adapter("c", LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=[bare]))
    for seed, name in enumerate("bc"):
        randomise(model, name, seed=seed)
    base, state, _ = composed(model, names="ab")
    model.base_model.set_adapter(["a", "b"])
    close(model(*given), functional_call(base, state, tuple(given)))
    wanted = {}
    for name in "abc":
        model.set_adapter(name)
        wanted[name] = model(*given)
        close(copy.deepcopy(model).merge_and_unload(adapter_names=[name])(*given), wanted[name])
    model.save_pretrained(tmp_path)
    for order in ("abc", "cab"):
        fresh = PeftModel.from_pretrained(build(**options), tmp_path / order[0], adapter_name=order[0])
        for name in order[1:]:
            fresh.load_adapter(tmp_path / name, name)
        for name in order:
            fresh.set_adapter(name)
            close(fresh(*given), wanted[name], 1e-12)
            with fresh.use_adapter("a"):
                close(fresh(*given), wanted["a"], 1e-12)
        for name in "ab":
            fresh.set_adapter("c")
            fresh.delete_adapter(name)
        close(fresh(*given), wanted["c"], 1e-12)
        assert list(fresh.base_model.registry.layers) == [bare]
        with pytest.raises(PlanError, match="reads this layer's weight"):
            fresh.add_adapter("d", LoraConfig(target_modules=["out_proj"]))


def test_an_adapter_for_each_sample_is_refused():
    model = adapted(batch_first=True)
    before = Snapshot(model)
    with pytest.raises(UnsupportedError, match="one adapter for the whole batch"):
        model(*inputs(batch_first=True), adapter_names=["default", "__base__", "default"])
    before.assert_same(model)


REFUSED = {
    "dropout": (LoraConfig(target_modules=["attn"], lora_dropout=0.1), "lora_dropout cannot act here"),
    "bias of B": (LoraConfig(target_modules=["attn"], lora_bias=True), "lora_bias=True has no place"),
    "out_proj alone": (LoraConfig(target_modules=["out_proj"]), "reads this layer's weight"),
    "named twice": (
        LoraConfig(target_modules=["attn"], target_parameters=["attn.in_proj_weight"]),
        "attn.in_proj_weight: attn is named in target_modules too",
    ),
    "out_proj named twice": (
        LoraConfig(target_modules=["attn"], target_parameters=["out_proj.weight"]),
        "attn.out_proj.weight: attn is named in target_modules too",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_while_planning(case):
    config, message = REFUSED[case]
    model = build()
    before = Snapshot(model)
    with pytest.raises(PlanError, match=message):
        get_peft_model(model, config)
    before.assert_same(model)


def test_out_proj_as_a_parameter_acts_and_keeps_the_module_adapter_away():
    model = get_peft_model(
        build(), LoraConfig(r=2, target_modules=[], target_parameters=["attn.out_proj.weight"])
    )
    randomise(model)
    found = model(*inputs())
    close(copy.deepcopy(model).merge_and_unload()(*inputs()), found)
    assert (found[0] - build()(*inputs())[0]).abs().max() > 1e-2
    before = Snapshot(model)
    with pytest.raises(
        PlanError, match=r"attn\.out_proj: its parameters \['weight'\] carry adapters already"
    ):
        model.add_adapter("other", LoraConfig(target_modules=["attn"]))
    before.assert_same(model)


# ---- inside torch's transformers --------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x, mask=None):
        return self.encoder(x, src_key_padding_mask=mask)


@pytest.fixture
def fast_calls(monkeypatch):
    """How often torch's fused encoder layer ran."""
    calls, fused = [], torch._transformer_encoder_layer_fwd

    def counted(*args):
        calls.append(args)
        return fused(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_computes_the_same_fast_slow_and_merged(fast_calls, masked, norm_first):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="norm_first") if norm_first else no_warning():
        base = Encoder(norm_first=norm_first).double().eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["self_attn"]))
    randomise(model)
    tokens = draw(BATCH, OTHERS, WIDTH)
    mask = ~KEPT if masked else None
    seen = KEPT if masked else torch.ones_like(KEPT)
    slow = model.train()(tokens, mask)
    assert not fast_calls
    merged = copy.deepcopy(model).merge_and_unload().eval()
    model.eval()
    with torch.no_grad():
        fast = model(tokens, mask)
        assert len(fast_calls) == 2
        close(fast[seen], slow[seen])
        close(fast, merged(tokens, mask))
        assert (fast - base(tokens, mask))[seen].abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(tokens, mask), base(tokens, mask))
        assert len(fast_calls) == 10
    close(model(tokens, mask)[seen], slow[seen])


def no_warning():
    from contextlib import nullcontext

    return nullcontext()


def test_a_whole_transformer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Transformer(WIDTH, HEADS, 1, 2, 12, dropout=0.0, batch_first=True)

        def forward(self, source, target):
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
            return self.net(source, target, tgt_mask=mask, tgt_is_causal=True)

    plain = Net().double()
    model = get_peft_model(
        copy.deepcopy(plain),
        LoraConfig(r=2, lora_alpha=3, target_modules=["self_attn", "multihead_attn"]),
    )
    assert len(model.base_model.registry.layers) == 2 * 1 + 4 * 2
    randomise(model)
    source, target = draw(BATCH, TOKENS, WIDTH), draw(BATCH, OTHERS, WIDTH, seed=2)
    trained = model.train()(source, target)
    trained.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    with torch.no_grad():
        close(model(source, target), trained)
        close(copy.deepcopy(model).merge_and_unload()(source, target), trained)
        assert (trained - plain(source, target)).abs().max() > 1e-2
        with model.disable_adapter():
            close(model(source, target), plain.requires_grad_(False).eval()(source, target), 0)


def test_copies_pickles_and_calls_with_other_values():
    model, given = adapted(batch_first=True), inputs(batch_first=True)
    wanted = model(*given)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(*given), wanted, 0)
    close(functional_call(model, dict(copy.deepcopy(model).named_parameters()), tuple(given)), wanted, 0)


def test_autocast_and_half_precision():
    model = adapted(batch_first=True).float()
    given = [t.float() for t in inputs(batch_first=True)]
    merged, wanted = copy.deepcopy(model).merge_and_unload(), model(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, other = model(*given)[0], merged(*given)[0]
    assert found.dtype == other.dtype
    torch.testing.assert_close(found, other, rtol=0, atol=2.0**-7 * wanted.abs().max().item())
    half = get_peft_model(
        build(batch_first=True).bfloat16(), LoraConfig(r=2, lora_alpha=3, target_modules=["attn"])
    )
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    randomise(half)
    found = half.eval()(*[t.bfloat16() for t in given])[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=2.0**-5 * wanted.abs().max().item())


# ---- the other layers of nn.TransformerEncoderLayer, whose weights it reads in eval mode ------------------


def feed_forward(name="default", **fields):
    torch.manual_seed(0)
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["linear1", "linear2"], **fields}
    model = get_peft_model(Encoder().double().eval(), LoraConfig(**fields), name)
    randomise(model, name)
    return model.eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_feed_forward_adapters_act_in_the_fast_path(fast_calls, masked, biased):
    model = feed_forward(lora_bias=biased)
    x = draw(BATCH, TOKENS, WIDTH)
    mask = torch.arange(TOKENS).expand(BATCH, -1) >= 3 if masked else None
    kept = slice(0, 3) if masked else slice(None)

    def run():
        return model(x, mask)[:, : kept.stop]

    wanted = run()  # the adapter's gradients keep torch from its fast path
    with model.disable_adapter():
        plain = run()
    assert (wanted - plain).abs().max() > 1e-2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            torch.testing.assert_close(run(), wanted)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    fast_calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(run(), wanted)
        assert len(fast_calls) == 2
        with model.disable_adapter():
            torch.testing.assert_close(run(), plain)
        with model.use_adapter([]):
            torch.testing.assert_close(run(), plain)
        model.merge_adapter()
        torch.testing.assert_close(run(), wanted)
        model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload()(x, mask)[:, : kept.stop], wanted)


def test_feed_forward_adapters_for_each_sample():
    model = feed_forward()
    names = ["default", "__base__", "default"]
    x = draw(BATCH, TOKENS, WIDTH)
    found = model.train()(x, adapter_names=names)
    with model.disable_adapter():
        torch.testing.assert_close(found[1], model(x)[1])
    torch.testing.assert_close(found[2], model(x)[2])
    with torch.no_grad(), pytest.raises(UnsupportedError, match="TransformerEncoderLayer in eval mode"):
        model.eval()(x, adapter_names=names)
