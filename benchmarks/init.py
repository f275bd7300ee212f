"""Initialisers that look at the weight or at data: lorakit's against PEFT's functions, time and final error.

PEFT's LoftQ moves to CUDA by name; here its own source is run with "cpu" in that place, and without the garbage
collection that it does at each step. Its PiSSA and OLoRA are the methods of its layer, which also write the new base
weight; lorakit leaves the base alone and keeps what it takes off. Before timing, both sides must give what the method
says. Run: python -m benchmarks.init [--quick | --large]
"""

from __future__ import annotations

import argparse
import inspect
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from peft.utils import loftq_utils
from torch import nn

from benchmarks import eva
from benchmarks.timing import interleave, keeps, save
from lorakit import LoftQConfig
from lorakit.init import initialise
from lorakit.layouts import matrix_layout
from lorakit.specs import AdapterSpec
from lorakit.weights import find_codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benchmarks.timing import Row
    from lorakit.init import InitResult

R = 16


class Sides(NamedTuple):
    """The same work done twice, and what became of it.

    Attributes:
        ours, theirs: what is timed.
        errors: checks that both sides did the same, and gives the error of each, by side; smaller is better.
    """

    ours: Callable[[], object]
    theirs: Callable[[], object]
    errors: Callable[[], dict[str, float]]


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the row.
        build: makes the sides.
        error: what `Sides.errors` measures, in words.
        rounds: how often both sides are run.
        large: left out unless asked for.
        quick: whether a quick run has the time for it.
    """

    name: str
    build: Callable[[], Sides]
    error: str
    rounds: int = 9
    large: bool = False
    quick: bool = True


# ---- weights and adapters ---------------------------------------------------------------------------------


@cache
def noise(size: int) -> Tensor:
    """Normal numbers, as a quantiser sees a weight."""
    return 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))


@cache
def decaying(size: int) -> Tensor:
    """Singular values that fall like those of trained layers, k ** -0.5."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return (left * torch.arange(1, size + 1) ** -0.5) @ right.mT


@cache
def holding(W: Tensor) -> nn.Linear:
    """A layer with this very weight."""
    with torch.device("meta"):
        layer = nn.Linear(*W.shape[::-1], bias=False)
    layer.weight = nn.Parameter(W, requires_grad=False)
    return layer


def begin(W: Tensor, scheme: str, options: object = None) -> InitResult:
    base = holding(W)
    spec = AdapterSpec(
        path="layer",
        kind="linear",
        layout=matrix_layout(*W.shape),
        r=R,
        lora_alpha=R,
        scaling=1.0,
        dropout=0.0,
        lora_bias=False,
        init=scheme,
        init_options=options,
        dtype=torch.float32,
        device=W.device,
    )
    (result,) = initialise(spec, partial(find_codec(base).peek, base))
    return result


def peft_layer(W: Tensor) -> nn.Module:
    """PEFT's layer around a Linear."""
    base = nn.Sequential(nn.Linear(*W.shape[::-1], bias=False))
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    return peft.get_peft_model(base, config).base_model.model[0]


# ---- LoftQ ------------------------------------------------------------------------------------------------


def peft_loftq() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    names = {**vars(loftq_utils), "clear_device_cache": lambda: None, "is_xpu_available": lambda: False}
    exec(source.replace('"cuda"', '"cpu"'), names)  # PEFT's own function
    return names["loftq_init"]


def loftq(size: int, steps: int) -> Sides:
    W, theirs_of, options = noise(size), peft_loftq(), LoftQConfig(4, steps)

    def theirs() -> tuple[Tensor, Tensor, Tensor]:
        return theirs_of(W, num_bits=4, reduced_rank=R, num_iter=steps)

    def errors() -> dict[str, float]:
        Q, A, B = theirs()
        mine = begin(W, "loftq", options)
        found = {
            "lorakit": error_of(W, mine.base_weight, mine.factors.B, mine.factors.A),
            "PEFT": error_of(W, Q, B, A),
        }
        assert found["lorakit"] <= found["PEFT"] * (1 + 1e-4), found
        assert steps > 1 or torch.equal(Q, mine.base_weight), "the quantisers differ"
        return found

    return Sides(lambda: begin(W, "loftq", options), theirs, errors)


def error_of(W: Tensor, Q: Tensor, B: Tensor, A: Tensor) -> float:
    return float((W.double() - Q.double() - B.double() @ A.double()).norm() / W.double().norm())


# ---- PiSSA and OLoRA --------------------------------------------------------------------------------------


