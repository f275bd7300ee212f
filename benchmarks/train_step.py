"""One training step of a small Llama: lorakit against PEFT and against the floor.

The floor is the frozen base without adapters, with gradients to its inputs only. Before timing, both sides get
the same weights and must agree on loss and gradients. Compiled models must compile in one graph, without compiling
again; that takes minutes, so a quick run leaves them out. Run: python -m benchmarks.train_step [--quick]
"""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from benchmarks.timing import Row, interleave, keeps, save

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 2048


class Size(NamedTuple):
    """A small Llama and its batch."""

    hidden: int
    ffn: int
    layers: int
    sequence: int
    batch: int = 2


FULL, QUICK = Size(1024, 2816, 4, 512), Size(512, 1408, 2, 128)
COMPILED = Size(1024, 2816, 2, 512)
SMALL = Size(256, 704, 2, 64)
"""For bf16 on a CPU without bf16 arithmetic, where one product of the full size takes seconds."""


def base_model(dtype: torch.dtype, size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def copy_adapter(source: nn.Module, target: nn.Module) -> None:
    """Give both sides the same, non-zero adapter."""
    torch.manual_seed(1)
    theirs = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
                theirs[name].copy_(parameter)


def _called(model: nn.Module, call: Callable[..., Any] | None) -> Callable[..., Any]:
    return model if call is None else call


def step(
    model: nn.Module, ids: torch.Tensor, call: Callable[..., Any] | None = None
) -> Callable[[], torch.Tensor]:
    """Forward and backward; the gradients are dropped as an optimizer's zero_grad would.

    `call` is what calls the model, where that is not the model itself.
    """
    embed, forward = model.get_input_embeddings(), _called(model, call)

    def run() -> torch.Tensor:
        inputs = embed(ids).detach().requires_grad_()
        loss = forward(inputs_embeds=inputs, labels=ids).loss
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.detach()

    return run


def saved_bytes(model: nn.Module, ids: torch.Tensor, call: Callable[..., Any] | None = None) -> int:
    """Bytes that autograd keeps for backward, each storage once, without parameters; `call` as in `step`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _called(model, call)(inputs_embeds=inputs, labels=ids).loss
    del loss
    return sum(kept.values())


def gradients(
    model: nn.Module, ids: torch.Tensor, call: Callable[..., Any] | None = None
) -> dict[str, torch.Tensor]:
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    _called(model, call)(inputs_embeds=inputs, labels=ids).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def check_agreement(ours: nn.Module, theirs: nn.Module, ids: torch.Tensor, tolerance: float) -> float:
    """Largest relative difference of a gradient; refuses to time two sides that compute different things."""
    return difference(gradients(ours, ids), gradients(theirs, ids), tolerance)


def difference(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> float:
    """The largest relative one of two sets of gradients, which must be no more than the tolerance."""
    assert mine.keys() == other.keys()
    worst = max(((mine[name] - other[name]).norm() / other[name].norm()).item() for name in mine)
    assert worst <= tolerance, f"gradients differ by {worst:.2e}"
    return worst


def keeping_all(model: LlamaForCausalLM) -> None:
    """The step as it is: backward finds what forward kept."""


def checkpointed(model: LlamaForCausalLM) -> None:
    """Each block keeps its input only and runs again in backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


class Case(NamedTuple):
    """One row of the table."""

    name: str
    dtype: torch.dtype
    dropout: float
    autocast_adapters: bool = True
    prepare: Callable[[LlamaForCausalLM], None] = keeping_all


def sides(case: Case, size: Size) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """Both sides with equal adapters and the frozen base, and a batch."""
    _, dtype, dropout, autocast_adapters, prepare = case
    frozen = base_model(dtype, size)
    frozen.requires_grad_(False)
    prepare(frozen)
    arguments = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": dropout,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    ours = lorakit.get_peft_model(
        copy.deepcopy(frozen), lorakit.LoraConfig(**arguments), autocast_adapter_dtype=autocast_adapters
    )
    theirs = peft.get_peft_model(
        copy.deepcopy(frozen), peft.LoraConfig(**arguments), autocast_adapter_dtype=autocast_adapters
    )
    copy_adapter(ours, theirs)
    shape = (size.batch, size.sequence)
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    return {"lorakit": ours, "PEFT": theirs, "frozen": frozen}, ids


