"""One model, many threads and tasks, each with its own adapter: nobody ever sees another's."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
import torch

from lorakit import LoraConfig, get_peft_model
from lorakit.layers.chosen import Live
from models import Snapshot, randomise, tiny_llama

NAMES = [*(f"adapter{n}" for n in range(10)), "__base__"]
ROUNDS = 60


@pytest.fixture(scope="module")
def served():
    """A model with ten adapters, a batch, and what each of them gives for it."""
    peft = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"), NAMES[0])
    for seed, name in enumerate(NAMES[:-1]):
        if seed:
            peft.add_adapter(name, LoraConfig(r=1 + seed % 4, target_modules="all-linear"))
        randomise(peft, name, seed=seed, scale=0.2)
    peft.eval()
    batch = torch.arange(12).view(2, 6) % 11
    wanted = {}
    with torch.no_grad():
        for name in NAMES[:-1]:
            peft.set_adapter(name)
            wanted[name] = peft(batch).logits
        with peft.disable_adapter():
            wanted["__base__"] = peft(batch).logits
    peft.set_adapter(NAMES[0])
    outputs = list(wanted.values())
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])
    return peft, batch, wanted


@pytest.fixture
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def by_argument(peft, batch, name):
    return peft(batch, adapter_names=name).logits


def by_context(peft, batch, name):
    with peft.use_adapter(name):
        return peft(batch).logits


def by_sample(peft, batch, name):
    return peft(batch, adapter_names=[name, NAMES[3]]).logits[:1]


@pytest.mark.usefixtures("_switching_often")
@pytest.mark.parametrize("how", [by_argument, by_context, by_sample], ids=lambda how: how.__name__)
def test_eight_threads_ten_adapters(served, how):
    peft, batch, wanted = served
    before = Snapshot(peft)
    wrong: list[str] = []
    start = threading.Barrier(8)

    def serve(number):
        start.wait()
        with torch.no_grad():
            for turn in range(ROUNDS):
                name = NAMES[(number * 3 + turn) % len(NAMES)]
                found = how(peft, batch, name)
                if not torch.allclose(found, wanted[name][: len(found)], rtol=1e-5, atol=1e-6):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of {8 * ROUNDS} calls gave another adapter's output"
    assert not Live.any
    before.assert_same(peft)


@pytest.mark.usefixtures("_switching_often")
def test_training_in_threads(served):
    """Each thread's backward fills the gradients of its own adapter alone, with the numbers it gets when alone."""
    peft, batch, _ = served
    peft.set_requires_grad(NAMES[:4])

    def parameters(name):
        return [item.tensor for item in peft.base_model.registry.tensors(name)]

    def gradients(name):
        with peft.use_adapter(name):
            loss = peft(batch).logits.square().sum()
        return torch.autograd.grad(loss, parameters(name))

    wanted = {name: gradients(name) for name in NAMES[:4]}
    found: dict[str, list[object]] = {name: [] for name in NAMES[:4]}

    def train(name):
        found[name] += [gradients(name) for _ in range(10)]

    threads = [threading.Thread(target=train, args=(name,)) for name in NAMES[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peft.set_adapter(NAMES[0])
    for name in NAMES[:4]:
        assert len(found[name]) == 10
        for grads in found[name]:
            for got, want in zip(grads, wanted[name], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_tasks_of_one_thread(served):
    peft, batch, wanted = served

    async def serve(name):
        with peft.use_adapter(name):
            for _ in range(5):
                await asyncio.sleep(0)  # the other tasks run here, each with its own choice
                with torch.no_grad():
                    assert torch.allclose(peft(batch).logits, wanted[name], rtol=1e-5, atol=1e-6), name

    async def all_at_once():
        await asyncio.gather(*(serve(name) for name in NAMES))

    asyncio.run(all_at_once())
    assert not Live.any


@pytest.mark.usefixtures("_switching_often")
def test_one_thread_adds_and_deletes_while_others_serve(served):
    peft, batch, wanted = served
    wrong: list[str] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def serve(number):
        try:
            with torch.no_grad():
                turn = 0
                while not done.is_set():
                    name = NAMES[(number + turn) % len(NAMES)]
                    turn += 1
                    if not torch.allclose(by_argument(peft, batch, name), wanted[name], rtol=1e-5, atol=1e-6):
                        wrong.append(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(8):
        peft.add_adapter(f"more{turn}", LoraConfig(r=2, target_modules="all-linear"))
        peft.delete_adapter(f"more{turn}")
    done.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert not wrong
