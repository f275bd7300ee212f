"""What the 2nd adapter costs, and what the 33rd: attaching, loading, switching, disabling, deleting.

A Llama of 32 layers, hidden 64, with adapters (r=16) on all 224 linear layers, one thread's CPU time. The floor is
reading the file with safetensors. First both sides must give the same logits from the same file.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

import lorakit
from benchmarks.models import narrow_llama
from benchmarks.timing import Row, keeps, save

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

LIBRARIES = {"lorakit": lorakit, "PEFT": peft}
FIELDS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def timed(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def disabled(model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        with model.disable_adapter():
            pass

    return run


def measure(layers: int, counts: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each operation by library, with 1, 2 … adapters there; interleaved round by round."""
    found: dict[str, dict[str, list[float]]] = {}

    def note(operation: str, library: str, milliseconds: float) -> None:
        found.setdefault(operation, {}).setdefault(library, []).append(milliseconds)

    plain = narrow_llama(layers)
    ids = torch.arange(12).view(2, 6)
    with tempfile.TemporaryDirectory() as folder:
        first = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**FIELDS, init_lora_weights=False))
        first.save_pretrained(folder)
        file = Path(folder, "adapter_model.safetensors")
        check(plain, folder, ids)
        for _ in range(rounds):
            models = {}
            for name, library in LIBRARIES.items():
                model = copy.deepcopy(plain)
                config = library.LoraConfig(**FIELDS)
                note("get_peft_model", name, timed(lambda: library.get_peft_model(model, config)))  # noqa: B023
                model = copy.deepcopy(plain)
                load = library.PeftModel.from_pretrained
                note("from_pretrained", name, timed(lambda: load(model, folder)))  # noqa: B023
                models[name] = library.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
            note("from_pretrained", "floor", timed(lambda: load_file(file)))
            note("get_peft_model", "floor", float("nan"))
            for count in range(2, max(counts) + 1):
                for name, model in models.items():
                    took = timed(lambda: model.load_adapter(folder, f"adapter{count}"))  # noqa: B023
                    if count in counts:
                        note(f"load_adapter, the {ordinal(count)}", name, took)
                if count in counts:
                    note(f"load_adapter, the {ordinal(count)}", "floor", timed(lambda: load_file(file)))
                    after(models, count, note)
    return found


def after(models: dict[str, nn.Module], count: int, note: Callable[[str, str, float], None]) -> None:
    """What is done often, with `count` adapters there."""
    config = {name: library.LoraConfig(**FIELDS) for name, library in LIBRARIES.items()}
    for name, model in models.items():
        note(f"set_adapter, of {count}", name, timed(lambda: model.set_adapter(f"adapter{count}")))  # noqa: B023
        note(f"disable_adapter, of {count}", name, timed(disabled(model)))
        note(f"add_adapter, to {count}", name, timed(lambda: model.add_adapter("more", config[name])))  # noqa: B023
        note(f"delete_adapter, of {count + 1}", name, timed(lambda: model.delete_adapter("more")))  # noqa: B023


def check(plain: nn.Module, folder: str, ids: torch.Tensor) -> None:
    """Refuses to time two sides that load different things."""
    with torch.no_grad():
        found = [through(library, plain, folder, ids) for library in LIBRARIES.values()]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0][0], found[0][1]), "the adapter does nothing"


def through(library: object, plain: nn.Module, folder: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits after each operation that is timed."""
    model = library.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    logits = [model(ids).logits]
    with model.disable_adapter():
        logits.append(model(ids).logits)
    model.add_adapter("more", library.LoraConfig(**FIELDS))  # its B is zero
    model.set_adapter("more")
    logits.append(model(ids).logits)
    model.load_adapter(folder, "adapter2")
    model.set_adapter("adapter2")
    model.delete_adapter("more")
    return [*logits, model(ids).logits]


def row(operation: str, times: dict[str, list[float]]) -> Row:
    ours = times["lorakit"]
    ratios = {
        key: [theirs / mine for theirs, mine in zip(values, ours, strict=True)]
        for key, values in times.items()
        if key != "lorakit" and values[0] == values[0]
    }
    spread = {
        key: (max(values) - min(values)) / 2 if len(values) > 1 else 0.0 for key, values in ratios.items()
    }
    return Row(
        operation,
        {key: statistics.median(values) for key, values in times.items() if values[0] == values[0]},
        {key: statistics.median(values) for key, values in ratios.items()},
        spread,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="eight layers, up to nine adapters, one round")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    layers, counts, rounds = (8, [2, 9], 2) if quick else (32, [2, 12, 33], 3)
    found = measure(layers, counts, rounds)
    rows = [
        row(operation, times) for operation, times in sorted(found.items(), key=lambda item: order(item[0]))
    ]
    print(
        f"{'with ' + str(7 * layers) + ' adapted modules':<32}{'ours ms':>9}{'PEFT ms':>9}{'PEFT/ours':>11}{'ours/floor':>12}"
    )
    for item in rows:
        floor = f"{1 / item.ratio['floor']:12.1f}" if "floor" in item.ratio else ""
        print(
            f"{item.name:<32}{item.milliseconds['lorakit']:>9.1f}{item.milliseconds['PEFT']:>9.1f}"
            f"{item.ratio['PEFT']:>11.1f}{floor}"
        )
    loads = {item.name: item.milliseconds for item in rows if item.name.startswith("load_adapter")}
    first, *_, last = loads.values()
    print(
        f"the last load costs {last['lorakit'] / first['lorakit']:.2f} times the 2nd; PEFT's {last['PEFT'] / first['PEFT']:.2f}"
    )
    if keeps(full=not quick):
        growth = {name: last[name] / first[name] for name in LIBRARIES}
        save("attach_many", rows, {"last_load_over_second": growth, "modules": 7 * layers})


def ordinal(count: int) -> str:
    return f"{count}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(count % 10 if count // 10 != 1 else 0, 'th') }"


def order(operation: str) -> tuple[str, int]:
    digits = "".join(filter(str.isdigit, operation))
    return operation.split(",", maxsplit=1)[0], int(digits or 0)


if __name__ == "__main__":
    main()
