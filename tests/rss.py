"""How much memory a call takes in a process of its own, as the kernel counts it."""

from __future__ import annotations

import os
import subprocess
import sys

_PROGRAM = """
import pathlib, torch
torch.set_num_threads(1)
{imports}

def kibibytes(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

pathlib.Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin anew
before = kibibytes("VmRSS")
{call}
print((kibibytes("VmHWM") - before) / 1024)
"""


def megabytes_of(imports, call):
    """The most that a call held at any time above what the process held after its imports; Linux only."""
    program = _PROGRAM.format(imports=imports, call=call)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # each further thread has heaps of its own
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])
