# Needs make and Python 3.11 or newer. The first target that is called makes the environment; later
# calls find it ready.

# PYTHON is what .venv is made with (make test PYTHON=python3.12). ARGS is passed on
# (make test ARGS="-x tests/test_policies_base.py"). CONSTRAINTS has the versions that are installed
# into VENV (make test VENV=.venv-lowest CONSTRAINTS=.ci/constraints/lowest.txt).
PYTHON ?= python3
ARGS   ?=
CONSTRAINTS ?= constraints.txt

VENV  ?= .venv
READY := $(VENV)/.installed
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart check test versions docs torture reliability gpu quality format constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(READY)  ## train a small model with and without pruning, on this machine
	@$(BIN)/python recipes/quickstart.py $(ARGS)

# One file of tests goes to one worker, which makes once what its tests share. The files come in
# their order: the default, most tests first, would leave the slow file that starts programs last.
# Three workers fill two cores: some tests wait for programs and ranks that they start.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The first tier: style, the core, the policies, and the trainer's most telling runs.
CORE := checks files selection schedule table scores sampler observations pruner report conformance \
        layering recorded losses
CHECK := $(CORE:%=tests/test_%.py) $(wildcard tests/test_policies*.py) tests/test_trainer.py

check: $(READY)  ## run style and the core's tests: two minutes, after each edit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not large" $(CHECK) $(ARGS)

test: $(READY)  ## run all tests (ARGS="..." goes to pytest)
	$(PYTEST) $(ARGS)

# The trainer's tests once more, on the lowest transformers that pyproject.toml allows and on the
# newest 5.x that pip offers. They are installed beside .venv, with what they depend on. That does
# not include torch.
VERSIONS := $(VENV)/versions
LOWEST := $(shell sed -n '/^dependencies/,/^]/s/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
SEAMS := trainer data_side loss_side upstream

$(VERSIONS)/lowest $(VERSIONS)/newest: $(READY)
	@rm -rf $@
	@$(PIP) install -qq --target $@ \
	    'transformers$(if $(filter %lowest,$@),==$(LOWEST).*,>=$(LOWEST),<6)'

versions: $(VERSIONS)/lowest $(VERSIONS)/newest  ## run the trainer's tests on other transformers
	@for folder in $^; do \
	    PYTHONPATH=$$folder $(BIN)/python -c \
	        'import transformers; print("transformers", transformers.__version__)' && \
	    PYTHONPATH=$$folder $(PYTEST) $(SEAMS:%=tests/test_%.py) $(ARGS) || exit 1; \
	done

docs: $(READY)  ## build the site into docs/_build (warnings are errors)
	$(BIN)/python -m sphinx -q -n -W --keep-going docs docs/_build $(ARGS)

# What was tried is noted even if it failed, and shown in the table of the docs.
RECORD := recipes/results/reliability.json

torture: $(READY)  ## kill a training run 30 times at random moments, resume it, compare (ARGS="--kills 300")
	$(BIN)/python tests/torture.py --kills 30 --kills_in_checkpoint 10 --write $(RECORD) $(ARGS); status=$$?; \
	    $(BIN)/python tests/reliability.py && exit $$status

reliability: $(READY)  ## run the tests and note how often they tried each promise
	RELIABILITY=$(RECORD) $(PYTEST) $(ARGS); status=$$?; \
	    $(BIN)/python tests/reliability.py && exit $$status

gpu: $(READY)  ## run what needs a GPU, at most 25 minutes; call it again to continue
	$(BIN)/python recipes/benchmarks/gpu.py $(ARGS); status=$$?; \
	    $(BIN)/python tests/fragments.py && exit $$status

quality: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## repair what can be repaired of the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(READY)  ## resolve the lowest and the newest versions that CI tests, by uv
	@$(PIP) install -qq uv
	@for set in lowest newest; do \
	    $(BIN)/python .ci/constraints.py $$set > $(VENV)/$$set.txt && \
	    mv $(VENV)/$$set.txt .ci/constraints/$$set.txt || exit 1; \
	done

clean:  ## remove caches and build products (not .venv, not runs/)
	rm -rf build dist docs/_build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hf_dynprune needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "If you have another one, name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first and alone, so that no later package fetches another one.
$(READY): pyproject.toml $(CONSTRAINTS) .ci/repair_torchvision.py | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time, nothing the next time ..."
	@$(PIP) install -qq -c $(CONSTRAINTS) torch
	@$(PIP) install -qq -c $(CONSTRAINTS) -e '.[dev]'
	@$(BIN)/python .ci/repair_torchvision.py
	@touch $@