def compare(name: str, case: Case, *, size: Size, rounds: int) -> tuple[Row, dict[str, float]]:
    models, ids = sides(case, size)
    ours, theirs = models["lorakit"], models["PEFT"]
    for model in (ours, theirs):
        model.eval()
    apart = check_agreement(ours, theirs, ids, 1e-4 if case.dtype == torch.float32 else 0.05)
    for model in (ours, theirs):
        model.train()
    variants = {key: step(model, ids) for key, model in models.items()}
    row = interleave(name, variants, rounds=rounds, warmup=1 if rounds < 5 else 3)
    memory = {key: saved_bytes(model, ids) / 2**20 for key, model in models.items()}
    return row, {**memory, "gradient difference": apart}


def compiled(size: Size, rounds: int) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """All three compiled, and PEFT as it is beside them: a row for each way of PEFT, and what each keeps."""
    models, ids = sides(CASES[0], size)
    torch._dynamo.reset()
    calls = {key: torch.compile(model, fullgraph=True) for key, model in models.items()}
    eager = gradients(models["PEFT"], ids)
    apart = {
        key: difference(gradients(models[key], ids, calls[key]), eager, 0.05) for key in ("lorakit", "PEFT")
    }
    variants = {key: step(model, ids, calls[key]) for key, model in models.items()}
    variants["PEFT eager"] = step(models["PEFT"], ids)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = interleave("", variants, rounds=rounds)
    memory = {key: saved_bytes(model, ids, calls[key]) / 2**20 for key, model in models.items()}
    rows, kept = [], {}
    for other, words in (("PEFT", "all compiled"), ("PEFT eager", "compiled, PEFT eager")):
        name = f"{CASES[0].name}, {words}, d={size.hidden} L={size.layers}"
        peers = {"PEFT": other, "frozen": "frozen"}
        rows.append(
            Row(
                name,
                {key: found.milliseconds[own] for key, own in {"lorakit": "lorakit", **peers}.items()},
                {key: found.ratio[own] for key, own in peers.items()},
                {key: found.spread[own] for key, own in peers.items()},
            )
        )
        kept[name] = {**memory, "gradient difference": apart["lorakit"]}
    kept[name]["PEFT"] = saved_bytes(models["PEFT"], ids) / 2**20
    return rows, kept


CASES = [
    Case("bf16 base, fp32 adapters, p=0", torch.bfloat16, 0.0),
    Case("bf16 base, fp32 adapters, p=0.05", torch.bfloat16, 0.05),
    Case("fp32, p=0", torch.float32, 0.0),
    Case("fp32, p=0.05", torch.float32, 0.05),
    Case("bf16 base, bf16 adapters, p=0", torch.bfloat16, 0.0, autocast_adapters=False),
    Case("bf16 base, bf16 adapters, p=0.05", torch.bfloat16, 0.05, autocast_adapters=False),
    Case("bf16 base, fp32 adapters, checkpointed, p=0.05", torch.bfloat16, 0.05, prepare=checkpointed),
]


def size_for(dtype: torch.dtype, *, quick: bool) -> Size:
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return SMALL
    return QUICK if quick else FULL


def show(row: Row, saved: dict[str, float]) -> None:
    print(
        f"{row.name:<62}{row.milliseconds['lorakit']:>8.0f}{row.ratio['PEFT']:>10.2f} ±{row.spread['PEFT']:.2f}"
        f"{1 / row.ratio['frozen']:>13.2f}{saved['lorakit']:>15.1f}{saved['PEFT']:>8.1f}{saved['frozen']:>8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="four rows of two layers, shorter texts, few rounds"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows, memory = [], {}
    print(
        f"{'training step':<62}{'ms':>8}{'PEFT/ours':>16}{'ours/frozen':>13}   saved MiB: ours, PEFT, frozen"
    )
    for case in CASES[:4] if quick else CASES:
        size = size_for(case.dtype, quick=quick)
        name = f"{case.name}, d={size.hidden} L={size.layers}"
        row, saved = compare(name, case, size=size, rounds=3 if quick else 15)
        rows.append(row)
        memory[name] = saved
        show(row, saved)
    if not quick and size_for(torch.bfloat16, quick=False) is FULL:
        more, saved_by_name = compiled(COMPILED, rounds=15)
        for row in more:
            show(row, saved_by_name[row.name])
        rows += more
        memory |= saved_by_name
    if keeps(full=not quick):
        save("train_step", rows, {"saved_mib": memory})


if __name__ == "__main__":
    main()
