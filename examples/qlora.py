"""QLoRA on a CPU in half a minute: a tiny Llama in 4 bits, trained through fp32 adapters, saved and loaded again.

Dettmers et al., 2023, arXiv:2305.14314. Needs `pip install lorakit[transformers] bitsandbytes`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

WORDS, TOKENS, BATCH, STEPS = 64, 32, 8, 80
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def save_base(folder: Path) -> None:
    """Write a small Llama in bf16 with random weights, in the place of a model from the hub."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        initializer_range=0.1,  # random weights as large as trained ones
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load_base(folder: Path) -> torch.nn.Module:
    """The model in 4 bits: every linear layer but the head."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BITS, device_map="cpu")


def batch(generator: torch.Generator) -> torch.Tensor:
    """Sequences (BATCH, TOKENS) that count upwards in steps of 3, each from its own start."""
    start = torch.randint(WORDS, (BATCH, 1), generator=generator)
    return (start + 3 * torch.arange(TOKENS)) % WORDS


def main() -> tuple[float, float]:
    """Train, save, load, compare; gives the loss before and after."""
    with tempfile.TemporaryDirectory() as name:
        base, adapter = Path(name, "base"), Path(name, "adapter")
        save_base(base)

        model = prepare_model_for_kbit_training(load_base(base))
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        model.print_trainable_parameters()

        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        model.train()
        for step in range(STEPS):
            ids = batch(generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % 20 == 0 or step == STEPS - 1:
                print(f"step {step:3d}  loss {loss.item():.3f}")

        model.eval()
        model.save_pretrained(adapter)
        fresh = prepare_model_for_kbit_training(load_base(base), use_gradient_checkpointing=False)
        again = PeftModel.from_pretrained(fresh, adapter)
        with torch.no_grad():
            ids = batch(generator)
            difference = (again(ids).logits - model(ids).logits).abs().max().item()
        print(f"largest difference of the logits after loading: {difference:g}")
        assert difference == 0.0
        return losses[0], losses[-1]


if __name__ == "__main__":
    main()
