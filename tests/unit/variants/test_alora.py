"""aLoRA against a naive reference: a loop over samples that adds the adapter to the tokens from the invocation on."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Trainer, TrainingArguments

from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.errors import ConfigError, PlanError, UnsupportedError
from lorakit.layers import carrying
from lorakit.layers.chosen import Live
from lorakit.variants.alora import Activation, find_invocation
from models import Snapshot, another, randomise, registry_of, tiny, tiny_bert, tiny_llama, with_adapter

CALL = [3, 4]
PROMPTS = torch.tensor(
    [
        [5, 6, 3, 4, 7, 8],  # in the middle
        [3, 4, 5, 3, 4, 6],  # twice: the last one counts
        [5, 6, 7, 8, 9, 5],  # nowhere
        [3, 4, 5, 6, 7, 8],  # from the beginning
    ]
)
OFFSETS = [4, 3, None, 6]


def llama(name="a", **changes):
    return with_adapter(
        tiny_llama(),
        name,
        **{
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": CALL,
            **changes,
        },
    ).eval()


def logits(model, prompts=PROMPTS, **kwargs):
    with torch.no_grad():
        return model(input_ids=prompts, **kwargs).logits


def base_logits(prompts=PROMPTS):
    return logits(tiny_llama(), prompts)


def naive(prompts, sequence):
    """How many tokens from the last occurrence on, by a loop."""
    found = []
    for row in prompts.tolist():
        places = [place for place in range(len(row)) if row[place : place + len(sequence)] == list(sequence)]
        found.append(len(row) - places[-1] if places else 0)
    return found


# ---- where it begins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [[1], [1, 0], [1, 1], [0, 1, 0], [1, 1, 1, 1], [0] * 9, [0] * 10])
def test_the_last_occurrence_is_found(sequence):
    """Of two tokens, so that occurrences are many, overlap, and lie at both ends."""
    prompts = torch.randint(2, (64, 9), generator=torch.Generator().manual_seed(0))
    prompts[0], prompts[1] = 0, 1
    assert find_invocation(prompts, sequence).tolist() == naive(prompts, sequence)


def test_where_an_activation_acts():
    activation = Activation(torch.tensor([2, 0, 9]))
    assert activation.mask(3, 4).int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert activation.inside(3, 4, torch.device("cpu")).tolist() == [2, 3, 8, 9, 10, 11]
    assert Activation(torch.tensor([4, 5])).inside(2, 4, torch.device("cpu")) is None
    adding = Activation(torch.tensor([2, 0]), length=4, repeats=True)
    assert adding.mask(2, 6).int().tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]  # two tokens were added
    assert adding.mask(4, 1).int().tolist() == [[1], [1], [0], [0]]  # two beams, one token
    for samples in (3, 0):
        with pytest.raises(ConfigError, match="leading size"):
            adding.mask(samples, 4)
    with pytest.raises(ConfigError, match="leading size 6"):
        activation.mask(6, 4)


# ---- forward --------------------------------------------------------------------------------------------


def reference(model, prompts, offsets):
    """Each sample alone; each layer's adapter is added to its last tokens by hooks on a model without adapters."""
    layers, base = registry_of(model).layers, tiny_llama()

    def hook(path, offset):
        layer = layers[path]

        def add(_, args, y):
            x = args[0][:, args[0].shape[1] - offset :]
            A, B, _ = layer.stored("a")
            y = y.clone()
            y[:, y.shape[1] - offset :] += layer.scaling["a"] * (x @ A.T @ B.T)
            return y

        return add

    found = []
    for row, offset in zip(prompts, offsets, strict=True):
        handles = [base.get_submodule(path).register_forward_hook(hook(path, offset or 0)) for path in layers]
        found.append(logits(base, row[None]))
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def test_forward_is_the_reference_and_the_base_before_it():
    model = llama()
    found, base = logits(model), base_logits()
    torch.testing.assert_close(found, reference(model, PROMPTS, OFFSETS), rtol=2e-5, atol=2e-5)
    for row, offset in enumerate(OFFSETS):
        begin = 6 - (offset or 0)
        assert torch.equal(found[row, :begin], base[row, :begin])
        assert ((found[row, begin:] - base[row, begin:]).abs().amax(dim=1) > 1e-3).all()
    assert torch.equal(model(input_ids=PROMPTS, alora_offsets=OFFSETS).logits.detach(), found)
    assert torch.equal(logits(model, alora_offsets=torch.tensor([4, 3, 0, 6])), found)
    assert torch.equal(logits(model, alora_offsets=[None] * 4), base)
    assert Live.count == 0


