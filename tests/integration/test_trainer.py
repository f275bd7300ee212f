"""The transformers `Trainer` trains a `PeftModel` like any other model.

Trainer does not know the class, so a checkpoint folder holds what it writes for any module: `model.safetensors` (the
whole state dict, base weights included, under `base_model.model.`), `optimizer.pt` (the state of the trained
parameters alone), `scheduler.pt`, `rng_state.pth`, `trainer_state.json` and `training_args.bin`. There is no
`adapter_config.json`: the adapter itself is written by `model.save_pretrained`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import lorakit
from parity.models import VOCABULARY, adapter_parameters, build

TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}
EACH = pytest.mark.parametrize("kind", ["bert", "llama"])
CHECKPOINT = {
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
}  # fmt: skip


def rows_for(kind):
    """Texts whose first token tells their label; a language model repeats it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(16):
        ids = torch.randint(10, VOCABULARY, (8,), generator=generator)
        if kind == "bert":
            ids[:] = 3 + index % 3
            labels = torch.tensor(index % 3)
        else:
            ids[:] = 3 + index % 2
            labels = ids
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def adapted(kind, task="by kind"):
    torch.manual_seed(0)
    config = lorakit.LoraConfig(
        task_type=TASKS[kind] if task == "by kind" else task,
        target_modules="all-linear",
        fan_in_fan_out=kind == "gpt2",
    )
    return lorakit.get_peft_model(build(kind), config)


def trainer_for(model, rows, folder, kind=Trainer, **options):
    chosen = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-2} | options
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, **chosen,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def names_seen_by(model):
    """A set that fills with the names of the arguments that reach the base model."""
    seen = set()
    model.get_base_model().register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    return seen


@EACH
def test_the_loss_falls_and_only_the_adapter_changes(kind, tmp_path):
    model = adapted(kind)
    before, trained = state_of(model), set(adapter_parameters(model))
    seen = names_seen_by(model)
    trainer = trainer_for(model, rows_for(kind), tmp_path, max_steps=24, save_strategy="no")
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.9 * losses[0]
    assert {"input_ids", "attention_mask", "labels"} <= seen
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


@EACH
def test_a_checkpoint_is_resumed_to_equal_parameters(kind, tmp_path):
    whole = adapted(kind)
    trainer_for(whole, rows_for(kind), tmp_path).train()
    halfway = tmp_path / "checkpoint-4"
    assert {path.name for path in halfway.iterdir()} == CHECKPOINT
    assert load_file(halfway / "model.safetensors").keys() == whole.state_dict().keys()
    resumed = adapted(kind)
    again = trainer_for(resumed, rows_for(kind), tmp_path / "again")
    again.train(resume_from_checkpoint=str(halfway))
    assert again.state.global_step == 8
    assert not (tmp_path / "again" / "checkpoint-4").exists()  # it went on, it did not begin afresh
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@EACH
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_losses(kind, tmp_path):
    losses = []
    for checkpointing in (False, True):
        model = adapted(kind)
        trainer = trainer_for(
            model, rows_for(kind), tmp_path, gradient_checkpointing=checkpointing, save_strategy="no"
        )
        trainer.train()
        asked = [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
        assert any(asked) == checkpointing
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@EACH
def test_the_trained_adapter_is_saved_and_loaded(kind, tmp_path):
    model = adapted(kind)
    rows = rows_for(kind)
    trainer_for(model, rows, tmp_path, save_strategy="no").train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = lorakit.PeftModel.from_pretrained(build(kind), tmp_path / "adapter")
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_columns_that_the_base_takes_are_kept(tmp_path):
    """Pairs of sentences need token_type_ids; a column that no model takes is dropped."""
    model = adapted("bert")
    rows = [row | {"token_type_ids": torch.ones(8, dtype=torch.long), "junk": 1} for row in rows_for("bert")]
    seen = names_seen_by(model)
    trainer_for(model, rows, tmp_path, max_steps=1, save_strategy="no").train()
    assert "junk" not in seen
    assert "token_type_ids" in seen


def test_a_model_without_a_task_type_is_trained(tmp_path):
    """Its `forward` takes whatever the base takes, so Trainer must be told to keep the columns."""
    model = adapted("llama", task=None)
    seen = names_seen_by(model)
    options = {"max_steps": 1, "save_strategy": "no", "remove_unused_columns": False}
    trainer_for(model, rows_for("llama"), tmp_path, **options).train()
    assert {"input_ids", "attention_mask", "labels"} <= seen
