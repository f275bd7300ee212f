"""What an import costs over torch: `from lorakit import ...` against PEFT's, each in a process of its own.

The names asked for are those that attach an adapter, since lorakit loads its parts on first use; that both give the
same names is the check. CPU time of the process after torch is imported. Run: python -m benchmarks.importing [--quick]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.timing import keeps, save, summarise

NAMES = "LoraConfig, PeftModel, get_peft_model"
CODE = """
import time, torch
start = time.process_time()
from {library} import {names}
print(time.process_time() - start)
"""


def seconds(library: str) -> float:
    code = CODE.format(library=library, names=NAMES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once")
    quick = parser.parse_args().quick
    times: dict[str, list[float]] = {"lorakit": [], "PEFT": []}
    for _ in range(1 if quick else 9):
        for name, values in times.items():
            values.append(seconds(name.lower()))
    row = summarise("import, over torch", times)
    print(
        f"{row.name}: lorakit {row.milliseconds['lorakit']:.0f} ms, PEFT {row.milliseconds['PEFT']:.0f} ms, "
        f"{row.ratio['PEFT']:.1f} ±{row.spread['PEFT']:.1f}"
    )
    if keeps(full=not quick):
        save("importing", [row])


if __name__ == "__main__":
    main()
