"""Replicated layers have the names, the numbers and the files of PEFT's.

PEFT finds the layers of Llama-like models, of BERT, and of bare models that keep them in `h`; lorakit also those of
GPT2LMHeadModel, FalconForCausalLM and others (tests/unit/surgery/test_replication.py). PEFT merges into layers whose
copies share the weight (0.005 off on these logits, without a word); lorakit refuses.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorakit
from parity.models import NAMED_WARNINGS, VOCABULARY, build, copy_trained, output_of, peft, randomize

pytestmark = NAMED_WARNINGS


def _bare(kind, **config):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **config
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


MODELS = {
    "llama": lambda: build("llama"),
    "bert": lambda: build("bert"),
    "falcon": lambda: _bare("Falcon", new_decoder_architecture=False),
    "gpt2": lambda: _bare("GPT2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [[1, 2], [0, 1], [0, 2]]}),
    ("llama", {"target_modules": ["q_proj"], "layer_replication": [[1, 2]]}),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "layer_replication": [[0, 2], [0, 2]],
            "rank_pattern": {"layers.3.self_attn.q_proj": 2},
        },
    ),
    (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layer_replication": [[0, 2], [0, 2]]},
    ),
    ("bert", {"target_modules": ["query"], "layer_replication": [[0, 2], [0, 2]], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query"], "layer_replication": [[0, 2], [0, 1]], "bias": "all"}),
    ("bert", {"target_modules": ["query"], "layer_replication": [[0, 2], [0, 1]], "bias": "lora_only"}),
    ("falcon", {"target_modules": ["query_key_value"], "layer_replication": [[0, 2], [1, 2]]}),
    (
        "gpt2",
        {"target_modules": ["c_attn"], "layer_replication": [[0, 1], [0, 2]], "fan_in_fan_out": True},
    ),
]


def outputs(model, kind):
    if kind in {"llama", "bert"}:
        return output_of(model, kind)
    ids = torch.arange(3, 13).reshape(2, 5)
    return model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=lambda value: str(value)[:90])
def test_names_numbers_and_files(kind, fields, tmp_path):
    theirs = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**fields)).eval()
    randomize(theirs)
    ours = lorakit.get_peft_model(MODELS[kind](), lorakit.LoraConfig(**fields)).eval()
    copy_trained(theirs, ours)
    wanted = outputs(theirs, kind)
    torch.testing.assert_close(outputs(ours, kind), wanted, rtol=1e-6, atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    configs = [model.get_base_model().config for model in (ours, theirs)]
    assert configs[0].num_hidden_layers == configs[1].num_hidden_layers
    for model in (ours, theirs):
        outputs(model, kind).square().mean().backward()
    gradients = [
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)
    ]
    for name, gradient in gradients[1].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-5, atol=1e-7)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder)
    mine, other = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")
    )
    # of a bias that copies share, PEFT writes every name, lorakit one
    assert mine.keys() <= other.keys()
    assert all(key.endswith(".bias") for key in other.keys() - mine.keys())
    assert all(torch.equal(tensor, other[key]) for key, tensor in mine.items())
    for library, folder in ((lorakit, "theirs"), (peft, "ours")):
        loaded = library.PeftModel.from_pretrained(MODELS[kind](), tmp_path / folder)
        torch.testing.assert_close(outputs(loaded, kind), wanted, rtol=1e-6, atol=1e-6)