def test_padding_on_either_side():
    model = llama()
    alone = logits(model, PROMPTS[:1])
    pad = torch.zeros(1, 3, dtype=torch.int64)
    left = torch.cat([pad, PROMPTS[:1]], dim=1)
    right = torch.cat([PROMPTS[:1], pad], dim=1)
    mask = torch.cat([pad, torch.ones(1, 6, dtype=torch.int64)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, left, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    found = logits(model, right, attention_mask=mask.flip(1))[:, :6]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_any_model_of_token_ids():
    """Not transformers': the ids are the first argument."""
    model = with_adapter(tiny(), alora_invocation_tokens=CALL)
    batch = PROMPTS[:2]
    with torch.no_grad():
        found, base = model(batch), tiny()(batch)
    assert torch.equal(found[:, :2], base[:, :2])
    assert (found[:, 3:] - base[:, 3:]).abs().amax(-1).min() > 1e-3


def test_a_single_text_without_batch_is_not_three_dimensional():
    model = with_adapter(tiny(), alora_invocation_tokens=CALL)
    with pytest.raises(UnsupportedError, match=r"\(6, 8\), not \(samples, tokens, features\)"):
        model(PROMPTS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype):
    model = llama()
    wanted = logits(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = (model if dtype == torch.bfloat16 else copy.deepcopy(model).double())(input_ids=PROMPTS)
    close = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.logits.float(), wanted, rtol=close, atol=close)


def test_a_half_precision_base_is_the_base_before_the_invocation():
    model = with_adapter(
        tiny_llama().bfloat16(), target_modules="all-linear", alora_invocation_tokens=CALL
    ).eval()
    found, base = logits(model), logits(tiny_llama().bfloat16())
    assert next(registry_of(model).layers["model.layers.0.mlp.up_proj"].parameters_of("default")).dtype == (
        torch.float32
    )
    for row, offset in enumerate(OFFSETS):
        begin = 6 - (offset or 0)
        assert torch.equal(found[row, :begin], base[row, :begin])


def test_dropout_acts_inside_alone():
    model = llama(lora_dropout=0.5).train()
    torch.manual_seed(0)
    found, again = model(input_ids=PROMPTS).logits, model(input_ids=PROMPTS).logits
    base = base_logits()
    assert not torch.equal(found, again)
    for row, offset in enumerate(OFFSETS):
        assert torch.equal(found[row, : 6 - (offset or 0)], base[row, : 6 - (offset or 0)])


# ---- with other adapters --------------------------------------------------------------------------------


def several():
    """a: calls on 3, 4; b: calls on 7; plain: LoRA."""
    model = llama()
    another(model, "b", target_modules=["q_proj", "up_proj"], alora_invocation_tokens=[7], seed=5)
    another(model, "plain", target_modules="all-linear", seed=6)
    return model.eval()


def alone(model, name, row):
    if name == "__base__":
        return base_logits(PROMPTS[row : row + 1])[0]
    model.set_adapter(name)
    return logits(model, PROMPTS[row : row + 1])[0]


def test_each_sample_through_its_own():
    model = several()
    names = ["a", "b", "plain", "__base__"]
    for turn in range(4):
        order = names[turn:] + names[:turn]
        found = logits(model, adapter_names=order)
        for row, name in enumerate(order):
            torch.testing.assert_close(found[row], alone(model, name, row), rtol=2e-5, atol=2e-5)
    before = [1, 2, 3, 4]
    found = logits(model, adapter_names=["a", "plain", "b", "b"], alora_offsets=before)
    model.set_adapter("b")
    torch.testing.assert_close(found[3], logits(model, alora_offsets=before)[3], rtol=2e-5, atol=2e-5)


def test_one_for_the_call_and_several_at_once():
    model = several()
    wanted = {name: logits(model, adapter_names=name) for name in ("a", "b", "plain")}
    for name, found in wanted.items():
        model.set_adapter(name)
        assert torch.equal(logits(model), found)
        model.set_adapter("plain")
        with model.base_model.use_adapter(name):
            assert torch.equal(logits(model), found)
    layer = registry_of(model).layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 6, 16)
    model.base_model.set_adapter(["a", "b", "plain"])
    seen = []
    hook = layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    logits(model, PROMPTS[:1])
    hook.remove()
    x, y = seen[0]
    wanted = layer.base_layer(x)
    for name, begin in (("a", 2), ("b", 4), ("plain", 0)):
        A, B, _ = layer.stored(name)
        wanted[:, begin:] += layer.scaling[name] * (x[:, begin:] @ A.T @ B.T)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_disabled_nothing_is_looked_up():
    model = llama()
    base = base_logits()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(model, alora_offsets=OFFSETS), base)
        embeds = tiny_llama().get_input_embeddings()(PROMPTS)
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=embeds).logits, base)