def pissa(size: int, scheme: str, most_apart: float) -> Sides:
    """PEFT's whole SVD is the reference; of its `svd_lowrank` the distance to that."""
    W = decaying(size)
    layer = peft_layer(W)

    def theirs(name: str = scheme) -> Tensor:
        layer.base_layer.weight.data = W  # the method puts another tensor there
        with torch.no_grad():
            layer.pissa_init("default", name)
        return layer.base_layer.weight

    def errors() -> dict[str, float]:
        best = (W - theirs("pissa")).double()
        found = {
            "lorakit": begin(W, "pissa").factors.delta(torch.float64),
            "PEFT": (W - theirs(scheme)).double(),
        }
        apart = {side: float((delta - best).norm() / best.norm()) for side, delta in found.items()}
        assert apart["lorakit"] <= 1e-4, apart
        assert apart["PEFT"] <= most_apart, apart
        return apart

    return Sides(lambda: begin(W, "pissa"), theirs, errors)


def olora(size: int) -> Sides:
    W = decaying(size)
    layer = peft_layer(W)

    def theirs() -> tuple[Tensor, Tensor]:
        layer.base_layer.weight.data = W.clone()  # the method changes it in place
        with torch.no_grad():
            layer.olora_init("default")
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()

    def errors() -> dict[str, float]:
        mine, other, exact = begin(W, "olora").factors, theirs(), torch.linalg.qr(W.double()[:, :R])
        exact_A = exact.Q.mT @ W.double()
        found = {
            side: float(max((B - exact.Q).norm() / exact.Q.norm(), (A - exact_A).norm() / exact_A.norm()))
            for side, (A, B) in {"lorakit": (mine.A, mine.B), "PEFT": other}.items()
        }
        assert max(found.values()) <= 1e-5, found
        return found

    return Sides(lambda: begin(W, "olora"), theirs, errors)


LEFT, APART = "of the weight's norm is left", "from the best of its rank"
CASES = [
    Case("LoftQ, 4 bits, 1 step, 1024x1024", lambda: loftq(1024, 1), LEFT),
    Case("LoftQ, 4 bits, 4 steps, 1024x1024", lambda: loftq(1024, 4), LEFT, rounds=7, quick=False),
    Case("LoftQ, 4 bits, 1 step, 4096x4096", lambda: loftq(4096, 1), LEFT, rounds=3, large=True),
    Case("PiSSA, 1024x1024", lambda: pissa(1024, "pissa", 0.0), APART),
    Case("PiSSA, 4096x4096", lambda: pissa(4096, "pissa", 0.0), APART, rounds=3, large=True),
    Case("PiSSA, pissa_niter_16, 1024x1024", lambda: pissa(1024, "pissa_niter_16", 0.5), APART, quick=False),
    Case("OLoRA, 1024x1024", lambda: olora(1024), "from the decomposition in fp64", rounds=15),
    Case("OLoRA, 4096x4096", lambda: olora(4096), "from the decomposition in fp64", rounds=3, large=True),
    Case(
        "EVA, MiniLM, r 16",
        lambda: Sides(*eva.sides()),
        "of the variance that could be explained",
        rounds=5,
        quick=False,
    ),
]


def show(row: Row, errors: dict[str, float]) -> None:
    print(
        f"{row.name:<40}{row.milliseconds['lorakit']:>10.2f}{row.milliseconds['PEFT']:>11.1f}"
        f"{row.ratio['PEFT']:>10.1f} ±{row.spread['PEFT']:<6.1f}{errors['lorakit']:>13.3g}{errors['PEFT']:>11.3g}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few rounds; keeps no figures")
    size.add_argument("--large", action="store_true", help="4096 x 4096 too, which takes minutes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows, errors = [], {}
    print(f"{'beginning':<40}{'ours ms':>10}{'PEFT ms':>11}{'PEFT/ours':>12}{'our error':>19}{'PEFT':>11}")
    for case in CASES:
        if (case.large and not chosen.large) or (chosen.quick and not case.quick):
            continue
        both = case.build()
        errors[case.name] = {**both.errors(), "what": case.error}
        rounds = min(case.rounds, 3) if chosen.quick else case.rounds
        row = interleave(case.name, {"lorakit": both.ours, "PEFT": both.theirs}, rounds=rounds, warmup=1)
        rows.append(row)
        show(rows[-1], errors[case.name])
    if keeps(full=chosen.large):  # the figures on record are those of all sizes
        save("init", rows, {"error": errors})


if __name__ == "__main__":
    main()
