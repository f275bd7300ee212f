"""Benchmarks, each side by side with PEFT and with the floor. `python -m benchmarks` runs them all."""
