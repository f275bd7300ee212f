"""`estimate` against what a real step allocates, a real adapter has, and a real optimizer keeps."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import lorakit
from lorakit.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    PlanError,
    UnsupportedError,
)
from lorakit.estimating.states import STATES, state_bytes

SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TASKS = {"bert": "SEQ_CLS"}
BATCH, SEQ = 2, 128


def config_of(kind, **changes):
    return AutoConfig.for_model(kind, **SIZES | changes)


def adapter(kind="llama", **changes):
    fields = {"r": 8, "target_modules": "all-linear", "task_type": TASKS.get(kind, "CAUSAL_LM")}
    return lorakit.LoraConfig(**fields | changes)


def real(kind, lora, dtype=torch.float32):
    auto = AutoModelForSequenceClassification if kind in TASKS else AutoModelForCausalLM
    return lorakit.get_peft_model(auto.from_config(config_of(kind), dtype=dtype), lora).train()


def inputs(kind):
    ids = torch.randint(3, 500, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.zeros(BATCH, dtype=torch.long) if kind in TASKS else ids}


def allocated_at_most(model, batch):
    """The highest sum of allocations less releases that torch's CPU allocator sees in one step."""
    model(**batch).loss.backward()  # what is made once is there
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(**batch).loss.backward()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def held_by(model):
    """Bytes of parameters and buffers, with the scales of quantised ones."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    scales = [state.absmax.nbytes for state in states if state is not None]
    scales += [
        state.state2.absmax.nbytes for state in states if state is not None and state.state2 is not None
    ]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + sum(scales)


def check(found, model, kind):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert found.trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert found.gradients == sum(parameter.nbytes for parameter in trained)
    assert found.weights + found.adapter == held_by(model)
    # gradients come one by one, and are in the peak as far as they are there
    peak = allocated_at_most(model, inputs(kind))
    assert found.activations + found.logits == pytest.approx(peak, rel=0.08)
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
    assert found.total == sum(getattr(found, part) for part in parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_parts_are_those_of_a_real_step(kind, checkpointing, dtype):
    lora = adapter(kind)
    found = lorakit.estimate(
        config_of(kind), lora, batch=BATCH, seq=SEQ, dtype=dtype, gradient_checkpointing=checkpointing
    )
    model = real(kind, lora, getattr(torch, dtype))
    if checkpointing:
        model.gradient_checkpointing_enable()
    check(found, model, kind)


def test_parts_of_adapters_on_experts():
    lora = adapter(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    config = config_of("mixtral", num_local_experts=4)
    found = lorakit.estimate(config, lora, batch=BATCH, seq=SEQ, dtype="float32")
    check(found, lorakit.get_peft_model(AutoModelForCausalLM.from_config(config), lora).train(), "llama")


def test_parts_of_an_encoder_without_a_loss():
    lora = adapter(task_type="FEATURE_EXTRACTION")
    found = lorakit.estimate(config_of("bert"), lora, batch=BATCH, seq=SEQ, dtype="float32")
    model = lorakit.get_peft_model(AutoModel.from_config(config_of("bert")), lora).train()
    batch = inputs("llama")
    step = SimpleNamespace(loss=None)

    def run(input_ids, **_):
        step.loss = model(input_ids=input_ids)[0].mean()
        return step

    run.zero_grad = model.zero_grad
    assert found.activations == pytest.approx(allocated_at_most(run, batch), rel=0.08)
    assert found.logits == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"velora_config": {"num_groups": 8}},
    ],
)
def test_parts_of_other_adapters(changes):
    lora = adapter(**changes)
    found = lorakit.estimate(config_of("llama"), lora, batch=BATCH, seq=SEQ, dtype=torch.float32)
    check(found, real("llama", lora), "llama")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_parts_on_a_base_in_four_bits(tmp_path, double, checkpointing):
    AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    lora = adapter()
    found = lorakit.estimate(
        tmp_path,
        lora,
        batch=BATCH,
        seq=SEQ,
        quantization="nf4_double" if double else "nf4",
        gradient_checkpointing=checkpointing,
    )
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=options)
    base = lorakit.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    check(found, lorakit.get_peft_model(base, lora).train(), "llama")


def test_four_bits_take_the_layers_that_transformers_takes(tmp_path):
    for kind in ("gpt2", "bert"):
        auto = AutoModelForSequenceClassification if kind in TASKS else AutoModelForCausalLM
        auto.from_config(config_of(kind), dtype=torch.bfloat16).save_pretrained(tmp_path / kind)
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = auto.from_pretrained(tmp_path / kind, dtype=torch.bfloat16, quantization_config=options)
        base = lorakit.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        found = lorakit.estimate(tmp_path / kind, adapter(kind), batch=1, seq=16, quantization="nf4")
        assert found.weights == held_by(base), kind


def test_the_file_is_as_large_as_told(tmp_path):
    lora = adapter()
    found = lorakit.estimate(config_of("llama"), lora, seq=16, dtype="float32")
    real("llama", lora).save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.adapter_bytes < size < found.adapter_bytes + 12_000  # the header


def test_a_larger_step_takes_more_and_checkpointing_less():
    def rest(**options):
        return lorakit.estimate(config_of("llama"), adapter(), dtype="float32", **options).activations

    assert rest(seq=256) == pytest.approx(2 * rest(seq=128), rel=0.01)
    assert rest(seq=128, batch=2) == pytest.approx(2 * rest(seq=128), rel=0.01)
    assert rest(seq=128, gradient_checkpointing=True) < 0.6 * rest(seq=128)


def test_a_model_is_described_and_not_touched():
    model = AutoModelForCausalLM.from_config(config_of("llama", use_cache=True))
    names = [name for name, _ in model.named_parameters()]
    found = lorakit.estimate(model, adapter(), seq=16)
    assert found.model == "LlamaForCausalLM"
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config.use_cache is True


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gemma2", "mamba", "opt", "bloom", "modernbert"])
def test_many_architectures_run_without_numbers(kind):
    task = "SEQ_CLS" if kind == "modernbert" else "CAUSAL_LM"
    found = lorakit.estimate(config_of(kind), adapter(task_type=task), seq=32, dtype="float32")
    assert found.activations > 0


def test_schemes_that_take_their_beginning_off_the_base_hold_it():
    plain = lorakit.estimate(config_of("llama"), adapter(), seq=16)
    pissa = lorakit.estimate(config_of("llama"), adapter(init_lora_weights="pissa"), seq=16)
    assert pissa.adapter == 2 * plain.adapter
    assert "where the adapter began" in pissa.notes[0]
    dropping = lorakit.estimate(config_of("llama"), adapter(lora_dropout=0.1), seq=16)
    assert dropping.activations == plain.activations
    assert dropping.notes


def optimizers():
    import bitsandbytes
    from transformers.optimization import Adafactor

    return {
        "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD,
        "sgd_momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
        "adamw_8bit": bitsandbytes.optim.AdamW8bit, "lion": bitsandbytes.optim.Lion,
        "adafactor": lambda parameters, lr: Adafactor(parameters, lr=lr, relative_step=False),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(STATES))
def test_optimizers_keep_what_is_told(name):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 96), (8, 16), (100,))]
    optimizer = optimizers()[name](parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and not key.startswith("qmap")  # one for all
    )
    assert state_bytes(name, parameters) == kept


REFUSED = {
    "batch": ({"batch": 0}, ConfigError, "batch: got 0"),
    "seq": ({"seq": -1}, ConfigError, "seq: got -1"),
    "dtype": ({"dtype": "int8"}, ConfigError, "dtype: got 'int8', wanted one of float32"),
    "torch dtype": ({"dtype": torch.int8}, ConfigError, "dtype: got torch.int8"),
    "optimizer": ({"optimizer": "adam"}, ConfigError, "optimizer: got 'adam', wanted one of 'adamw'"),
    "quantization": ({"quantization": "int8"}, ConfigError, "quantization: got 'int8'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_mean_nothing_are_refused(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        lorakit.estimate(config_of("llama"), adapter(), **options)


def test_models_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="no such folder"):
        lorakit.estimate("./nowhere", adapter())
    with pytest.raises(AdapterNotFoundError, match=r"no config\.json in it"):
        lorakit.estimate(tmp_path, adapter())
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(AdapterFormatError, match="its config cannot be read"):
        lorakit.estimate(tmp_path, adapter())
    with pytest.raises(UnsupportedError, match="has no transformers config"):
        lorakit.estimate(torch.nn.Linear(2, 2), adapter())
    with pytest.raises(ConfigError, match="expected a LoraConfig, got dict"):
        lorakit.estimate(config_of("llama"), {})
    with pytest.raises(ConfigError, match="no CAUSAL_LM model can be made"):
        lorakit.estimate(config_of("vit"), adapter(task_type="CAUSAL_LM"))
    with pytest.raises(PlanError, match="nonesuch"):
        lorakit.estimate(config_of("llama"), adapter(target_modules=["nonesuch"]))
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .*does not support"):
        lorakit.estimate(config_of("albert"), adapter(task_type="SEQ_CLS"), gradient_checkpointing=True)


def test_a_model_that_needs_numbers_is_refused():
    config = config_of("deberta-v2", relative_attention=True, position_biased_input=False)
    with pytest.raises(UnsupportedError, match="cannot be run without numbers"):
        lorakit.estimate(config, adapter("bert"))
