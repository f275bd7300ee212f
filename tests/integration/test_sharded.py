"""A model whose blocks are sharded over two processes (FSDP2) gets the gradients of one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lorakit.layers import together
from models import tiny_llama, with_adapter

FIELDS = {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}}
IDS = torch.arange(48).view(4, 12) % 11


def loss_of(model, batch):
    return model(batch).logits.float().square().mean()


def sharded(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    products = []
    shrink = together.shrink_together
    together.shrink_together = lambda x, factors: products.append(len(factors)) or shrink(x, factors)
    try:
        peft = with_adapter(tiny_llama(), **FIELDS).train()
        mesh = DeviceMesh("cpu", [0, 1])
        inner = peft.get_base_model()
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(inner, mesh=mesh, reshard_after_forward=True)
        for _ in range(2):  # weights are gathered, given back and gathered again
            peft.zero_grad(set_to_none=True)
            loss_of(peft, IDS.chunk(2)[rank]).backward()
        found = {
            name: p.grad.full_tensor() if p.grad is not None else None for name, p in peft.named_parameters()
        }
        if rank == 0:
            torch.save((found, products), results)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_a_sharded_model(tmp_path):
    torch.multiprocessing.spawn(
        sharded, args=(tmp_path / "store", tmp_path / "found.pt"), nprocs=2, join=True
    )
    found, products = torch.load(tmp_path / "found.pt")
    peft = with_adapter(tiny_llama(), **FIELDS).train()
    loss_of(peft, IDS).backward()
    wanted = {name: p.grad for name, p in peft.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    # gate and up; then q, k and v, but not of the first block, whose input has no history; in each of two steps
    assert products == [2, 3, 2] * 2
