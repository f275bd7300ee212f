"""The optimizers that know adapters, in transformers' `Trainer`: it makes the schedule, they make the steps."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lorakit
from integration.test_trainer import adapted, losses_of, rows_for, state_of

MAKE = {
    "LoRA+": lambda model: lorakit.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0
    ),
    "LoRA-FA": lambda model: lorakit.create_lorafa_optimizer(model, 8, 8, lr=1e-2),
}


def trained(model, optimizer, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True, logging_steps=1, **{"max_steps": 24, "save_strategy": "no"} | options,
    )  # fmt: skip
    kind = model.get_base_model().config.model_type
    return Trainer(model=model, args=arguments, train_dataset=rows_for(kind), optimizers=(optimizer, None))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_loss_falls_and_what_should_stays(make, kind, tmp_path):
    model = adapted(kind)
    before = state_of(model)
    optimizer = make(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = trained(model, optimizer, tmp_path)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < 0.9 * losses[0]
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])} == trainable
    assert any(".lora_A." in name for name in trainable) == (type(optimizer) is torch.optim.AdamW)


def test_the_schedule_keeps_the_ratio(tmp_path):
    model = adapted("llama")
    optimizer = MAKE["LoRA+"](model)
    seen = []
    optimizer.register_step_post_hook(lambda it, *_: seen.append([g["lr"] for g in it.param_groups]))
    trained(model, optimizer, tmp_path, max_steps=4, lr_scheduler_type="linear").train()
    assert [round(rates[0] / 2e-3, 3) for rates in seen] == [1.0, 0.75, 0.5, 0.25]
    assert all(rates[2] == pytest.approx(8 * rates[0]) for rates in seen)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_checkpoint_is_resumed_to_equal_parameters(make, tmp_path):
    def begun(folder):
        model = adapted("llama")
        return model, trained(model, make(model), folder, max_steps=8, save_strategy="steps", save_steps=4)

    whole, trainer = begun(tmp_path)
    trainer.train()
    resumed, again = begun(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
