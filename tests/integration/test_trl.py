"""TRL's `SFTTrainer` with our adapters. It replaces the forward of the model that it is given, so it is given the base."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from words import save_llama

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
ROWS = {
    "text": [{"text": f"a {word} {word} yes"} for word in "bcdef"] * 4,
    "completions": [{"prompt": f"a {word} ", "completion": f"{word} yes"} for word in "bcdef"] * 4,
    "messages": [
        {"messages": [{"role": "user", "content": f"a {word}"}, {"role": "assistant", "content": word}]}
        for word in "bcdef"
    ]
    * 4,
}


class SFTTrainer(lorakit.AdapterTrainerMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base"), width=64, tie=True)


def adapted(base):
    torch.manual_seed(0)
    config = lorakit.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    return lorakit.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


def trainer_for(model, base, kind, folder):
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=20, save_steps=10, logging_steps=5, learning_rate=1e-2, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, per_device_train_batch_size=4, gradient_checkpointing=True,
        eval_strategy="steps", eval_steps=10, load_best_model_at_end=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(ROWS[kind])
    return SFTTrainer(
        model=model.get_base_model(), args=arguments, train_dataset=rows, eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_it_trains_saves_the_adapter_alone_and_goes_on(base, kind, tmp_path):
    whole = adapted(base)
    trainer = trainer_for(whole, base, kind, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = tmp_path / "checkpoint-10"
    assert not (checkpoint / "model.safetensors").exists()
    assert all(".lora_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = adapted(base)
    trainer_for(resumed, base, kind, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    fresh = lorakit.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "checkpoint-20"
    )
    ids = torch.arange(8)[None]
    with torch.no_grad():  # `whole`'s own forward was replaced, its layers were not
        hidden = whole.get_base_model().eval().model(ids).last_hidden_state
        assert torch.equal(fresh.get_base_model().model(ids).last_hidden_state, hidden)
