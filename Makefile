# Two commands on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
#
#   make demo        the whole job on real data, and a report
#   make test        the test suite, two workers
#   make check       lint, types, import contracts
#   make bench       re-run the benchmarks whose inputs changed
#   make docs        strict build of the documentation into site/
#   make clean       everything that make made

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
INSTALL_INPUTS := pyproject.toml constraints.txt

# One thread a worker: two test workers on two cores must not fight for them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types contracts format bench docs clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: installing again is skipped until pyproject.toml or constraints.txt changes.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(BIN)/python $(INSTALL_INPUTS)
	$(PIP) install -q --no-compile -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint types contracts

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(MAKE) -C benchmarks PYTHON=$(abspath $(BIN))/python

docs: $(VENV)/.docs $(VENV)/.demo
	$(BIN)/python docs/render.py --check
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo_out docs/_generated .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
