"""What an import costs over torch: `from lorakit import ...` against PEFT's, each in a process of its own.

The names asked for are those that attach an adapter; that both give the same names is the check. Since lorakit loads
its parts on first use, the second row has the first adapter on a model, too. CPU time of the process after torch is
imported, with the bytecode there that an installation makes, of either side.
Run: python -m benchmarks.importing [--quick]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from tempfile import TemporaryDirectory

from benchmarks.timing import Row, keeps, save, summarise

NAMES = "LoraConfig, PeftModel, get_peft_model"
CODE = """
import time, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
start = time.process_time()
from {library} import {names}
{then}
print(time.process_time() - start)
"""
ROWS = {
    "import, over torch": "",
    "import and the first adapter, over torch": "get_peft_model(model, LoraConfig(target_modules=['0']))",
}


def seconds(library: str, then: str, bytecode: str) -> float:
    code = CODE.format(library=library, names=NAMES, then=then)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return float(done.stdout.splitlines()[-1])


def measure(name: str, then: str, bytecode: str, rounds: int) -> Row:
    times: dict[str, list[float]] = {"lorakit": [], "PEFT": []}
    for turn in range(rounds + 1):
        for library, values in times.items():
            took = seconds(library.lower(), then, bytecode)
            if turn:  # the first may compile
                values.append(took)
    return summarise(name, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the import alone, once, with the bytecode that is there"
    )
    quick = parser.parse_args().quick
    rows = []
    with TemporaryDirectory() as bytecode:
        for name, then in ROWS.items():
            if quick and then:
                continue
            # a folder of its own, in which everything is compiled first, takes half a minute
            rows.append(row := measure(name, then, "" if quick else bytecode, rounds=1 if quick else 9))
            print(
                f"{row.name}: lorakit {row.milliseconds['lorakit']:.0f} ms, PEFT {row.milliseconds['PEFT']:.0f} ms, "
                f"{row.ratio['PEFT']:.1f} ±{row.spread['PEFT']:.1f}",
                flush=True,
            )
    if keeps(full=not quick):
        save("importing", rows)


if __name__ == "__main__":
    main()
