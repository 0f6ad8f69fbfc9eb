# `make run` and `make test` need only Python 3.10 to 3.13 and make: what they use is installed into .venv.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test test-all lint format clean
.NOTPARALLEL:

help:
	@echo 'make run        set up .venv once, then run a distillation     (make run ARGS="--help")'
	@echo 'make test       set up .venv once, then run the tests          (make test ARGS="-k buffer")'
	@echo 'make test-all   the same with the slow tests'
	@echo 'make lint       check format, lint and types'
	@echo 'make format     rewrite the files in the house format'
	@echo 'make clean      remove .venv, caches and build output; runs/ stays'
	@echo
	@echo 'Another Python:        make run PYTHON=python3.12'
	@echo 'Smaller, CPU-only set: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make run'

run: .venv/.run-ready
	@$(BIN)/python -m ssdkd.run $(ARGS)

# One thread per worker: the workers already fill the cores, and each holds its own copy of PyTorch.
test: .venv/.dev-ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m "not slow" $(ARGS)

test-all: .venv/.dev-ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(ARGS)

lint: .venv/.dev-ready
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: .venv/.dev-ready
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: written last, so a set-up that was interrupted is taken up again and a finished one is not repeated.
.venv/.run-ready: pyproject.toml constraints.txt
	$(call set-up,.)

.venv/.dev-ready: pyproject.toml constraints.txt
	$(call set-up,.[dev])
	@touch .venv/.run-ready

define set-up
@command -v "$(PYTHON)" >/dev/null || { echo 'ssdkd needs Python 3.10 to 3.13, and there is no "$(PYTHON)" here: name one with make PYTHON=/path/to/python' >&2; exit 1; }
@"$(PYTHON)" -c 'import sys; v = sys.version_info; (3, 10) <= v[:2] <= (3, 13) or sys.exit("ssdkd needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: name another with make PYTHON=/path/to/python" % v[:2])'
@echo 'Setting up .venv (once; fetches PyTorch, so it can take some minutes)'
@"$(PYTHON)" -m venv .venv
@$(PIP) -e '$(1)'
@touch $@
endef
