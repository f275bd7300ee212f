"""`python -m lorakit` is the command `lorakit`, as torchrun and accelerate launch it."""

from __future__ import annotations

from lorakit.cli import main

if __name__ == "__main__":
    main()
