# The front door. Every target sets up .venv by itself; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-quick format clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[demo]' --group dev -c constraints.txt
	@touch $@

setup: $(STAMP) ## make .venv with everything in it

demo: $(STAMP) ## train, save, load, merge and unmerge a LoRA classifier on a real model, offline
	$(BIN)/lorakit demo

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

check: $(STAMP) ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(STAMP) ## side by side with PEFT and with the floor; prints the table, writes docs/benchmarks.md and its plots
	$(BIN)/python -W ignore -m benchmarks

bench-quick: $(STAMP) ## the same in two minutes, small sizes and few rounds; keeps no figures
	$(BIN)/python -W ignore -m benchmarks --quick

format: $(STAMP) ## put the code into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what make made
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache demo-output
