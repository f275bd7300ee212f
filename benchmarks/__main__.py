"""All benchmarks, one process each: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("train_step", "one_layer", "combine_svd", "mixed_batch", "attach_many", "moe_step", "hotswap", "init")


def main() -> None:
    for name in BENCHMARKS:
        print(f"\n== {name}", flush=True)
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True
        )


if __name__ == "__main__":
    main()