def test_the_inner_model_acts_as_the_base():
    """Nothing tells it where the adapter would begin."""
    model = llama()
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(input_ids=PROMPTS).logits, base_logits())


def test_plain_lora_pays_nothing(monkeypatch):
    model = llama(alora_invocation_tokens=None)

    def fail(*_, **__):
        raise AssertionError("looked for an invocation")

    monkeypatch.setattr("lorakit.surgery.invoking", fail)
    logits(model)
    model.generate(input_ids=PROMPTS, max_new_tokens=1)


# ---- training -------------------------------------------------------------------------------------------


def gradients(model, prompts=PROMPTS, call=None, **kwargs):
    out = (call or model)(input_ids=prompts, labels=prompts, **kwargs)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def test_gradients_are_those_of_the_reference():
    """In fp64, against a sum that multiplies by a mask."""
    model = with_adapter(tiny(dtype=torch.float64), alora_invocation_tokens=CALL)
    weights = torch.randn(4, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch = PROMPTS
    (model(batch) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    mask = Activation(torch.tensor([offset or 0 for offset in OFFSETS])).mask(4, 6).unsqueeze(2)
    handles = []
    for layer in registry_of(model).layers.values():
        A, B, _ = layer.stored("default")

        def add(_, args, y, A=A, B=B, scaling=layer.scaling["default"]):
            return y + mask * scaling * (args[0] @ A.T @ B.T)

        handles.append(layer.base_layer.register_forward_hook(add))
    (model.get_base_model()(batch) * weights).sum().backward()
    for name, value in found.items():
        wanted = dict(model.named_parameters())[name].grad
        assert wanted.abs().max() > 0
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [[2], [2, 2]])
def test_without_an_invocation_gradients_are_zero(rows):
    found = gradients(llama().train(), PROMPTS[rows])
    assert all(value is not None and not value.any() for value in found.values())


@pytest.mark.parametrize("names", [None, ["a", "b", "plain", "__base__"]])
def test_gradient_checkpointing(names):
    """What runs again, in backward, begins where it began."""
    model = several().train()
    model.base_model.set_adapter(["a", "b", "plain"])
    kwargs = {} if names is None else {"adapter_names": names}
    wanted = gradients(model, **kwargs)
    assert any(value.any() for value in wanted.values())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(model, **kwargs)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=name)
    two = [model(input_ids=PROMPTS[rows], labels=PROMPTS[rows]).loss for rows in ([0], [1])]
    sum(two).backward()  # two calls before one backward
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    apart = [gradients(model, PROMPTS[rows]) for rows in ([0], [1])]
    for name, value in together.items():
        torch.testing.assert_close(value, apart[0][name] + apart[1][name], rtol=1e-5, atol=1e-7)


