"""`AdapterTrainerMixin` before transformers' `Trainer`: checkpoints of the adapter alone, for every base and adapter."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

import lorakit
from integration.test_trainer import adapted, losses_of, rows_for, state_of, trainer_for
from lorakit.errors import AdapterNameError, KeyMismatchError
from parity.models import VOCABULARY, adapter_parameters
from words import save_llama, tokenizer

torch.set_num_threads(1)
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


class AdapterTrainer(lorakit.AdapterTrainerMixin, Trainer):
    pass


def llama(*, tied=False, **config):
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return lorakit.get_peft_model(LlamaForCausalLM(shape), lorakit.LoraConfig(**LORA | config))


def with_two_adapters():
    model = llama()
    model.add_adapter("second", lorakit.LoraConfig(**LORA, r=2))
    model.set_adapter("second")
    return model


BEST = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
    "metric_for_best_model": "eval_loss", "greater_is_better": True,
}  # fmt: skip
MAKE = {
    "classifier": lambda: adapted("bert"),
    "without a task": lambda: adapted("llama", task=None),
    "tied weights": lambda: llama(tied=True),
    "taken off the base": lambda: llama(init_lora_weights="pissa"),
    "magnitudes": lambda: llama(use_dora=True),
    "two adapters": with_two_adapters,
}
EACH = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def rows_of(model):
    return rows_for("bert" if model.get_base_model().config.model_type == "bert" else "llama")


@EACH
def test_a_checkpoint_has_no_base_and_is_resumed_to_equal_parameters(make, tmp_path):
    whole = make()
    trainer_for(whole, rows_of(whole), tmp_path, AdapterTrainer).train()
    halfway = tmp_path / "checkpoint-4"
    assert not (halfway / "model.safetensors").exists()
    written = sum(path.stat().st_size for path in halfway.rglob("*adapter*.safetensors"))
    assert written < 4 * sum(tensor.nbytes for tensor in adapter_parameters(whole).values()) + 20_000
    resumed = make()
    again = trainer_for(resumed, rows_of(resumed), tmp_path / "again", AdapterTrainer)
    again.train(resume_from_checkpoint=str(halfway))
    assert again.state.global_step == 8
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@EACH
def test_the_best_model_is_loaded_at_the_end(make, tmp_path):
    """Best is the highest loss here, so that it is not the last."""
    model = make()
    trainer = trainer_for(model, rows_of(model), tmp_path, AdapterTrainer, **BEST)
    trainer.train()
    losses = {
        entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    best = max(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert losses[best] > losses[8]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_trainer_by_itself_loads_the_best_model_too(kind, tmp_path):
    model = adapted(kind)
    trainer = trainer_for(model, rows_for(kind), tmp_path, **BEST)
    trainer.train()
    losses = {
        entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses.values()), rel=1e-5)


def test_a_checkpoint_is_an_adapter_like_any_other(tmp_path):
    model = llama(tied=True, init_lora_weights="olora")
    trainer = trainer_for(model, rows_of(model), tmp_path, AdapterTrainer)
    trainer.processing_class = tokenizer()
    trainer.train()
    assert (tmp_path / "checkpoint-8" / "tokenizer_config.json").exists()
    fresh = lorakit.PeftModel.from_pretrained(llama(tied=True).unload(), tmp_path / "checkpoint-8")
    ids = torch.stack([row["input_ids"] for row in rows_of(model)])
    with torch.no_grad():
        difference = fresh(input_ids=ids).logits - model.eval()(input_ids=ids).logits
    assert difference.abs().max() < 1e-4


def test_a_model_that_adapters_were_injected_into_is_trained(tmp_path):
    model = llama(tied=True)
    inner = model.get_base_model()
    trainer = trainer_for(inner, rows_of(model), tmp_path, AdapterTrainer, max_steps=24)
    trainer.train()
    assert losses_of(trainer)[-1] < 0.97 * losses_of(trainer)[0]
    model.save_pretrained(tmp_path / "adapter")
    saved, checkpoint = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "checkpoint-24")
    )
    assert saved.keys() == checkpoint.keys()
    assert all(torch.equal(saved[key], checkpoint[key]) for key in saved)
    again = llama(tied=True).get_base_model()
    resumed = trainer_for(again, rows_of(model), tmp_path / "again", AdapterTrainer, max_steps=24)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, inner.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_quantised_base_is_trained(tmp_path):
    save_llama(tmp_path / "base", width=64)
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=scheme, device_map="cpu"
    )
    model = lorakit.get_peft_model(lorakit.prepare_model_for_kbit_training(base), lorakit.LoraConfig(**LORA))
    rows = [
        {name: tensor % 16 if name != "attention_mask" else tensor for name, tensor in row.items()}
        for row in rows_for("llama")
    ]
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(model, rows, tmp_path / "out")
    trainer = trainer_for(model, rows, tmp_path / "out", AdapterTrainer)
    trainer.train()
    assert losses_of(trainer)[-1] < 0.9 * losses_of(trainer)[0]
    assert (tmp_path / "out" / "checkpoint-8" / "adapter_model.safetensors").exists()


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterNameError, match="LlamaForCausalLM carries no adapter"):
        trainer_for(llama().unload(), rows_for("llama"), tmp_path, AdapterTrainer)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(init, tmp_path):
    model = llama(init_lora_weights=init)
    trainer_for(model, rows_of(model), tmp_path, AdapterTrainer).train()
    other = llama(init_lora_weights=init, target_modules=["q_proj"])
    before = state_of(other)
    trainer = trainer_for(other, rows_of(model), tmp_path / "other", AdapterTrainer)
    with pytest.raises(KeyMismatchError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("what", ["adapter", "optimizer", "state"])
def test_a_full_disk_leaves_the_checkpoints_before(what, tmp_path, monkeypatch):
    model = llama()
    trainer = trainer_for(model, rows_of(model), tmp_path, AdapterTrainer, save_total_limit=1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    def torn(self, path):
        Path(path).write_text('{"epoch": ')
        full()

    def full_in_torch(*_args, **_kwargs):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
        )

    def spoil(*_args, **_kwargs):
        if trainer.state.global_step == 5:  # after the first checkpoint
            monkeypatch.setattr("lorakit.checkpoint.atomic.os.write", full) if what == "adapter" else None
            monkeypatch.setattr(
                "transformers.trainer.torch.save", full_in_torch
            ) if what == "optimizer" else None
            monkeypatch.setattr(type(trainer.state), "save_to_json", torn) if what == "state" else None

    monkeypatch.setattr(
        trainer.callback_handler, "on_step_end", with_first(trainer.callback_handler.on_step_end, spoil)
    )
    with pytest.raises(
        OSError, match="the checkpoints before it are whole, and the run can go on from them"
    ) as caught:
        trainer.train()
    assert caught.value.filename == str(tmp_path / "checkpoint-8")
    assert caught.value.errno in {errno.ENOSPC, errno.EIO}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def with_first(call, first):
    def both(*args, **kwargs):
        first()
        return call(*args, **kwargs)

    return both
