# `make` lists the targets. Everything happens in a virtual environment in .venv; only Python 3.11 or newer, make and a
# C++ compiler (for torch.compile on the CPU) must be there already.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
# Two workers with one thread each: the tests are many small models.
TEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal
BENCH_ARGS ?= run tiny --steps 5 --methods torch.compile dropbp_fx "forward alone" "careful user, no_grad" checkpointing
# Processes that build the documentation; the atlas traces a model for each family.
DOCS_JOBS ?= 2
DOCS_OUT ?= docs/_build/html

# OpenMP threads that wait sleep instead of spinning: on a machine with other work, spinning makes every step many times slower.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all full-run lint types format docs bench clean ci

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		awk -F '\t' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install the package into it, editable, with all extras as pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "Python 3.11 or newer is needed, \
	but $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Could not make a virtual environment; Debian and Ubuntu need the package python3-venv."; exit 1; }
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@

demo: $(STAMP) ## train a small Llama on the CPU with and without dropping, and compare (flags: DEMO_ARGS="--steps 40")
	$(BIN)/python examples/finetune_llama.py $(DEMO_ARGS)

test: $(STAMP) ## run the tests of what the package does (flags: TEST_ARGS="-k prune")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not thorough" $(TEST_ARGS)

test-all: $(STAMP) ## run the tests with every model family, adapter, example and process group, too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS)

full-run: $(STAMP) ## run all tests and take note, so that CI need not run them until sources they depend on change
	$(MAKE) test-all TEST_ARGS="-n 2 --dist worksteal"
	$(BIN)/python .ci/full_run.py record

lint: $(STAMP) ## check style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check types with mypy
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation, warnings being errors, into docs/_build/html (DOCS_ATLAS=0: without the families)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m sphinx -W --keep-going -q -j $(DOCS_JOBS) -b html docs $(DOCS_OUT)
	@echo "The documentation is in $(DOCS_OUT)/index.html."

bench: $(STAMP) ## compare with torch.compile and with dropping by hand (BENCH_ARGS="run 1b" on a GPU; docs/experiments/benchmarks.md)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

ci: ## what continuous integration runs, from scratch in a directory of its own
	.ci/run

clean: ## remove everything that the other targets made
	rm -rf $(VENV) outputs build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
