# Everything that is done with a checkout. Needs GNU make and Python >= 3.11 (another one: make PYTHON=python3.13 ...).
# Each environment is installed once and again only when pyproject.toml changes, so all targets work without a network then.

PYTHON ?= python3
BIN := .venv/bin
BENCH_PEERS := "plumpy==0.26.*" "kiwipy[rmq]==0.9.*" "dbos==3.4.*"
# Only its ZeroMQ broker is measured, which needs nothing of what the whole of it needs.
BENCH_FILES := "aiida-core==2.9.*"
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test torture format bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/demo.stamp ## compute equations of state with a daemon that loses a worker on the way (under two minutes)
	$(BIN)/python examples/equation_of_state/demo.py

test: .venv/dev.stamp ## run every static check and every test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

torture: .venv/dev.stamp ## look for rare failures for hours, or less: make torture MINUTES=10 [PROCESSES=2] [SEED=1]
	$(BIN)/python -m tests.torture $(if $(MINUTES),--minutes $(MINUTES)) $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(SEED),--seed $(SEED))

format: .venv/dev.stamp ## format the code and sort the imports
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: .venv-bench/bench.stamp ## measure, beside plumpy and kiwipy where they can do the same work
	.venv-bench/bin/python -m benchmarks.run

clean: ## remove the environments and everything that was built or cached
	rm -rf .venv .venv-bench dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf examples/equation_of_state/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): the folder of the environment. A half-made one is never taken for a whole one: the stamp comes last.
define create_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Prunus needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv --clear $(1)
	@touch $(1)/created.stamp
endef

.venv/created.stamp:
	$(call create_environment,.venv)

.venv-bench/created.stamp:
	$(call create_environment,.venv-bench)

.venv/demo.stamp: .venv/created.stamp pyproject.toml
	$(BIN)/python $(PIP_INSTALL) --editable ".[demo]"
	@touch $@

.venv/dev.stamp: .venv/created.stamp pyproject.toml
	$(BIN)/python $(PIP_INSTALL) --editable ".[demo,dev]"
	@touch .venv/demo.stamp $@

.venv-bench/bench.stamp: .venv-bench/created.stamp pyproject.toml
	.venv-bench/bin/python $(PIP_INSTALL) --editable . $(BENCH_PEERS)
	.venv-bench/bin/python $(PIP_INSTALL) --no-deps $(BENCH_FILES)
	@touch $@