class Checkpointed(nn.Module):
    """Runs its blocks again by itself."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = tiny(), function

    def forward(self, ids):
        x = self.inner.embed(ids).requires_grad_()
        for layer in self.inner.layers:
            x = self.function(layer, x, use_reentrant=False)
        return self.inner.head(x)


def test_own_checkpointing_carries_the_call_where_it_is_told_to():
    found = []
    for function in (lambda layer, x, **_: layer(x), carrying(checkpoint)):
        model = with_adapter(Checkpointed(function), alora_invocation_tokens=CALL)
        model(PROMPTS).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_trainer(tmp_path):
    model = llama(r=2, lora_alpha=4)
    for layer in registry_of(model).layers.values():
        nn.init.zeros_(layer.stored("a").B.data)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(16):
        start = torch.randint(5, 11, (4,), generator=generator).tolist()
        row = [*start, *(CALL if number % 4 else [9, 9]), 6, 6]
        rows.append({"input_ids": row, "labels": [-100] * 6 + [6, 6]})
    args = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=0.1, report_to="none",
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=_stack)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    assert torch.equal(logits(model)[2], base_logits()[2])


def _stack(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


# ---- generate -------------------------------------------------------------------------------------------


def continued(model, prompts, offsets, count):
    """Greedy, by whole forwards without a cache; what is added belongs to the adapter."""
    offsets = list(offsets)
    for _ in range(count):
        nexts = logits(model, prompts, alora_offsets=offsets)[:, -1].argmax(-1)
        prompts = torch.cat([prompts, nexts[:, None]], dim=1)
        offsets = [None if offset is None else offset + 1 for offset in offsets]
    return prompts


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"alora_offsets": OFFSETS},
        {"adapter_names": ["a"] * 4},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*compile.*:UserWarning")
def test_generate(options):
    model = llama()
    wanted = continued(model, PROMPTS, OFFSETS, 5)
    assert torch.equal(model.generate(input_ids=PROMPTS, **GREEDY, **options), wanted)
    assert torch.equal(model.generate(PROMPTS, **GREEDY, **options), wanted)
    assert Live.count == 0


def test_generate_mixes_adapters():
    model = several()
    names = ["a", "b", "plain", "__base__"]
    found = model.generate(input_ids=PROMPTS, adapter_names=names, **GREEDY)
    for row, name in enumerate(names):
        prompt = PROMPTS[row : row + 1]
        if name == "__base__":
            wanted = tiny_llama().generate(input_ids=prompt, **GREEDY)
        else:
            model.set_adapter(name)
            wanted = model.generate(input_ids=prompt, **GREEDY)
        assert torch.equal(found[row : row + 1], wanted)


def test_generate_with_beams_and_several_sequences():
    model = llama()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(input_ids=PROMPTS, **options)
    assert found.shape == (8, 11)
    for row in range(4):
        wanted = model.generate(input_ids=PROMPTS[row : row + 1], **options)
        assert torch.equal(found[2 * row : 2 * row + 2], wanted)


@pytest.mark.parametrize("begin", [2, 1])
def test_the_cache_of_the_base_is_its_own(begin):
    """What the base computed before the invocation serves the adapter: the same keys and values, the same tokens."""
    model, base = llama(), tiny_llama()
    prompt = PROMPTS[:1]
    ours, theirs = DynamicCache(config=base.config), DynamicCache(config=base.config)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=ours)
        base(input_ids=prompt, past_key_values=theirs)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :2], other.keys[:, :, :2])
        assert torch.equal(mine.values[:, :, :2], other.values[:, :, :2])
        assert not torch.equal(mine.values[:, :, 2:], other.values[:, :, 2:])
    prefix = DynamicCache(config=base.config)
    with torch.no_grad():
        base(input_ids=prompt[:, :begin], past_key_values=prefix)
    wanted = continued(model, prompt, OFFSETS[:1], 5)
    kept = copy.deepcopy(prefix)
    assert torch.equal(
        model.generate(input_ids=prompt, past_key_values=prefix, alora_offsets=[4], **GREEDY), wanted
    )
    assert torch.equal(model.generate(input_ids=prompt, past_key_values=kept, **GREEDY), wanted)


def test_decoding_by_hand():
    """A later call has only the new tokens: where the adapter began must be said."""
    model = llama()
    cache = DynamicCache(config=model.config)
    wanted = logits(model, alora_offsets=OFFSETS)
    with torch.no_grad():
        model(input_ids=PROMPTS[:, :5], past_key_values=cache, alora_offsets=[3, 2, None, 5])
        kept = copy.deepcopy(cache)
        with pytest.raises(ConfigError, match="past_key_values"):
            model(input_ids=PROMPTS[:, 5:], past_key_values=cache)
        found = model(input_ids=PROMPTS[:, 5:], past_key_values=kept, alora_offsets=[1, 1, None, 1]).logits
    torch.testing.assert_close(found[:, 0], wanted[:, 5], rtol=1e-5, atol=1e-5)


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([1, 2], "got 2 for 4 samples"),
        ([1, 2, 3, -1], "wanted alora_offsets"),
        ([1, 2, 3, 1.5], "wanted alora_offsets"),
        ([1, 2, 3, True], "wanted alora_offsets"),
        ([], "wanted alora_offsets"),
    ],
)
def test_offsets_that_do_not_fit(offsets, said):
    model = llama()
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=said):
        model(input_ids=PROMPTS, alora_offsets=offsets)
    before.assert_same(model)
    assert Live.count == 0


def test_without_token_ids_it_must_be_said_where_to_begin():
    model = llama()
    embeds = tiny_llama().get_input_embeddings()(PROMPTS)
    for call in (model, model.generate):
        with pytest.raises(ConfigError, match="pass input_ids, or alora_offsets"):
            call(inputs_embeds=embeds)
    with torch.no_grad():
        found = model(inputs_embeds=embeds, alora_offsets=OFFSETS).logits
    torch.testing.assert_close(found, logits(model), rtol=1e-6, atol=1e-6)
    wanted = model.generate(input_ids=PROMPTS, **GREEDY)[:, 6:]
    for use_cache in (True, False):
        options = {**GREEDY, "use_cache": use_cache, "alora_offsets": OFFSETS}
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), wanted)
    float_model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(
        target_modules=["0"], alora_invocation_tokens=CALL
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="pass input_ids"):
        float_model(torch.randn(2, 3, 4))


def test_offsets_for_nobody():
    model = llama(alora_invocation_tokens=None)
    with pytest.raises(ConfigError, match="none of the adapters that act"):
        model(input_ids=PROMPTS, alora_offsets=OFFSETS)


def test_names_and_samples_that_do_not_fit():
    model = several()
    with pytest.raises(ConfigError, match="2 names for 4 samples"):
        model(input_ids=PROMPTS, adapter_names=["a", "b"])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}], ids=str)
@pytest.mark.parametrize("where", ["arguments", "config"])
def test_several_tokens_at_once_are_refused(options, where):
    model = llama()
    given = options
    if where == "config":
        given = {"generation_config": copy.deepcopy(model.generation_config)}
        given["generation_config"].update(**options)
    with pytest.raises(UnsupportedError, match="several tokens at once"):
        model.generate(input_ids=PROMPTS, **given)


def test_an_encoder_and_a_decoder_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    model = get_peft_model(t5, LoraConfig(target_modules=["q"], alora_invocation_tokens=CALL))
    with pytest.raises(UnsupportedError, match="an encoder and a decoder"):
        model(input_ids=PROMPTS, decoder_input_ids=PROMPTS)


@pytest.mark.parametrize("target", ["embed", "q_proj"])
def test_other_layers_are_refused_by_name(target):
    base = tiny()
    before = Snapshot(base)
    config = LoraConfig(target_modules=["embed", "q_proj"], alora_invocation_tokens=CALL)
    with pytest.raises(PlanError, match="embed: aLoRA is not defined on a embedding"):
        get_peft_model(base, config)
    before.assert_same(base)


def test_merging_is_refused_by_name():
    model = several()
    before = Snapshot(model)
    layer = registry_of(model).layers["model.layers.0.mlp.up_proj"]
    for call in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: layer.get_delta_weight("a"),
        lambda: model.base_model.add_weighted_adapter(["a", "plain"], [1.0, 1.0], "c", "cat"),
    ):
        with pytest.raises(UnsupportedError, match="no weight does"):
            call()
        before.assert_same(model)


def test_two_kinds_of_adapter_are_refused():
    config = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=CALL, velora_config={})
    with pytest.raises(UnsupportedError, match=r"alora_invocation_tokens.*velora_config"):
        get_peft_model(tiny(), config)


# ---- files, copies, threads, compile --------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = llama(name="default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].alora_invocation_tokens == CALL
    assert torch.equal(logits(loaded), logits(model))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(made), logits(model))
        randomise(made, "default", 9)
        assert not torch.equal(logits(made), logits(model))


def test_deleted_it_is_gone():
    model = several()
    model.set_adapter("plain")
    wanted = logits(model)
    model.delete_adapter("a")
    assert torch.equal(logits(model), wanted)
    assert all("a" not in layer.variants for layer in registry_of(model).layers.values())


def test_threads_do_not_see_each_other():
    model = several()
    turns = [("a", PROMPTS), ("b", PROMPTS.flip(0)), ("plain", PROMPTS), ("a", PROMPTS[1:3])] * 6
    wanted = [logits(model, prompts, adapter_names=name) for name, prompts in turns]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda turn: logits(model, turn[1], adapter_names=turn[0]), turns))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert Live.count == 0


# said by torch where a graph is broken
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled():
    """What the call carries breaks the graph; what comes out is the same."""
    torch._dynamo.reset()
    model = with_adapter(tiny(), alora_invocation_tokens=CALL)
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (PROMPTS, PROMPTS.flip(0), PROMPTS[2:]):
        wanted = model(batch)
        found = compiled(batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        row = batch.tolist().index(PROMPTS[2].tolist())
        torch.testing.assert_close(found[row], tiny()(batch)[row], rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_other_tasks():
    model = with_adapter(
        tiny_bert(), target_modules=["value"], alora_invocation_tokens=CALL, task_type="SEQ_CLS"
    )
    model.eval()
    with torch.no_grad():
        found, base = model(input_ids=PROMPTS).logits, model.get_base_model()(input_ids=PROMPTS).logits
    assert torch.equal(found[2], base[2])
    assert (found - base)[[0, 1, 3]].abs().amax(1).min() > 1e-4
