"""The ratios that lorakit is to reach, as data. `row` is a pattern for the names of a benchmark's readings.

A pattern names the size that the ratio is wanted at. A row whose benchmark was run at another size, or not yet, is
"not measured" rather than judged by its neighbour. Where a pattern fits several readings, the worst one counts.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """One line of the table.

    Attributes:
        what: the dimension, in words.
        benchmark: the name of its file.
        row: a shell pattern for `Reading.row`.
        wanted: at least this many times PEFT's; with `most` instead at most this many times the floor.
        most: whether `wanted` bounds lorakit over the floor from above.
        why: why it is not reached, where that is known; shown only while it is not.
    """

    what: str
    benchmark: str
    row: str
    wanted: float
    most: bool = False
    why: str = ""


_EDGE = "at the edge: another run of the same hour gave 1.12, with PEFT / lorakit 1.40"
_DECODE = (
    "torch's bf16 products alone leave no more on this machine: see "
    "[what a decode step can gain at most](#what-a-decode-step-can-gain-at-most)"
)
_FLAGS = (
    "every adapter's parameters are read from their modules and their `requires_grad` flags looked at, since somebody may "
    "have changed either by hand; that is three quarters of the time, spent waiting for memory"
)
_MODULES = (
    "planning takes a quarter, the first values a fifth, and layers with their modules and parameters two fifths, half of "
    "which are torch's empty containers; a prototype without checks took 12 ms"
)
_FILE = (
    "of 19 ms reading with the digest and the checks of header and finiteness takes 8 (SHA-256 alone 2), planning 5, "
    "modules 6; the ratio asks for 14"
)
_SWAP = (
    "the ratio asks for 5 ms, and the bare read of the file takes 7; of 18 ms reading with digest and checks takes 8, finding "
    "where each tensor is 5, keeping what is overwritten and writing 4"
)
_KEPT = (
    "the merged weight lies beside the original one, which gives back its very bits when it is undone: half of the time is "
    "the kernel's for new memory, as it is in PEFT"
)
_CHECKED = (
    "besides one product into the weight, all weights are read once before the first is written, so that NaN or infinity "
    "changes nothing"
)
_NORMS = (
    "the products with the weight, which both sides have, took twice as long in this run as in another, where it was 7.1; "
    "there our plain LoRA alone would have given 9.1, and the norms and the magnitude's gradient take the rest"
)
_BASE = "PEFT's step takes 1.65 times the base's here, so 1.15 over the base, what was wanted beside, leaves no more"
_NF4 = (
    "PEFT's step of 2816 x 1024 takes 1.9 to 2.2 times that of the bare nf4 base, which is nearly all that could be "
    "gained, and the adapter's six thin products and the sum of two gradients of x remain"
)

TARGETS = (
    Target("training step, bf16, fp32 adapters", "train_step", "bf16 base, fp32 adapters, p=0, d=1024*[0-9]", 1.40),
    Target("the same over the frozen step", "train_step", "bf16 base, fp32 adapters, p=0, d=1024*[0-9]", 1.15, most=True, why=_EDGE),
    Target("training step, bf16, fp32 adapters, dropout", "train_step", "bf16 base, fp32 adapters, p=0.05, d=1024*[0-9]", 1.5),
    Target("training step, compiled, over PEFT eager, bf16", "train_step", "*compiled, PEFT eager*[0-9]", 1.55),
    Target("training step, checkpointed, dropout", "train_step", "*checkpoint*p=0.05*[0-9]", 1.65),
    Target("training step, fp32", "train_step", "fp32, p=0, d=1024*[0-9]", 1.06),
    Target("training step, fp32, dropout", "train_step", "fp32, p=0.05, d=1024*[0-9]", 1.13),
    Target("kept for backward, bf16", "train_step", "bf16 base, fp32 adapters, p=0, d=1024*kept for backward", 1.55),
    Target("one layer, bf16, 1024 x 1024", "one_layer", "1024 x 1024, bf16, *lora_linear", 2.0),
    Target("one layer, bf16, 4096 x 4096", "one_layer", "4096 x 4096, bf16, *lora_linear", 1.5, why=_BASE),
    Target("QLoRA layer, nf4", "one_layer", "*1024, nf4*", 2.0, why=_NF4),
    Target("mixed batch, decode, 8 adapters, bf16", "mixed_batch", "bf16, d=1024, 8 adapters, 8x1 tokens", 2.0, why=_DECODE),
    Target("mixed batch, decode, 32 adapters, bf16", "mixed_batch", "bf16, d=1024, 32 adapters, 32x1 tokens", 4.0, why=_DECODE),
    Target("DoRA step, 4096 x 4096, bf16", "dora_step", "layer 4096 x 4096, bf16, step", 8.0, why=_NORMS),
    Target("DoRA, one token, 4096 x 4096, bf16", "dora_step", "layer 4096 x 4096, bf16, eval of 1", 50.0),
    Target("svd of two adapters, 4096 x 4096", "combine_svd", "svd, 2 x r=16, 4096x4096", 1000.0),
    Target("svd of two adapters, 1024 x 1024", "combine_svd", "svd, 2 x r=16, 1024x1024", 200.0),
    Target("PiSSA, 4096 x 4096", "init", "PiSSA, 4096x4096", 40.0),
    Target("OLoRA, 4096 x 4096", "init", "OLoRA, 4096x4096", 150.0),
    Target("LoftQ, 4 bits, 4096 x 4096", "init", "LoftQ, 4 bits, 1 step, 4096x4096", 10.0),
    Target("merging for good, fp32, 4096 x 4096", "scaling", "merge and unload, 4096 x 4096, fp32", 9.0, why=_CHECKED),
    Target("merging for good, bf16, 4096 x 4096", "scaling", "merge and unload, 4096 x 4096, bf16", 9.0, why=_CHECKED),
    Target("merging to be undone, fp32, 4096 x 4096", "scaling", "merge, 4096 x 4096, fp32", 9.0, why=_KEPT),
    Target("merging to be undone, bf16, 4096 x 4096", "scaling", "merge, 4096 x 4096, bf16", 9.0, why=_KEPT),
    Target("experts, step, grouped", "moe_step", "*grouped_mm, step", 2.0),
    Target("experts, step, eager, 128 experts", "moe_step", "E=128*eager, step", 30.0),
    Target("experts, kept for backward, 128 experts", "moe_step", "E=128*grouped_mm, kept for backward", 12.0),
    Target("load_adapter, the 2nd", "attach_many", "load_adapter, the 2nd", 15.0, why=_FILE),
    Target("load_adapter, the 12th", "attach_many", "load_adapter, the 12th", 35.0, why=_FILE),
    Target("get_peft_model", "attach_many", "get_peft_model", 8.0, why=_MODULES),
    Target("set_adapter, of 12", "attach_many", "set_adapter, of 12", 50.0, why=_FLAGS),
    Target("hotswap", "hotswap", "r=16 and r=16, 32 layers", 8.0, why=_SWAP),
    Target("import, over torch", "importing", "import, over torch", 60.0),
    Target("merging on disk, memory", "merge_disk", "all linear layers, * MB, memory", 50.0),
    Target("merging on disk, CPU time", "merge_disk", "all linear layers, * MB, CPU time", 2.5),
)  # fmt: skip
