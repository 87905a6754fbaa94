# Needs make and Python 3.11 or newer. Whatever target is called first makes the environment; later calls find it ready.

# What .venv is made with (make test PYTHON=python3.12), and what is passed on (make test ARGS="-x tests/test_policies.py").
PYTHON ?= python3
ARGS   ?=

VENV  := .venv
READY := $(VENV)/.installed
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test torture reliability quality format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(READY)  ## train a small model with and without pruning, on this machine
	@$(BIN)/python recipes/quickstart.py $(ARGS)

# A file of tests goes to one worker: what it starts or trains for all its tests is made once. The files come in their order,
# not the one with the fewest tests last: that one starts programs, for minutes in which the other worker has no work.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)  ## run the tests (ARGS="..." goes to pytest)
	$(PYTEST) $(ARGS)

# What is tried is noted also where it fails, and shown in the README's table.
RECORD := recipes/results/reliability.json

torture: $(READY)  ## kill a training run 30 times at random moments, resume it, compare (ARGS="--kills 300")
	$(BIN)/python tests/torture.py --kills 30 --kills_in_checkpoint 10 --write $(RECORD) $(ARGS); status=$$?; \
	    $(BIN)/python tests/reliability.py && exit $$status

reliability: $(READY)  ## run the tests and note in the README what they tried how often
	RELIABILITY=$(RECORD) $(PYTEST) $(ARGS); status=$$?; \
	    $(BIN)/python tests/reliability.py && exit $$status

quality: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## repair what can be repaired of the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and build products (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hf_dynprune needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "If you have another one, name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first and alone: packages that follow then find it there, and none of them fetches another.
$(READY): pyproject.toml constraints.txt .ci/repair_torchvision.py | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time, nothing the next time ..."
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@$(BIN)/python .ci/repair_torchvision.py
	@touch $@
